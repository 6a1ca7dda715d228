"""Small videos for the tests: every frame tells its number, and files are damaged or turned by editing their bytes."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image

WIDTH, HEIGHT = 64, 48  # pixels


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W, 3) frame that shows its number as eight black or white bars, lowest bit first."""
    bits = [(number >> bit & 1) * 255 for bit in range(8)]
    row = np.repeat(np.array(bits, np.uint8), width // 8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number_of(image: PIL.Image.Image) -> int:
    """The number that a decoded frame shows."""
    row = np.asarray(image.convert("L"), float).mean(0).reshape(8, -1).mean(1)
    return sum(1 << bit for bit, value in enumerate(row) if value > 127)


def textured(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W, 3) frame of coloured squares."""
    squares = np.random.default_rng(seed).integers(30, 226, (height // 8, width // 8, 3), np.uint8)
    return squares.repeat(8, 0).repeat(8, 1)


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    pts: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 30),
    pixels: str = "yuv420p",
    container_options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    **options: str,
) -> Path:
    """Encodes frames as H.264, frame i at `pts[i] * time_base` seconds, a key frame every 8 frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream: Any = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        stream.codec_context.time_base = time_base
        stream.thread_count = 1
        stream.options = {"crf": "12", "g": "8", "bf": "2", **options}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, pixels_of in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of, format="rgb24")
            frame.pts, frame.time_base = (i if pts is None else pts[i]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def patch(path: Path, box: bytes, offset: int, values: bytes) -> None:
    """Overwrites bytes of an MP4 box, `offset` bytes behind its name."""
    content = bytearray(path.read_bytes())
    start = content.index(box) + 4 + offset
    content[start : start + len(values)] = values
    path.write_bytes(bytes(content))


def turn(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Sets an MP4's display matrix (ISO/IEC 14496-12, `tkhd` version 0)."""
    patch(path, b"tkhd", 40, struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30))


def cut(path: Path, share: float) -> None:
    """Leaves the first share of a file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
