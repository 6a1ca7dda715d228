"""What the released LEGO does to frames and pictures, for `parity="paper"`: worse than the default, but comparable.

Frames are squeezed to a square, pictures are stretched to the aspect of the clip, to their own darkest and brightest
value and stored as JPEG, and one stream of random numbers serves a whole chunk of the data set, in its order. Facts
from `BolinLai/LEGO: metrics/inference.py`; sampling is `lego_pipeline.scheduler.LegoEulerAncestralScheduler`.

The authors drew noise in half precision on their GPU. It is drawn on the CPU here, so pictures show other noise than
theirs, and are the same on every device.

Letters: H, W size of a picture in pixels, c latent channels, h, w latent size.
"""

import io
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import PIL.Image
import torch
from torch.nn import functional

CHUNKS = 8  # processes of the release's scripts, each of which starts from the seed


def squeeze(frame: PIL.Image.Image, resolution: int) -> PIL.Image.Image:
    """The frame as a square of `resolution` pixels, its aspect ignored."""
    return frame.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)


def released_resize(decoded: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """A decoded picture in the aspect of its clip; bicubic without antialiasing, nothing is clamped.

    Args:
        decoded: (3, H, W) float.
        width, height: of the clip's frames, from the metadata.

    Returns:
        (3, H, round(width / height * H)) float32.
    """
    size = (decoded.shape[1], round(width / height * decoded.shape[1]))
    return functional.interpolate(decoded[None].float(), size, mode="bicubic", align_corners=False)[0]


def released_picture(decoded: torch.Tensor, width: int, height: int) -> PIL.Image.Image:
    """`released_resize`, stretched so that the smallest value is 0 and the largest 255, fractions cut off."""
    resized = released_resize(decoded, width, height)
    low, high = resized.min(), resized.max()
    scaled = ((resized - low) / (high - low) * 255).nan_to_num()  # of one colour: black
    return PIL.Image.fromarray(scaled.permute(1, 2, 0).cpu().numpy().astype(np.uint8))


def released_jpeg(picture: PIL.Image.Image) -> bytes:
    """A JPEG file of quality 75 with colours at half resolution (4:2:0), Pillow's defaults of the time."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=75, subsampling="4:2:0")
    return data.getvalue()


def released_path(model: str, seed: int, steps: int, image_guidance_scale: float, target: str) -> PurePosixPath:
    """Where the release puts a picture below the folder that is named after the checkpoint.

    Args:
        model: name of the checkpoint.
        target: path of the target frame, of which the last three parts count (clip, action, frame).
    """
    run = f"{model}-e={seed}-s={steps}-si={image_guidance_scale}"
    return PurePosixPath(run, "images", *PurePosixPath(target).parts[-3:])


def chunk_starts(count: int) -> list[int]:
    """First sample of each of the `CHUNKS` chunks of `count` samples, the end last: floor(k / CHUNKS * count)."""
    return [k * count // CHUNKS for k in range(CHUNKS + 1)]


def chunk_generators(
    count: int, seed: int, shape: tuple[int, ...], draws: int, dtype: torch.dtype = torch.float32
) -> Iterator[torch.Generator]:
    """For each sample a generator that stands where the stream of its chunk stands.

    A sample can so be drawn alone, after a break or in another process.

    Args:
        count: of samples.
        seed: of every chunk.
        shape: (1, c, h, w) of the latents.
        draws: Gaussian draws of this shape for a sample: the start, and one in each step but the last.
        dtype: in which noise is drawn.
    """
    starts = chunk_starts(count)
    for first, end in zip(starts, starts[1:], strict=False):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(first, end):
            yield generator.clone_state()
            for _ in range(draws):
                torch.randn(shape, generator=generator, dtype=dtype)
