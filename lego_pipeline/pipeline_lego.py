"""LegoPipeline: an egocentric frame and an action in, the frame of that action out.

The map of the package. `LegoPipeline.__call__` strings the public stages together, and each stage's result can be
passed in instead of being computed:

    enhance           frame, action                     -> description R and the VLM's embeddings F_img, F_txt
    encode_condition  description, embeddings           -> condition and null condition, (B, L, C) each
    encode_image      frame (B, 3, H, W)                -> image latents (B, c, h, w)
    denoise           noise, conditions, image latents  -> latents (B, c, h, w)
    decode            latents                           -> images

The method is LEGO (Lai et al., ECCV 2024). Written against the interfaces of `huggingface/diffusers:
pipelines/stable_diffusion/pipeline_stable_diffusion_instruct_pix2pix.py`, from which it differs by the VLM, the
condition of three parts, passes that are left out where their factor is zero, keys and values that are computed once
per call, and frames of different sizes in one call.

Letters: B samples, N images (B times images per sample), L = 77 + N_i + N_t condition tokens, C cross-attention width,
N_i VLM image tokens, T VLM text states, D VLM width, H, W frame size in pixels, h, w latent size, c latent channels.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, StableDiffusionMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.processing_utils import ProcessorMixin

from lego_pipeline import checks, fast, guidance, images, loading
from lego_pipeline.attention import reuse_keys_values
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.enhance import enhance
from lego_pipeline.projector import LegoProjector
from lego_pipeline.scene import changed_share, keep_scene_pixels
from lego_pipeline.vlm import Enhancement
from lego_pipeline.vlm.base import DEFAULT_QUESTION, check_question

Generators = torch.Generator | list[torch.Generator] | None
Cache = EmbeddingCache | str | os.PathLike | None


@dataclass
class LegoPipelineOutput(BaseOutput):
    """Result of a call.

    Attributes:
        images: N generated frames: a list of PIL images, an array (N, H, W, 3) or a tensor (N, 3, H, W), float32 in
            [0, 1], or latents (N, c, h, w), as `output_type` asks.
        descriptions: the N enriched descriptions that the frames were generated from; None if `prompt_embeds` were
            given.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    descriptions: list[str] | None = None


class LegoPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    """Generates the frame of an action from an egocentric frame and the action's name.

    Loading, saving, offloading, LoRA and so on are those of `DiffusionPipeline`.

    Args:
        vae: encodes frames and decodes latents.
        text_encoder, tokenizer: CLIP's text tower psi for the description.
        unet: takes the noisy latents and the frame's latents stacked along the channels.
        scheduler: any diffusers scheduler that fits the UNet's prediction type.
        projector: brings the VLM's embeddings to cross-attention width.
        vlm, vlm_processor: the tuned visual LLM; None leaves its parts of the condition zero.
        question_template: question that the VLM was tuned on, with `{}` for the action.
        resolution: side in pixels of the square whose area the UNet was trained at.
        num_inference_steps, guidance_scale, image_guidance_scale, guidance_interval: defaults of a call.
        max_new_tokens, temperature, top_k: how the VLM samples the description.
        vlm_dropout: whether the UNet was trained to do without the VLM's parts (a share of `train/train_ldm.py`).
        keep_scene: default of a call, two thresholds or False.
        frame_statistics: {"directions": K lists of D floats, "mean": K floats, "scale": K floats, "limit": float} of
            the training frames' mean-pooled F_img along K directions; a frame whose mean squared z-score is above the
            limit draws a warning.
    """

    model_cpu_offload_seq = "vlm->text_encoder->projector->unet->vae"
    _optional_components = ["vlm", "vlm_processor"]
    # Sequential offload moves a layer when it is called, and torch's attention reads its output layer uncalled.
    _exclude_from_cpu_offload = ["projector"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "image_latents"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        projector: LegoProjector,
        vlm: PreTrainedModel | None = None,
        vlm_processor: ProcessorMixin | None = None,
        question_template: str = DEFAULT_QUESTION,
        resolution: int = 256,
        num_inference_steps: int = 100,
        guidance_scale: float | int = 7.5,
        image_guidance_scale: float | int = 1.5,
        guidance_interval: list[float] | tuple[float, ...] = (0.0, 1.0),
        max_new_tokens: int = 64,
        temperature: float | int = 0.2,
        top_k: int = 50,
        vlm_dropout: bool = False,
        keep_scene: list[float] | tuple[float, ...] | bool = False,
        frame_statistics: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_question(question_template)
        checks.check_interval("guidance_interval", guidance_interval)
        checks.check_keep_scene(keep_scene)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            projector=projector,
            vlm=vlm,
            vlm_processor=vlm_processor,
        )
        self.register_to_config(
            question_template=question_template,
            resolution=resolution,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_interval=list(guidance_interval),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            vlm_dropout=vlm_dropout,
            keep_scene=keep_scene,
            frame_statistics=frame_statistics,
        )
        # Without a VAE, as where only the text is encoded, the factor of Stable Diffusion.
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8
        self._interrupt = False

    # --- Loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a folder written by `save_pretrained`, or a repository of the model hub.

        As `DiffusionPipeline.from_pretrained`, with two differences: without `dtype` every component is float32,
        whatever its file holds, and a folder is looked through before it is loaded.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            **kwargs: of `DiffusionPipeline.from_pretrained`: `dtype` (a torch.dtype, its name, or a dict of component
                name to dtype with "default"), `variant`, `device_map`, components such as `vlm=None`, and so on.

        Raises:
            FileNotFoundError: no such folder, or one of its files is missing.
            ValueError: the folder holds another pipeline, a file is cut off or unreadable, an unknown dtype.
        """
        path = os.fspath(pretrained_model_name_or_path)
        dtype_name = "torch_dtype" if "torch_dtype" in kwargs else "dtype"
        kwargs[dtype_name] = loading.check_dtype(kwargs.get(dtype_name) or torch.float32)
        if loading.is_local(path):
            components = [name for name in cls._get_signature_keys(cls)[0] if name in kwargs]
            loading.check_folder(Path(path), kwargs.get("variant"), components)
            return super().from_pretrained(path, **kwargs)
        try:
            return super().from_pretrained(path, **kwargs)
        except OSError as error:
            raise FileNotFoundError(
                f"`{path}` must be a folder here or a repository of the model hub, got neither: {error}"
            ) from error

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes a folder that `LegoPipeline.from_pretrained` and `DiffusionPipeline.from_pretrained` load alike.

        Beside diffusers' files there is `lego.py`, which `custom_pipeline="lego"` looks for.

        Args:
            save_directory: the folder, made if needed.
            safe_serialization, variant, max_shard_size, push_to_hub, use_flashpack, **kwargs: of
                `DiffusionPipeline.save_pretrained`. The hub's copy has the first two; its shards are diffusers' own,
                as `DiffusionPipeline.push_to_hub` takes no size.
        """
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        hub = {name: kwargs.pop(name) for name in loading.HUB_ARGUMENTS if name in kwargs}
        written: dict[str, Any] = {"safe_serialization": safe_serialization, "variant": variant}
        super().save_pretrained(
            save_directory, max_shard_size=max_shard_size, use_flashpack=use_flashpack, **written, **kwargs
        )
        loading.finish_folder(Path(save_directory))
        if push_to_hub:
            self.push_to_hub(repo_id, **written, **hub)

    def load_fast(self, folder: str | os.PathLike) -> Self:
        """Makes this a few-step pipeline, such as 4 steps of one pass each with the guidance in the weights.

            pipe = LegoPipeline.from_pretrained(KITCHEN).load_fast(KITCHEN)

        Adapters are added to the UNet's weights for good (no peft is needed), the scheduler becomes an LCMScheduler,
        and steps and guidance scales of a call get their new defaults.

        Args:
            folder: `output_dir/lora` of `train/distill_ldm.py`, or a pipeline folder that has it as `fast`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of another UNet or damaged, or the pipeline has adapters or is a few-step one already.
        """
        fast.load_fast(self, Path(folder))
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `DiffusionPipeline.to`; `dtype=` may be a name, and an unknown device or dtype is told what is known.

        Raises:
            ValueError: the device is unknown to torch or isn't there, the dtype is unknown.
        """
        kwargs = loading.check_placement(args, kwargs)
        return super().to(*args, **kwargs)

    # --- State of a running call ----------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> guidance.Scale:
        """Text guidance scale s_T of the running call; a callback may change `_guidance_scale` between steps."""
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> guidance.Scale:
        """Image guidance scale s_I of the running call, likewise `_image_guidance_scale`."""
        return self._image_guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of UNet calls per image of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the steps that are left are skipped; a callback sets `_interrupt`."""
        return self._interrupt

    # --- Stages ---------------------------------------------------------------------------------------------------

    def enhance(
        self,
        image: images.ImageInput,
        action: str | Sequence[str] | None = None,
        description: str | Sequence[str] | None = None,
        generator: Generators = None,
        cache: Cache = None,
    ) -> list[Enhancement]:
        """Lets the VLM describe how an action is carried out in a frame, and embeds frame and description.

        Args:
            image: B frames, or one for all, as for a call.
            action: B labels such as "open drawer", or one for all. Not needed with `description`, which then stands
                in for it in the question.
            description: B descriptions to be embedded instead of sampled ones, or one for all.
            generator: one, or one per sample. It is only copied, never advanced, so that a call draws the same noise
                whether the description is sampled or given. None samples freshly.
            cache: an `EmbeddingCache`, or its folder, such as `train/cache_embeddings.py` fills. What it has is not
                computed again, what it lacks is added. A sampled description is then the cache's own for this frame
                and action, with seed 0, whatever the generator. Without a VLM everything has to be there.

        Returns:
            B enhancements: description, `image_embeds` (N_i, D), `text_embeds` (T, D).

        Raises:
            ValueError: the pipeline has no VLM and no cache, the cache lacks what there is no VLM for, or neither
                action nor description is given.

        Source: paper section 3.2; `BolinLai/LEGO: vllm/llava/eval/run_llava_in_loop.py`.
        """
        has_vlm = self.vlm is not None and self.vlm_processor is not None
        if not has_vlm and cache is None:
            raise ValueError(
                "`enhance` must have a VLM, got a pipeline with `vlm=None` or without its processor; load a "
                "checkpoint with both, or call the pipeline with a `description` (the VLM's part is then zero)."
            )
        if action is None and description is None:
            raise ValueError('`action` or `description` must be given, got neither; pass for instance "open drawer".')
        checks.check_texts("action", action)
        checks.check_texts("description", description)
        frames, actions, descriptions = images.to_frames(image), checks.as_list(action), checks.as_list(description)
        batch_size = checks.batch_size_of(image=frames, action=actions, description=descriptions)
        checks.check_generator(generator, batch_size)
        frames, actions, descriptions = (checks.expand(v, batch_size) for v in (frames, actions, descriptions))
        return enhance(
            self.vlm if has_vlm else None,
            self.vlm_processor,
            [images.to_pil(frame) for frame in frames],
            actions,
            descriptions,
            question_template=self.config.question_template,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            generators=None if descriptions is not None else _description_generators(generator, batch_size),
            cache=cache if cache is None or isinstance(cache, EmbeddingCache) else EmbeddingCache(cache),
        )

    def encode_prompt(self, prompt: str | Sequence[str]) -> torch.Tensor:
        """Text tower psi: last hidden state after the final norm, padded to the tower's length.

        Args:
            prompt: B texts. What goes beyond the tower's length (77 tokens with both marks) is cut off with a warning.

        Returns:
            (B, 77, C) float.

        Raises:
            ValueError: the pipeline has no text encoder or no tokenizer.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "`encode_prompt` must have a text encoder and its tokenizer, got a pipeline without; load the "
                "checkpoint with both, or pass `prompt_embeds` and `negative_prompt_embeds`."
            )
        texts = checks.as_list(prompt)
        length = self.text_length
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        offsets = self.tokenizer(texts, return_offsets_mapping=True, verbose=False).offset_mapping
        for text, spans in zip(texts, offsets, strict=True):
            if len(spans) > length:
                warnings.warn(
                    f"The text encoder reads {length} tokens and `{text[:40]}...` has {len(spans)}; "
                    f"this was cut off: `{text[spans[length - 1][0] :].strip()}`. Pass a shorter description.",
                    stacklevel=2,
                )
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0]

    def encode_condition(
        self,
        enhancement: Enhancement | Sequence[Enhancement] | None = None,
        description: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Condition `[psi(R) ; image_projection(F_img) ; text_mixer(text_projection(F_txt))]` and its null.

        The null condition is `[psi("") ; zeros ; zeros]` with the zeros after the projections.

        Args:
            enhancement: B enhancements.
            description: B texts, used where there is no enhancement: both VLM parts are then zeros.
            negative_prompt: replaces "" in psi(""), one text or B.

        Returns:
            condition (B, L, C) and null condition (1 or B, L, C).

        Raises:
            ValueError: an enhancement is of another VLM than the checkpoint was trained with.

        Source: paper section 3.3; `BolinLai/LEGO: stable_diffusion/ldm/models/diffusion/ddpm_egogen.py`.
        """
        if (enhancement is None) == (description is None):
            raise ValueError("`enhancement` or `description` must be given, and only one of them.")
        null_condition = self.encode_null_condition(negative_prompt)
        if description is not None:
            return self.projector(self.encode_prompt(description).to(self.projector.dtype)), null_condition
        checks.check_enhancements(enhancement, self.projector.config)
        enhancements = checks.as_list(enhancement) or []
        device, dtype = self._execution_device, self.projector.dtype
        enhancements = [item.to(device, dtype) for item in enhancements]
        checks.warn_of_unknown_frames(self.config.frame_statistics, enhancements)
        prompt_embeds = self.encode_prompt([item.description for item in enhancements])
        condition = self.projector(
            prompt_embeds.to(dtype),
            torch.stack([item.image_embeds for item in enhancements]),
            [item.text_embeds for item in enhancements],
        )
        return condition, null_condition

    def encode_null_condition(self, negative_prompt: str | Sequence[str] | None = None) -> torch.Tensor:
        """Null condition (1 or B, L, C); needs neither frame nor VLM. See `encode_condition`."""
        return self.projector.null_condition(self.encode_prompt("" if negative_prompt is None else negative_prompt))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Mode of the VAE's posterior for a frame, *not* multiplied by the scaling factor.

        Args:
            image: (B, 3, H, W) float in [-1, 1], H and W multiples of the VAE factor.

        Returns:
            (B, c, h, w) float.
        """
        factor = self.vae_scale_factor
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % factor or image.shape[3] % factor:
            raise ValueError(
                f"`image` must be (B, 3, H, W) with H, W multiples of {factor}, got {tuple(image.shape)}; "
                "make it with `lego_pipeline.images.to_model_input`, or call the pipeline, which resizes."
            )
        image = image.to(self._execution_device, self.vae.dtype)
        return self.vae.encode(image).latent_dist.mode()

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gaussian noise that `denoise` starts from, drawn or given.

        Args:
            batch_size: N.
            height, width: of the frame that the model sees, in pixels.
            generator: one for all, or N, which makes an image independent of the others.
            latents: (N, c, h, w) noise of variance 1 to be used instead. `denoise` multiplies it by the scheduler's
                `init_noise_sigma`.

        Returns:
            (N, c, h, w) float of the UNet's dtype.
        """
        factor = self.vae_scale_factor
        shape = (batch_size, self.vae.config.latent_channels, height // factor, width // factor)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        advice = f"pass noise for frames of {width}x{height} pixels, or leave it out"
        checks.check_tensor("latents", latents, shape, advice)
        return latents.to(device, dtype)

    def denoise(
        self,
        latents: torch.Tensor,
        condition: torch.Tensor,
        null_condition: torch.Tensor | None,
        image_latents: torch.Tensor,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: guidance.Scale | None = None,
        image_guidance_scale: guidance.Scale | None = None,
        guidance_interval: Sequence[float] | None = None,
        generator: Generators = None,
        eta: float = 0.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> torch.Tensor:
        """Runs the scheduler from noise to clean latents.

        The passes that a step needs (`lego_pipeline.guidance`) are one batch of the UNet; cross-attention keys and
        values are computed in the first step only (`lego_pipeline.attention`).

        Args:
            latents: (N, c, h, w) noise of variance 1, from `prepare_latents`.
            condition, null_condition: (N, L, C) and (1 or N, L, C), from `encode_condition`. The null may be None
                where no pass needs it.
            image_latents: (N, c, h, w), from `encode_image`.
            num_inference_steps, guidance_scale, image_guidance_scale, guidance_interval: None takes the checkpoint's.
            generator: noise of schedulers that draw some in every step.
            eta: of DDIM; ignored by other schedulers.
            cross_attention_kwargs: handed to the UNet, for instance {"scale": 0.5} for LoRA.
            callback_on_step_end, callback_on_step_end_tensor_inputs: see `__call__`.

        Returns:
            (N, c, h, w) float, scaled as the UNet knows them.

        Source: guidance in InstructPix2Pix equation 3, with s_T and s_I.
        """
        settings = self._with_defaults(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_interval=guidance_interval,
        )
        self._guidance_scale, self._image_guidance_scale = settings["guidance_scale"], settings["image_guidance_scale"]

        device, dtype = self._execution_device, self.unet.dtype
        self.scheduler.set_timesteps(settings["num_inference_steps"], device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        step_arguments = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {k: v for k, v in {"generator": generator, "eta": eta}.items() if k in step_arguments}

        tensors: dict[str, Any] = {
            "prompt_embeds": condition,
            "negative_prompt_embeds": null_condition,
            "image_latents": image_latents,
        }
        tensors = {k: v if v is None else v.to(device, dtype) for k, v in tensors.items()}
        stacks: dict[tuple[str, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # by plan of passes
        with reuse_keys_values(self.unet) as memory, self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                is_guided = guidance.is_guided(i, len(timesteps), settings["guidance_interval"])
                scales = (self._guidance_scale, self._image_guidance_scale) if is_guided else (1.0, 1.0)
                plan = guidance.needed_passes(*scales)
                if plan not in stacks:
                    stacks[plan] = guidance.stack_passes(plan, *tensors.values())
                encoder_hidden_states, image_part = stacks[plan]

                scaled = self.scheduler.scale_model_input(latents, t)  # (N, c, h, w)
                model_input = torch.cat([torch.cat([scaled] * len(plan)), image_part], dim=1)  # (passes * N, 2c, h, w)
                memory.plan = plan
                prediction = self.unet(
                    model_input,
                    t,
                    encoder_hidden_states=encoder_hidden_states,
                    cross_attention_kwargs=cross_attention_kwargs,
                    return_dict=False,
                )[0]
                prediction = guidance.combine(prediction, plan, *scales)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0].to(dtype)

                if callback_on_step_end is not None:
                    known = {"latents": latents, **tensors}
                    given = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, t, given) or {}
                    latents = returned.get("latents", latents)
                    changed = {k: v for k, v in returned.items() if k in tensors and v is not tensors[k]}
                    if changed:
                        tensors.update(changed)
                        stacks.clear()
                        memory.clear()
                progress_bar.update()
        return latents

    def decode(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        sizes: Sequence[tuple[int, int]] | None = None,
        frames: Sequence[images.Frame] | None = None,
        image_latents: torch.Tensor | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Latents to images, clamped to [-1, 1] before they are converted.

        Args:
            latents: (N, c, h, w), from `denoise`.
            output_type: "pil", "np", "pt", or "latent" for the latents as they are.
            sizes: N pairs (height, width) to which the images are resized, or None.
            frames, image_latents: the N input frames and their latents (N, c, h, w) from `encode_image`, to keep the
                scene (`lego_pipeline.scene`); None decodes everything.
            thresholds: of the change, see `lego_pipeline.scene.changed_share`.

        Returns:
            As `LegoPipelineOutput.images`.
        """
        if output_type == "latent":
            return latents
        latents = latents.to(self._execution_device, self.vae.dtype) / self.vae.config.scaling_factor
        decoded = images.from_model_output(self.vae.decode(latents, return_dict=False)[0], sizes)
        if frames is not None and image_latents is not None and thresholds is not None:
            shares = changed_share(latents, image_latents.to(latents), thresholds)
            decoded = [
                keep_scene_pixels(image, images.to_model_input(frame, *image.shape[-2:]) / 2 + 0.5, share)
                for image, frame, share in zip(decoded, frames, shares, strict=True)
            ]
        return images.stack_images(images.convert(decoded, output_type), output_type)

    # --- The call -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: images.ImageInput,
        action: str | list[str] | None = None,
        description: str | list[str] | None = None,
        enhancement: Enhancement | list[Enhancement] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: guidance.Scale | None = None,
        image_guidance_scale: guidance.Scale | None = None,
        guidance_interval: Sequence[float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_size: str = "input",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        prompt: str | list[str] | None = None,
        image_latents: torch.Tensor | None = None,
        eta: float = 0.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        cache: Cache = None,
        keep_scene: Sequence[float] | bool | None = None,
    ) -> LegoPipelineOutput | tuple:
        """Generates the frame of an action.

        Every list of a call has one entry per sample, or one for all. Frames that end at different latent sizes are
        denoised group by group; results stand in the order of the samples.

        Args:
            image: PIL image of any mode; array (H, W, 3) or (B, H, W, 3), uint8 or float in [0, 1]; tensor (3, H, W)
                or (B, 3, H, W), uint8 or float in [0, 1]; or a list of these, of any sizes. None with `image_latents`.
            action: label such as "open drawer". The VLM describes how it is carried out. Without a VLM the label
                itself is the text.
            description: text to use instead of a sampled description; the VLM only embeds it.
            enhancement: result of `enhance`; the VLM isn't used at all.
            height, width: size in pixels at which the model works, multiples of the VAE factor. None: the area that
                the checkpoint was trained at, in the frame's aspect.
            num_inference_steps, guidance_scale (s_T), image_guidance_scale (s_I), guidance_interval: None takes the
                checkpoint's. Scales may be given per sample. A scale of 1 switches that guidance off and saves its
                pass. Outside the interval, fractions (start, end) of the steps, there is no guidance at all; use it to
                stop guiding early (diffusers' `SDCFGCutoffCallback` sets s_T to 0, which here means "without text").
            negative_prompt: replaces "" in the null text psi(""), so guidance leads away from it.
            num_images_per_prompt: images per sample.
            generator: one, or one per image; with one per image an image doesn't depend on the others of its batch.
            latents: (N, c, h, w) noise of variance 1; it is multiplied by the scheduler's `init_noise_sigma`.
            prompt_embeds: (B, L, C) whole condition sequence of any length; neither action nor VLM is needed.
            negative_prompt_embeds: (1 or B, L, C) whole null sequence.
            output_size: "input" resizes the result to the size of its frame, "model" leaves it.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns (images, descriptions).
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; what it returns
                replaces the tensors. Setting `pipe._interrupt = True` skips the steps that are left.
            callback_on_step_end_tensor_inputs: names of these tensors, out of `_callback_tensor_inputs`.
            prompt: synonym of `action`.
            image_latents: (B, c, h, w) result of `encode_image` to be used instead of encoding `image`.
            eta: of DDIM.
            cross_attention_kwargs: handed to the UNet.
            cache: of descriptions and embeddings, see `enhance`.
            keep_scene: two thresholds of change between which decoded pixels fade into those of `image`, so that what
                the action leaves alone stays sharp (`lego_pipeline.scene`); False decodes everything; None takes the
                checkpoint's. It has no effect without `image`.

        Returns:
            `LegoPipelineOutput`.

        Raises:
            TypeError, ValueError: an input breaks its rule; the message says what is expected, what came, what to do.
        """
        # 1. Check inputs
        self._interrupt = False
        settings = self._with_defaults(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_interval=guidance_interval,
            keep_scene=keep_scene,
        )
        if action is not None and prompt is not None:
            raise ValueError("`action` and its synonym `prompt` must not both be given; pass `action`.")
        action = prompt if action is None else action
        frames = None if image is None else images.to_frames(image)
        # diffusers' callback classes name the tensors that they want
        tensor_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        sizes = self.check_inputs(
            frames,
            action=action,
            description=description,
            enhancement=enhancement,
            height=height,
            width=width,
            **settings,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_size=output_size,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=tensor_inputs,
            image_latents=image_latents,
        )
        batch_size, per_sample = len(sizes), num_images_per_prompt
        frames = checks.expand(frames, batch_size)
        frame_sizes = None if frames is None or output_size == "model" else [images.frame_size(f) for f in frames]
        if image_latents is None:
            is_resized_back = output_size == "input" and output_type != "latent"
            images.warn_of_enlargement([images.frame_size(frame) for frame in frames], sizes, is_resized_back)

        # 2. Enhance: description and VLM embeddings
        needs_text = prompt_embeds is None and enhancement is None
        if needs_text and (self.vlm is not None or cache is not None):
            sources = generator[::per_sample] if isinstance(generator, list) else generator
            enhancement = self.enhance(frames, action, description, sources, cache)
        enhancements = checks.expand(checks.as_list(enhancement), batch_size)
        texts = checks.expand(checks.as_list(description or action), batch_size)

        # 3. Encode the condition and its null
        descriptions = texts if enhancements is None else [item.description for item in enhancements]
        if prompt_embeds is not None:
            condition, null_condition, descriptions = prompt_embeds, negative_prompt_embeds, None
            if null_condition is None and prompt_embeds.shape[1] == checks.condition_length(self):
                null_condition = self.encode_null_condition(negative_prompt)
        else:
            if enhancements is None and not self.config.vlm_dropout:
                warnings.warn(
                    "Without a VLM its parts of the condition are zero, and this checkpoint's UNet was never trained "
                    "so (`vlm_dropout` in its config); expect worse frames, or load it with its `vlm`.",
                    stacklevel=2,
                )
            condition, null_condition = self.encode_condition(
                enhancements, texts if enhancements is None else None, negative_prompt
            )
            null_condition = null_condition if negative_prompt_embeds is None else negative_prompt_embeds
        condition = condition.expand(batch_size, -1, -1).repeat_interleave(per_sample, dim=0)  # (N, L, C)
        if null_condition is not None:
            null_condition = null_condition.expand(batch_size, -1, -1).repeat_interleave(per_sample, dim=0)

        # 4. Encode, denoise and decode the frames of each size
        outputs: list[Any] = [None] * (batch_size * per_sample)
        for size in dict.fromkeys(sizes):
            samples = [i for i, other in enumerate(sizes) if other == size]
            rows = [i * per_sample + k for i in samples for k in range(per_sample)]  # of the N images
            owners = [row // per_sample for row in rows]  # their samples
            if image_latents is None:
                inputs = torch.stack([images.to_model_input(frames[i], *size) for i in samples])
                encoded = self.encode_image(inputs)
            else:
                encoded = image_latents.expand(batch_size, -1, -1, -1)
            own_generator = [generator[row] for row in rows] if isinstance(generator, list) else generator
            noise = self.prepare_latents(len(rows), *size, own_generator, latents)
            own_latents = encoded.repeat_interleave(per_sample, dim=0)
            generated = self.denoise(
                noise,
                condition[rows],
                None if null_condition is None else null_condition[rows],
                own_latents,
                num_inference_steps=settings["num_inference_steps"],
                guidance_scale=guidance.scale_of_samples(settings["guidance_scale"], owners),
                image_guidance_scale=guidance.scale_of_samples(settings["image_guidance_scale"], owners),
                guidance_interval=settings["guidance_interval"],
                generator=own_generator,
                eta=eta,
                cross_attention_kwargs=cross_attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=tensor_inputs,
            )
            output_sizes = None if frame_sizes is None else [frame_sizes[owner] for owner in owners]
            kept: dict[str, Any] = {}
            if settings["keep_scene"] and frames is not None:
                kept = {"frames": [frames[owner] for owner in owners], "thresholds": settings["keep_scene"]}
            decoded = self.decode(generated, output_type, output_sizes, image_latents=own_latents, **kept)
            for row, output in zip(rows, decoded, strict=True):
                outputs[row] = output
        result = images.stack_images(outputs, output_type)

        # 5. Offload all models
        self.maybe_free_model_hooks()
        self._interrupt = False

        if descriptions is not None:
            descriptions = [text for text in descriptions for _ in range(per_sample)]
        if not return_dict:
            return result, descriptions
        return LegoPipelineOutput(images=result, descriptions=descriptions)

    def check_inputs(self, frames: list[images.Frame] | None, **arguments: Any) -> list[tuple[int, int]]:
        """Checks the arguments of a call before any model runs; the rules are in `lego_pipeline.checks`.

        Args:
            frames: from `lego_pipeline.images.to_frames`, or None.
            **arguments: those of `__call__` by name, with the checkpoint's defaults filled in.

        Returns:
            (height, width) in pixels at which the model works, for each of the B samples.

        Raises:
            TypeError, ValueError: naming the argument, its rule, what came, and what to do.
        """
        return checks.check_call(self, frames, **arguments)

    # --- Small parts ----------------------------------------------------------------------------------------------

    @property
    def text_length(self) -> int:
        """Tokens that the text tower reads, 77 in every CLIP."""
        if self.tokenizer is None or self.text_encoder is None:
            return 77
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def _with_defaults(self, **given: Any) -> dict[str, Any]:
        """Arguments of a call, those that are None taken from the checkpoint's config."""
        return {name: self.config[name] if value is None else value for name, value in given.items()}


def _description_generators(generator: Generators, count: int) -> list[torch.Generator] | None:
    """One generator per sample, seeded from a look ahead into the given ones, which are not advanced."""
    if generator is None:
        return None
    if isinstance(generator, list):
        sources = [source.clone_state() for source in generator]
    else:
        sources = [generator.clone_state()] * count
    seeds = [int(torch.randint(2**62, (1,), generator=source, device=source.device)) for source in sources]
    return [torch.Generator().manual_seed(seed) for seed in seeds]
