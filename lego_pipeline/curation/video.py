"""Frames of a video at exact times, whatever the file is like.

Frames are found by their timestamps, never by counting: with a variable frame rate, count / average rate was wrong by
0.2 s within 5.6 s. The clock of annotations starts at the first frame that is shown (in Ego4D that is the meaning of
`video_start_pts`); edit lists are applied by FFmpeg before. Frames come out as they are to be looked at: the display
matrix (rotation, mirror) is applied, pixels are made square, every pixel format becomes 8-bit RGB by the colour space
that the file names. HDR is not tone-mapped, interlaced frames are not taken apart.

What a header says about length is no evidence: a file that was cut off still claims all its frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".3gp")
SLACK = 1e-3  # seconds by which times may miss the edges of a window: Matroska rounds to milliseconds
SEEK_MARGIN = 0.5  # seconds; doubled while the decoder starts too late
LINGER = 0.1  # seconds for which a frame counts as shown where no other follows; then it is a gap, or the end


class VideoError(Exception):
    """A frame can't be had.

    Attributes:
        reason: a key of `lego_pipeline.curation.frames.REASONS`.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Still:
    """A decoded frame.

    Attributes:
        time: seconds after the video's first frame.
        pts: presentation timestamp in the stream's `time_base`.
        image: upright RGB.
    """

    time: float
    pts: int
    image: PIL.Image.Image


class Video:
    """A video file opened for reading windows of time; use it as a context manager.

    Decoding runs on one thread, so that a damaged file gives the same frames every time; processes share the videos.

    Args:
        path: of the file.

    Attributes:
        time_base: seconds of a tick of the timestamps, as a fraction in text ("1/15360").
        is_turned: whether a display matrix is applied.

    Raises:
        VideoError: "missing video" or "unreadable video".
        ImportError: PyAV is not installed.
    """

    def __init__(self, path: Path):
        try:
            import av
        except ImportError as error:
            raise ImportError('curation decodes with PyAV; run `pip install "lego-pipeline[train]"`.') from error
        if not path.is_file():
            raise VideoError("missing video", f"there is no {path.name}")
        self.path, self.is_turned = path, False
        self._av = av
        self._container: Any = None
        self._open()
        try:
            first = next(self._decode())
        except (StopIteration, VideoError, av.error.FFmpegError) as error:
            self.close()
            raise VideoError("unreadable video", f"no frame of {path.name} can be decoded ({error})") from error
        self._first = first.pts
        self._last = 0.0  # latest time that was decoded, seconds

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def window(self, start: float, stop: float) -> list[Still]:
        """All frames that appear from `start` to `stop`, in order; if none does, the one that is shown at `start`.

        Damaged frames are left out. A frame is shown for at most `LINGER` seconds.

        Args:
            start, stop: seconds after the first frame.

        Raises:
            VideoError: "outside the video", "truncated video" (it ends or breaks before, though its header promises
                more), or "gap in the video" (no frame in this span, but later ones).
        """
        stills: list[Still] = []
        before, goes_on, broken = None, False, ""
        try:
            for frame in self._from(start - SLACK):
                time = self._time(frame)
                self._last = max(self._last, time)
                goes_on = time > stop + SLACK
                if goes_on:
                    break
                if not frame.is_corrupt and time >= start - SLACK:
                    stills.append(self._still(frame))
                elif not frame.is_corrupt:
                    before = frame
            if not stills and before is not None and start - self._time(before) <= LINGER:
                stills.append(self._still(before))
        except self._av.error.FFmpegError as error:
            broken = f" ({error.strerror or error})"
        if stills:
            return stills
        if goes_on:
            raise VideoError("gap in the video", f"no frame from {start:.3f} to {stop:.3f} s")
        end = self._promised_end()
        if broken or start <= end:
            detail = f"{start:.3f} s is wanted, the header promises {end:.3f}, the last good frame seen is at"
            raise VideoError("truncated video", f"{detail} {self._last:.3f} s{broken}")
        raise VideoError("outside the video", f"{start:.3f} s is wanted, the video ends at {end:.3f} s")

    def _open(self) -> None:
        from av.stream import Disposition

        self.close()
        try:
            self._container = self._av.open(str(self.path))
        except self._av.error.FFmpegError as error:
            raise VideoError("unreadable video", f"{self.path.name}: {error.strerror or error}") from error
        streams = [
            stream
            for stream in self._container.streams.video
            if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
        ]
        if not streams:
            self.close()
            raise VideoError("unreadable video", f"{self.path.name} has no video stream that can be decoded")
        stream: Any = max(streams, key=lambda stream: stream.width * stream.height)  # beside previews
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        self._stream = stream
        self.time_base = str(stream.time_base)

    def _decode(self) -> Iterator[Any]:
        """Frames with a timestamp from where the container stands."""
        for frame in self._container.decode(self._stream):
            if frame.pts is not None:
                yield frame

    def _from(self, start: float) -> Iterator[Any]:
        """Frames from one at or before `start`, so that none after it is missed."""
        margin = 0.0
        while start - margin > 0:
            self._seek(start - margin)
            frames = self._decode()
            first = next(frames, None)
            if first is not None and self._time(first) <= start:
                yield first
                yield from frames
                return
            margin = max(2 * margin, SEEK_MARGIN)  # a file without a good index, or nothing left to decode
        self._open()
        yield from self._decode()

    def _seek(self, time: float) -> None:
        """Goes to the key frame at or before a time, or to the start of a file that can't be searched."""
        try:
            self._container.seek(self._first + int(time / self._stream.time_base), stream=self._stream)
        except self._av.error.FFmpegError:
            self._open()

    def _time(self, frame: Any) -> float:
        return float((frame.pts - self._first) * frame.time_base)

    def _promised_end(self) -> float:
        """Seconds after the first frame at which the video ends by its header."""
        start = self._first * self._stream.time_base
        ends = [0.0]
        if self._stream.duration:
            ends.append(
                float(((self._stream.start_time or 0) + self._stream.duration) * self._stream.time_base - start)
            )
        elif self._container.duration:
            ends.append(
                ((self._container.start_time or 0) + self._container.duration) / self._av.time_base - float(start)
            )
        return max(ends)

    def _still(self, frame: Any) -> Still:
        return Still(self._time(frame), frame.pts, self._image(frame))

    def _image(self, frame: Any) -> PIL.Image.Image:
        pixels = frame.to_ndarray(format="rgb24")  # (H, W, 3) uint8
        aspect = self._stream.sample_aspect_ratio
        image = PIL.Image.fromarray(pixels)
        if aspect and aspect != 1:
            image = image.resize((round(image.width * aspect), image.height), PIL.Image.Resampling.BICUBIC)
        matrix = _display_matrix(frame)
        if matrix is not None:
            self.is_turned = True
            image = PIL.Image.fromarray(upright(np.asarray(image), matrix))
        return image


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of the frame's display matrix, or None if there is none or it changes nothing.

    16.16 fixed point in the order a, b, u, c, d, v, x, y, w; x' = a x + c y, y' = b x + d y (ISO/IEC 14496-12, 6.2.2).
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    return None if a > 0 and d > 0 and abs(b) < a else (a, b, c, d)


def upright(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Pixels (H, W, 3) under a display matrix, taken to the nearest quarter turn and mirror image."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        pixels = pixels.transpose(1, 0, 2)
        mirror_x, mirror_y = c < 0, b < 0
    else:
        mirror_x, mirror_y = a < 0, d < 0
    return np.ascontiguousarray(pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])
