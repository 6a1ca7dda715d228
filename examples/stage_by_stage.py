"""The pipeline's stages one by one, with the shape of what each hands to the next.

    python examples/stage_by_stage.py --output stage_by_stage.png

A call of `LegoPipeline` does exactly this. Stage by stage, results can be looked at, kept, changed or replaced: here
the description and the VLM's embeddings are written to a file and read back before they go on.
"""

from pathlib import Path

import torch
import tyro

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.images import frame_size, model_size, to_model_input
from lego_pipeline.vlm import Enhancement


@torch.no_grad()
def main(output: Path = Path("stage_by_stage.png"), row: int = 0, steps: int | None = None, seed: int = 0) -> None:
    """Runs the stages for one of the embedded frames.

    Args:
        output: where the picture goes; the enhancement goes beside it.
        row: which of the embedded frames.
        steps: denoising steps; without it the checkpoint's own number.
        seed: of the noise and of the description.
    """
    pair = read_manifest(FRAMES)[row]
    frame = pair["image_0"]
    pipeline = LegoPipeline.from_pretrained(KITCHEN)
    generator = torch.Generator().manual_seed(seed)
    output.parent.mkdir(parents=True, exist_ok=True)

    # 1. enhance: what the VLM writes about the action in this frame, and its states while it does.
    [enhancement] = pipeline.enhance(frame, pair["action"], generator=generator)
    print(f"enhance           {pair['action']!r} -> {enhancement.description!r}")
    print(f"                  image_embeds {shape(enhancement.image_embeds)}")
    print(f"                  text_embeds {shape(enhancement.text_embeds)}")
    file = output.with_suffix(".safetensors")
    enhancement.save(file)
    enhancement = Enhancement.load(file)

    # 2. encode_condition: text tower and projected embeddings as one sequence for the UNet's cross-attention.
    condition, null_condition = pipeline.encode_condition(enhancement)
    print(f"encode_condition  condition {shape(condition)}, null {shape(null_condition)}")

    # 3. encode_image: the frame at the model's size, through the VAE.
    height, width = model_size(*frame_size(frame), pipeline.config.resolution, pipeline.vae_scale_factor)
    image_latents = pipeline.encode_image(to_model_input(frame, height, width)[None])
    print(f"encode_image      {width}x{height} pixels -> {shape(image_latents)}")

    # 4. denoise: from noise to the latents of the action frame, guided by condition and frame.
    noise = pipeline.prepare_latents(1, height, width, generator)
    latents = pipeline.denoise(
        noise, condition, null_condition, image_latents, num_inference_steps=steps, generator=generator
    )
    print(f"denoise           {shape(noise)} -> {shape(latents)}")

    # 5. decode: back to pixels, at the size of the frame that came in, whose own pixels stay where nothing changed.
    [picture] = pipeline.decode(
        latents,
        sizes=[frame_size(frame)],
        frames=[frame],
        image_latents=image_latents,
        thresholds=pipeline.config.keep_scene or None,
    )
    picture.save(output)
    print(f"decode            {picture.width}x{picture.height} pixels -> {output}")


def shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's shape, short in print."""
    return tuple(tensor.shape)


if __name__ == "__main__":
    tyro.cli(main)
