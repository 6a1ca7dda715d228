"""The pair of frames of an annotated action, or the reason why there is none.

Around each of the two times the sharpest frame is taken that is neither black nor blank (`measures`). Then what makes
a pair useless is looked for in a fixed order; the first reason found is the one that counts, so every action has
exactly one fate and the counts add up. The paper names blurred frames and the band of similarities; the other reasons
are what real annotations and files hold.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from lego_pipeline.curation.actions import Action
from lego_pipeline.curation.boxes import Box, BoxSource, annotated_boxes
from lego_pipeline.curation.measures import difference, grey, sharpness
from lego_pipeline.curation.similarity import Similarity
from lego_pipeline.curation.video import SUFFIXES, Still, Video, VideoError

REASONS = {
    "no label": "the annotation says nothing about what is done",
    "another person": "the narration is about somebody else (Ego4D)",
    "rejected annotation": "its annotators rejected it, or the stretch is redacted",
    "bad times": "start and stop, or the critical frames, are missing or out of order",
    "no critical frame": "a wanted critical frame is not annotated (Ego4D)",
    "starts too early": "the video has nothing before the action to take an input frame from",
    "missing video": "there is no such file",
    "unreadable video": "the file can't be opened, or nothing in it can be decoded",
    "truncated video": "the file breaks off before the action, though its header promises more",
    "outside the video": "the annotated time lies after the end of the video",
    "gap in the video": "no frame is shown at the annotated time, though later ones are",
    "black frame": "input or target is black, or of a single colour",
    "frozen video": "the picture stands still",
    "blurred frame": "not even the sharpest frame around the time is sharp enough",
    "no hands": "hands were looked for in the target frame, and there are none",
    "too different": "input and target are less alike than the band allows: the view has changed",
    "too similar": "input and target are more alike than the band allows: nothing has happened",
    "near duplicate": "an earlier pair of this video and action shows the same moments or looks the same",
}
FROZEN = 0.2  # grey levels (of 255) by which frames differ on average while the picture stands still
SAME = 2.0  # the same for frames of two pairs that count as one, at THUMBNAIL pixels
THUMBNAIL = 64  # pixels
PICTURE = 160  # pixels of the shorter side of an outcome's pictures: 50 actions of full frames would fill a gigabyte


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a pair must be like.

    Attributes:
        window_seconds: candidates lie at most this far from a wanted time, on both sides.
        min_sharpness: see `measures`.
        min_brightness, min_contrast: mean and standard deviation of grey values (of 255) below which a frame is
            black or blank.
        require_hands: a target frame whose hands were looked for must have one.
        size: pixels of the stored frames' shorter side, larger frames are reduced; 0 keeps every size.
    """

    window_seconds: float = 0.1
    min_sharpness: float = 0.03
    min_brightness: float = 16.0
    min_contrast: float = 4.0
    require_hands: bool = True
    size: int = 256


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an action.

    Attributes:
        action: as annotated.
        reason: a key of `REASONS`; None for a pair that is kept.
        detail: the measured value or message behind it.
        row: of the manifest, with PIL images; of a kept pair only.
        pictures: the frames that were looked at, input first, as far as it came, reduced to `PICTURE` pixels.
    """

    action: Action
    reason: str | None
    detail: str = ""
    row: dict[str, Any] | None = None
    pictures: tuple[PIL.Image.Image, ...] = ()


class Dropped(Exception):
    """An action has no pair."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass
class _Pair:
    """What is found of an action's pair, one step after another."""

    stills: list[Still] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    greys: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _Shown:
    """What the row of a kept pair shows, for comparing later ones of the video."""

    times: tuple[float, ...]  # seconds on the stream's clock, exact: those of a manifest that was read are rounded
    thumbnails: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _Shown:
        times = tuple(float(row[f"pts_{k}"] * Fraction(row["time_base"])) for k in (0, 1))
        return cls(times, tuple(grey(row[f"image_{k}"], THUMBNAIL) for k in (0, 1)))

    def repeats(self, other: _Shown, seconds: float) -> bool:
        """Whether both frames lie within so many seconds of the other's, or both look the same."""
        is_near = all(abs(a - b) <= seconds for a, b in zip(self.times, other.times, strict=True))
        pairs = zip(self.thumbnails, other.thumbnails, strict=True)
        return is_near or all(difference(a, b) <= SAME for a, b in pairs)


def find_videos(folder: Path) -> dict[str, Path]:
    """Video files below a folder by their names without suffix.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two files have one name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`videos` must be a folder, found none at {folder}; check the path.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(
                    f"`videos` must have one file for a name, got {found[path.stem]} and {path}; name a folder that "
                    "holds one of them."
                )
            found[path.stem] = path
    return found


def curate(
    actions: Iterable[Action],
    videos: dict[str, Path],
    rules: Rules,
    similarity: Similarity,
    boxes: BoxSource = annotated_boxes,
    earlier: Iterable[Mapping[str, Any]] = (),
) -> Iterator[Outcome]:
    """What becomes of actions, in their order; give those of a video one after another, it is opened once.

    Args:
        actions: see `lego_pipeline.curation.readers.read_actions`.
        videos: files by name, see `find_videos`.
        rules: what a pair must be like.
        similarity: of the two frames.
        boxes: where boxes come from.
        earlier: rows of pairs that were kept before, with PIL images; what repeats them is a near duplicate.
    """
    kept: dict[tuple[str, str], list[_Shown]] = defaultdict(list)
    for row in earlier:
        kept[row["video"], row["action"]].append(_Shown.of(row))
    video: Video | VideoError | None = None
    name = None
    try:
        for action in actions:
            if action.reason is not None:
                yield Outcome(action=action, reason=action.reason, detail=action.detail)
                continue
            if action.video != name:
                if isinstance(video, Video):
                    video.close()
                video, name = _open(videos, action.video), action.video
            pair = _Pair()
            try:
                if isinstance(video, VideoError):
                    raise video
                assert video is not None
                row = _find_pair(action, video, rules, similarity, boxes, pair)
                shown, before = _Shown.of(row), kept[action.video, action.action]
                if any(shown.repeats(one, 2 * rules.window_seconds) for one in before):
                    detail = f"input at {row['time_0']:.3f} s, target at {row['time_1']:.3f} s"
                    raise Dropped("near duplicate", detail)
                before.append(shown)
            except (Dropped, VideoError) as drop:
                pictures = tuple(reduced(still.image, PICTURE) for still in pair.stills)
                yield Outcome(action=action, reason=drop.reason, detail=str(drop), pictures=pictures)
            else:
                pictures = tuple(reduced(row[name], PICTURE) for name in ("image_0", "image_1"))
                yield Outcome(action=action, reason=None, row=row, pictures=pictures)
    finally:
        if isinstance(video, Video):
            video.close()


def _open(videos: dict[str, Path], name: str) -> Video | VideoError:
    try:
        if name not in videos:
            raise VideoError("missing video", f"there is no video {name}")
        return Video(videos[name])
    except VideoError as error:
        return error


def _find_pair(
    action: Action, video: Video, rules: Rules, similarity: Similarity, boxes: BoxSource, pair: _Pair
) -> dict[str, Any]:
    """The manifest's row of an action; what is found on the way is left in `pair`.

    Raises:
        Dropped, VideoError: there is none.
    """
    assert action.time_0 is not None and action.time_1 is not None
    # The two spans may not overlap: the target's sharpest frame could lie before the input's.
    around = min(rules.window_seconds, (action.time_1 - action.time_0) / 2)
    for role, time in (("input", action.time_0), ("target", action.time_1)):
        _pick(role, video.window(max(time - around, 0.0), time + around), rules, pair)
    if difference(*pair.greys) < FROZEN:
        raise Dropped("frozen video", f"input and target differ by {difference(*pair.greys):.2f} grey levels")
    for role, value in zip(("input", "target"), pair.sharpness, strict=True):
        if value < rules.min_sharpness:
            raise Dropped(
                "blurred frame", f"{role} has a sharpness of {value:.4f}, {rules.min_sharpness} is asked for"
            )
    first, second = pair.stills
    found = [boxes(action, still.time) for still in pair.stills]
    if rules.require_hands and found[1] is not None and not any(is_hand(box) for box in found[1]):
        names = ", ".join(box["name"] for box in found[1]) or "nothing"
        raise Dropped("no hands", f"in the target frame there is {names}")
    value = similarity(first.image, second.image)
    low, high = similarity.band
    if not low <= value <= high:
        reason = "too different" if value < low else "too similar"
        raise Dropped(reason, f"a similarity of {value:.4f} by {similarity.name}, {low} to {high} is asked for")
    return {
        "id": action.id,
        "image_0": reduced(first.image, rules.size),
        "image_1": reduced(second.image, rules.size),
        "action": action.action,
        "verb": action.verb,
        "noun": action.noun,
        "slots": dict(action.facts),
        "boxes_0": _listed(found[0]),
        "boxes_1": _listed(found[1]),
        "video": action.video,
        "time_0": first.time,
        "time_1": second.time,
        "split": action.split,
        "source": action.source,
        "licence": action.licence,
        "pts_0": first.pts,
        "pts_1": second.pts,
        "time_base": video.time_base,
        "sharpness_0": round(pair.sharpness[0], 4),
        "sharpness_1": round(pair.sharpness[1], 4),
        "similarity": value,
        "similarity_by": similarity.name,
    }


def _pick(role: str, candidates: list[Still], rules: Rules, pair: _Pair) -> None:
    """Adds the sharpest of the candidates that are neither black nor blank to the pair."""
    greys = [grey(still.image) for still in candidates]
    lit = [
        i
        for i, values in enumerate(greys)
        if values.mean() >= rules.min_brightness and values.std() >= rules.min_contrast
    ]
    values = [sharpness(greys[i]) for i in lit]
    best = lit[int(np.argmax(values))] if lit else 0
    pair.stills.append(candidates[best])
    pair.greys.append(greys[best])
    pair.sharpness.append(max(values, default=0.0))
    if not lit:
        mean, spread = float(greys[0].mean()), float(greys[0].std())
        raise Dropped("black frame", f"{role} has a brightness of {mean:.1f} and a contrast of {spread:.1f} of 255")
    changes = [difference(first, second) for first, second in zip(greys, greys[1:], strict=False)]
    if changes and max(changes) < FROZEN:
        detail = f"{len(greys)} frames around the {role} differ by {max(changes):.2f} grey levels"
        raise Dropped("frozen video", detail)


def is_hand(box: Box) -> bool:
    """Whether a box is that of a hand: "hand_left", "left hand", "hand"."""
    return re.search(r"(?<![a-z])hands?(?![a-z])", box["name"].lower()) is not None


def reduced(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The frame with a shorter side of at most `size` pixels; 0 leaves it."""
    shorter = min(image.size)
    if not size or shorter <= size:
        return image
    width, height = (max(1, round(side * size / shorter)) for side in image.size)
    return image.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _listed(boxes: tuple[Box, ...] | None) -> list[dict[str, Any]] | None:
    return None if boxes is None else [dict(box) for box in boxes]
