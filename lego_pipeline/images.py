"""Frames in and out of the pipeline: every conversion between PIL, numpy and tensors, and the resize rule.

Used by `LegoPipeline`, by training and by the command line, so that a frame has the same pixels everywhere. A frame
that was read is either an upright 8-bit RGB PIL image or a float tensor (3, H, W) in [0, 1]; the model sees float
tensors in [-1, 1]. Resizing is bicubic with antialiasing, for PIL images and for tensors alike.

Letters: B batch, H, W frame size in pixels.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.nn import functional

Frame: TypeAlias = PIL.Image.Image | torch.Tensor
ImageInput: TypeAlias = Any  # PIL image, numpy array, tensor, or a list of them

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SMALLEST_SIDE = 8  # pixels; less is no frame but a mistake
LARGEST_ENLARGEMENT = 2.0  # linear; more is reported, as the pixels have to be invented


def read_image(path: str | Path) -> PIL.Image.Image:
    """Reads an image file of any mode, size and orientation as an upright 8-bit RGB image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, not an image, or too large to be opened safely.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"image {path} must be a file, found {found} there; check the path.")
    if path.stat().st_size == 0:
        raise ValueError(f"image {path} must hold a picture, got an empty file; copy or download it again.")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on and refuses from 179 on; the refusal is enough.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path) as image:
                image.load()
                return to_rgb(image)
    except PIL.UnidentifiedImageError as error:
        raise ValueError(
            f"image {path} must be of a format that Pillow reads (PNG, JPEG, WebP, ...), got none of them; convert it."
        ) from error
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"image {path} must have fewer than 179 megapixels, {error}; make it smaller.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"image {path} must be readable, got: {error}; copy or download it again.") from error


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Upright 8-bit RGB copy of a PIL image of any mode.

    The EXIF orientation is applied, transparent pixels are laid on white, 16-bit values are scaled (Pillow's own
    conversion would clip them), palettes and CMYK are converted.

    Raises:
        ValueError: the file behind the image is truncated, or its values have no known range.
    """
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        name = getattr(image, "filename", "") or "image"
        raise ValueError(f"`{name}` must be complete, got: {error}; copy or download it again.") from error
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"`image` of mode {image.mode} must have values in [0, 65535], got [{low}, {high}]; scale it to 8 bit."
            )
        return PIL.Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError(
            "`image` must be of an integer mode, got mode F, whose range is unknown; pass a numpy array in [0, 1]."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_frames(image: ImageInput) -> list[Frame]:
    """Splits any accepted input into frames.

    Args:
        image: a PIL image of any mode; an array (H, W), (H, W, 1 | 3 | 4) or (B, H, W, 1 | 3 | 4), uint8, uint16 or
            float in [0, 1]; a tensor (3, H, W) or (B, 3, H, W), uint8 or float in [0, 1]; or a list of these.

    Returns:
        One frame per picture: PIL RGB, or a float32 tensor (3, H, W) in [0, 1] on the CPU.

    Raises:
        TypeError: another type.
        ValueError: a shape, a range, a value that is not finite, or a side below `SMALLEST_SIDE` pixels.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("`image` must hold at least one frame, got an empty list.")
        return [frame for item in image for frame in to_frames(item)]
    if isinstance(image, PIL.Image.Image):
        frames: list[Frame] = [to_rgb(image)]
    elif isinstance(image, np.ndarray):
        frames = _array_frames(image)
    elif isinstance(image, torch.Tensor):
        frames = _tensor_frames(image)
    else:
        hint = f"; read it with `lego_pipeline.images.read_image({str(image)!r})`"
        raise TypeError(
            "`image` must be a PIL image, a numpy array, a tensor or a list of them, "
            f"got {type(image).__name__}{hint if isinstance(image, (str, Path)) else ''}."
        )
    for frame in frames:
        height, width = frame_size(frame)
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(
                f"`image` must be at least {SMALLEST_SIDE} pixels wide and high, got {width}x{height}; "
                "pass the whole frame."
            )
    return frames


def frame_size(frame: Frame) -> tuple[int, int]:
    """(height, width) of a frame in pixels."""
    if isinstance(frame, PIL.Image.Image):
        return frame.height, frame.width
    return frame.shape[-2], frame.shape[-1]


def to_pil(frame: Frame) -> PIL.Image.Image:
    """Frame as a PIL image; float values are rounded to 8 bit."""
    if isinstance(frame, PIL.Image.Image):
        return frame
    return PIL.Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


def model_size(
    own_height: int,
    own_width: int,
    resolution: int,
    factor: int,
    height: int | None = None,
    width: int | None = None,
) -> tuple[int, int]:
    """(height, width) at which the model sees a frame: its own area, the frame's aspect, multiples of the VAE factor.

    Args:
        own_height, own_width: of the frame, pixels.
        resolution: side of the square whose area the model was trained at, pixels.
        factor: pixels per latent cell.
        height, width: asked for instead; one alone keeps the aspect.
    """
    scale = resolution / math.sqrt(own_height * own_width)
    if width is not None:
        scale = width / own_width
    if height is not None:
        scale = height / own_height
    return (
        height or max(1, round(own_height * scale / factor)) * factor,
        width or max(1, round(own_width * scale / factor)) * factor,
    )


def to_model_input(frame: Frame, height: int, width: int) -> torch.Tensor:
    """Frame resized to (height, width) as a float32 tensor (3, H, W) in [-1, 1]."""
    if isinstance(frame, PIL.Image.Image):
        if frame.size != (width, height):
            frame = frame.resize((width, height), PIL.Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(frame)).permute(2, 0, 1).float() / 127.5 - 1
    return resize(frame[None], height, width)[0] * 2 - 1


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] resized to (B, 3, height, width), clamped to [0, 1]."""
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def from_model_output(images: torch.Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> list[torch.Tensor]:
    """Decoded images (B, 3, H, W) in [-1, 1], clamped, as B tensors (3, H, W) float32 in [0, 1].

    Args:
        images: (B, 3, H, W) float.
        sizes: B pairs (height, width) to which they are resized, or None to leave them.
    """
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    return [
        image if size is None else resize(image[None], *size)[0]
        for image, size in zip(images, sizes or [None] * len(images), strict=True)
    ]


def convert(
    images: Sequence[torch.Tensor], output_type: str
) -> Sequence[PIL.Image.Image] | Sequence[np.ndarray] | Sequence[torch.Tensor]:
    """Images (3, H, W) in [0, 1] as "pil", "np" (H, W, 3) or "pt" (3, H, W), the last two float32."""
    if output_type == "pt":
        return images
    if output_type == "np":
        return [image.permute(1, 2, 0).cpu().numpy() for image in images]
    return [to_pil(image) for image in images]


def warn_of_enlargement(
    frame_sizes: Sequence[tuple[int, int]], model_sizes: Sequence[tuple[int, int]], is_resized_back: bool
) -> None:
    """One warning when a frame has to grow more than twofold on its way to the model, or the result on its way back.

    Args:
        frame_sizes, model_sizes: (height, width) of each frame, its own and the model's.
        is_resized_back: whether results are given the frame's size.
    """
    for (height, width), (model_height, model_width) in zip(frame_sizes, model_sizes, strict=True):
        ratio = math.sqrt(model_height * model_width / (height * width))
        own, model = f"{width}x{height}", f"{model_width}x{model_height}"
        if ratio > LARGEST_ENLARGEMENT:
            message = f"The frame is enlarged from {own} to {model} pixels for the model; pass a larger frame"
        elif is_resized_back and 1 / ratio > LARGEST_ENLARGEMENT:
            message = (
                f"The result is enlarged from {model} to {own} pixels, the frame's size; "
                'pass `output_size="model"` to leave it as it is'
            )
        else:
            continue
        warnings.warn(f"{message}. More than {LARGEST_ENLARGEMENT:g} times is blurred.", stacklevel=3)
        return


def stack_images(images: Sequence[Any], output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
    """Images of a batch as one value: a list of PIL images, an array (B, H, W, 3), or a tensor (B, c, h, w).

    Raises:
        ValueError: arrays or tensors of different sizes.
    """
    if output_type == "pil":
        return list(images)
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) > 1:
        raise ValueError(different_sizes(output_type, [str(size) for size in sizes]))
    return np.stack(images) if output_type == "np" else torch.stack(list(images))


def different_sizes(output_type: str, sizes: Sequence[str]) -> str:
    """Message for results that one array or tensor can't hold."""
    return (
        f'`output_type="{output_type}"` must give images of one size, got {", ".join(sizes)}; '
        'pass `output_type="pil"`, `height` and `width` with `output_size="model"`, or one call per size.'
    )


def _array_frames(array: np.ndarray) -> list[Frame]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            "`image` as an array must be (H, W), (H, W, 1 | 3 | 4) or (B, H, W, 1 | 3 | 4), "
            f"got {array.shape} of {array.dtype}; move the channels to the end."
        )
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    if array.dtype == np.uint8:
        return [to_rgb(PIL.Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)) for item in array]
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"`image` as an array must be uint8, uint16 or float in [0, 1], got {array.dtype}; cast it.")
    values = torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2)
    if values.shape[1] == 4:
        values = values[:, :3] * values[:, 3:] + (1 - values[:, 3:])  # on white
    return _checked(values.expand(-1, 3, -1, -1))


def _tensor_frames(tensor: torch.Tensor) -> list[Frame]:
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[1] != 3 or 0 in tensor.shape:
        raise ValueError(
            "`image` as a tensor must be (3, H, W) or (B, 3, H, W), "
            f"got {tuple(tensor.shape)} of {tensor.dtype}; permute or convert it to RGB."
        )
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.uint8:
        return [PIL.Image.fromarray(item.permute(1, 2, 0).contiguous().numpy()) for item in tensor]
    if not tensor.is_floating_point():
        raise ValueError(f"`image` as a tensor must be uint8 or float in [0, 1], got {tensor.dtype}; convert it.")
    return _checked(tensor.float())


def _checked(values: torch.Tensor) -> list[Frame]:
    """Frames of a float batch (B, 3, H, W) whose values are finite and in [0, 1]."""
    if not values.isfinite().all():
        raise ValueError(f"`image` must be finite, got {int((~values.isfinite()).sum())} NaN or infinite values.")
    low, high = values.min().item(), values.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"`image` of floats must be in [0, 1], got [{low:.4g}, {high:.4g}]; "
            "divide values up to 255 by 255, map values in [-1, 1] by (x + 1) / 2."
        )
    return list(values)
