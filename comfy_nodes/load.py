"""Nodes that load: a checkpoint as ComfyUI's own MODEL, CLIP and VAE, and the visual LLM."""

from typing import Any

from comfy_api.latest import io

from . import adapter

LegoPipelineType = io.Custom("LEGO_PIPELINE")
LegoVlmType = io.Custom("LEGO_VLM")


class LegoLoadPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoLoadPipeline",
            display_name="LEGO Load Pipeline",
            category="LEGO/load",
            description="Loads a LegoPipeline folder as ComfyUI's own model, text encoder and VAE. Folders are looked "
            "for in models/lego and under `lego:` in extra_model_paths.yaml; the embedded checkpoint, which knows "
            "rendered kitchens only, is always there.",
            search_aliases=["egocentric", "action frame", "instruct pix2pix", "lego"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(adapter.pipeline_folders()),
                    tooltip="Folder of a LegoPipeline, as `save_pretrained` or the training scripts write it.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(adapter.DTYPES),
                    default="auto",
                    advanced=True,
                    tooltip="Number format of the UNet's weights. auto: ComfyUI's choice for the device. float32 also "
                    "sets text encoder and VAE.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The UNet; any sampler and LoRA node takes it."),
                io.Clip.Output(tooltip="The text encoder with the checkpoint's own vocabulary."),
                io.Vae.Output(tooltip="The autoencoder."),
                LegoPipelineType.Output(
                    display_name="lego_pipeline", tooltip="What ComfyUI has no type for: projector and settings."
                ),
                io.Int.Output(display_name="steps", tooltip="Number of steps that suits the checkpoint."),
                io.Float.Output(display_name="guidance_scale", tooltip="Text guidance that suits the checkpoint."),
                io.Float.Output(
                    display_name="image_guidance_scale", tooltip="Image guidance that suits the checkpoint."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: Any) -> str:
        return adapter.state_of(adapter.pipeline_folders().get(model), "**/*.safetensors")

    @classmethod
    def execute(cls, model: str, dtype: str) -> io.NodeOutput:
        unet, clip, vae, handle = adapter.load_pipeline(model, dtype)
        config = handle.config
        scales = float(config["guidance_scale"]), float(config["image_guidance_scale"])
        return io.NodeOutput(unet, clip, vae, handle, config["num_inference_steps"], *scales)


class LegoLoadVlm(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoLoadVlm",
            display_name="LEGO Load VLM",
            category="LEGO/load",
            description="Loads the visual LLM that describes an action in a frame. ComfyUI moves it to the GPU when "
            "it is used and frees it when memory is needed.",
            search_aliases=["llava", "visual llm", "lego"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(adapter.vlm_folders()),
                    tooltip="A LegoPipeline folder with its VLM, or a VLM's own folder below models/lego. Use the VLM "
                    "that the checkpoint was trained with.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(adapter.DTYPES),
                    default="auto",
                    advanced=True,
                    tooltip="Number format of the weights. auto: float32 on a CPU, bfloat16 on a GPU.",
                ),
            ],
            outputs=[LegoVlmType.Output(display_name="lego_vlm", tooltip="For LEGO Enhance Prompt.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_: Any) -> str:
        return adapter.state_of(adapter.vlm_folders().get(model), "**/*.safetensors")

    @classmethod
    def execute(cls, model: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(adapter.load_vlm(model, dtype))


class LegoLoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoLoadLora",
            display_name="LEGO Load LoRA",
            category="LEGO/load",
            description="Adds a LoRA of this project's training: the UNet's adapters, and the projector that was "
            "trained with them. ComfyUI's own LoRA loader takes the file comfyui.safetensors as well, but not the "
            "projector.",
            search_aliases=["lora", "adapter", "lego"],
            inputs=[
                io.Model.Input("model", tooltip="From LEGO Load Pipeline."),
                LegoPipelineType.Input("lego_pipeline", tooltip="From LEGO Load Pipeline."),
                io.Combo.Input(
                    "lora",
                    options=list(adapter.lora_folders()),
                    tooltip="Folder `lora` of a training run, below models/lego or models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Factor of the adapters. The projector is taken whole.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The UNet with the adapters."),
                LegoPipelineType.Output(display_name="lego_pipeline", tooltip="With the LoRA's projector."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **_: Any) -> str:
        return adapter.state_of(adapter.lora_folders().get(lora), "**/*.safetensors")

    @classmethod
    def execute(
        cls, model: object, lego_pipeline: adapter.PipelineHandle, lora: str, strength: float
    ) -> io.NodeOutput:
        return io.NodeOutput(*adapter.add_lora(model, lego_pipeline, lora, strength))


NODES = [LegoLoadPipeline, LegoLoadVlm, LegoLoadLora]
