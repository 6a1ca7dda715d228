"""What a metric is: frames and samples in, one number for each sample or one for a set out.

Letters: N frames, D width of a feature.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import PIL.Image

from lego_pipeline.data.shards import content_key, pixel_key
from lego_pipeline.images import read_image, to_rgb

Source: TypeAlias = Path | bytes | PIL.Image.Image
Parity: TypeAlias = Literal["paper"] | None


class Frame:
    """One picture and the input frame that it starts from, read only when they are asked for, each time anew.

    Args:
        image: path or bytes of an image file, or a picture in memory.
        start: likewise of the input frame, None if it is not known.
    """

    def __init__(self, image: Source, start: Source | None = None):
        self._image, self._start = image, start

    @property
    def image(self) -> PIL.Image.Image:
        """Upright 8-bit RGB.

        Raises:
            FileNotFoundError, ValueError: see `lego_pipeline.images.read_image`.
        """
        return _read(self._image)

    @property
    def start(self) -> PIL.Image.Image | None:
        """The input frame, likewise; None if it is not known."""
        return None if self._start is None else _read(self._start)

    @cached_property
    def digest(self) -> str:
        """Of the picture's file, or of the pixels of one in memory; nothing is decoded for it."""
        return _digest(self._image)

    @cached_property
    def start_digest(self) -> str | None:
        """Of the input frame, likewise."""
        return None if self._start is None else _digest(self._start)


@dataclass(frozen=True)
class Sample:
    """What is known about a generated frame.

    Attributes:
        id: of the manifest row.
        action: the asked one.
        verb, noun: of the action, None if not known.
        description: reference text of the action frame (the manifest's).
        prompt: the text that the generator was given, for `parity="paper"`, which compares captions with that.
        boxes_0, boxes_1: of hands and objects in input and target frame, as the manifest has them.
    """

    id: str
    action: str
    verb: str | None = None
    noun: str | None = None
    description: str | None = None
    prompt: str | None = None
    boxes_0: Sequence[Mapping[str, Any]] = ()
    boxes_1: Sequence[Mapping[str, Any]] = ()


class _Described(Protocol):
    """What every metric says about itself.

    Attributes:
        name: key in `METRICS`.
        title: for the head of a table's column.
        higher_is_better: direction.
        unit: "%", "dB" or "".
        definition: one sentence: what is computed, and in which mode.
        reads: of "target", "start", "action" and "description" what a score depends on beside the generated frame.
            A metric that reads action or description can be asked about another action by changed samples.
        weights: digest of each weight file or folder that it uses, by name; empty if it uses none.
    """

    name: str
    title: str
    higher_is_better: bool
    unit: str
    definition: str
    reads: tuple[str, ...]
    weights: Mapping[str, str]

    def features(self, frames: Sequence[Frame]) -> np.ndarray | None:
        """(N, D) float32 of N frames, from the cache where it has them; None if the metric has no features."""
        ...


@runtime_checkable
class SampleMetric(_Described, Protocol):
    """One number for each sample; the table's value is their mean."""

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        """(N,) float64 in `unit`. NaN where a sample has no answer (say, no hand in the true frame).

        Args:
            generated: N frames, with `start` where the metric reads it.
            target: N true frames, with the same `start`. May be the generated ones where `reads` lacks "target".
            samples: N.

        Raises:
            ValueError: something that the metric reads isn't there.
        """
        ...


@runtime_checkable
class SetMetric(_Described, Protocol):
    """One number for a set of frames against another set."""

    def distance(self, generated: np.ndarray, target: np.ndarray) -> float:
        """Of two sets of features (N, D), as `features` gives them; the sets may differ in N."""
        ...


Metric: TypeAlias = SampleMetric | SetMetric


def metric_key(metric: Metric) -> str:
    """32 hex digits for a metric, its mode and its weights: scores of one key can be compared."""
    return content_key(metric.name, metric.definition, dict(metric.weights))


@dataclass(frozen=True)
class Missing:
    """A metric that can't be computed here.

    Attributes:
        name: of the metric.
        needs: what is not there: a weight file by its usual name, or a package.
        how_to_get: one sentence, with the argument to pass.
    """

    name: str
    needs: str
    how_to_get: str


def _read(source: Source) -> PIL.Image.Image:
    if isinstance(source, Path):
        return read_image(source)
    if isinstance(source, PIL.Image.Image):
        return to_rgb(source)
    try:
        with PIL.Image.open(io.BytesIO(source)) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"a frame must be an image that can be read, got: {error}; put it in again.") from error


def _digest(source: Source) -> str:
    if isinstance(source, PIL.Image.Image):
        return pixel_key(source)
    data = source.read_bytes() if isinstance(source, Path) else source
    return hashlib.sha256(data).hexdigest()[:32]
