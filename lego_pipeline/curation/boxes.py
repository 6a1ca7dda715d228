"""Boxes of hands and objects at the time of a frame, from what the data sets publish.

Three sources: the annotation itself (Ego4D FHO, or the `boxes` column of a table), EPIC-KITCHENS' hand-object
detections (`<video>.pkl`), VISOR (`<video>.json`). Edges are fractions of the frame. A source answers with a tuple of
boxes, empty if it saw none, or with None if it says nothing about that time.

The detections are a pickle around protobuf messages. The pickle is read by an unpickler that resolves no name, so a
file can make lists, bytes and numbers and nothing else; the messages are read by their wire format.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lego_pipeline.curation.actions import Action, Box, Moment, clipped_box
from lego_pipeline.curation.epic import jpeg_time

BoxSource = Callable[[Action, float], "tuple[Box, ...] | None"]

TOLERANCE = 0.25  # seconds between a frame and the annotated moment that its boxes are taken from
SCORE = 0.5  # what the detections' authors advise, for hands and objects; the files go down to 0.1 and 0.01
HAND_NAMES = ("hand_left", "hand_right")
SPARSE_SIZE, DENSE_SIZE = (1920, 1080), (854, 480)  # pixels in which VISOR's polygons are drawn
MAPPING = "frame_mapping.json"  # of VISOR: its frames were extracted anew and have other numbers than EPIC's


def annotated_boxes(action: Action, time: float, tolerance: float = TOLERANCE) -> tuple[Box, ...] | None:
    """Boxes of the annotated moment nearest to a time, None if there is none within the tolerance (seconds)."""
    return _nearest(action.moments, time, tolerance)


def open_boxes(folder: Path | None, tolerance: float = TOLERANCE) -> BoxSource:
    """The source of boxes for a folder of files, or the annotations themselves.

    Args:
        folder: of `<video>.pkl` or of VISOR's `<video>.json` with its frame_mapping.json, subfolders included; None
            takes the boxes that the annotations have.
        tolerance: seconds between a frame and the annotated moment.

    Raises:
        FileNotFoundError: the folder holds neither, or VISOR's files without their mapping.
    """
    if folder is None:
        return lambda action, time: annotated_boxes(action, time, tolerance)
    detections = {path.stem: path for path in sorted(folder.rglob("*.pkl"))}
    masks = {path.stem: path for path in sorted(folder.rglob("*.json")) if path.name != MAPPING}
    if bool(detections) == bool(masks):
        raise FileNotFoundError(
            f"`boxes` must be a folder of either <video>.pkl (EPIC hand-object detections) or <video>.json (VISOR), "
            f"{folder} has {len(detections)} and {len(masks)}; check the path."
        )
    if detections:
        return _PerVideo(detections, read_detections, tolerance, detected_boxes)
    mappings = sorted(folder.rglob(MAPPING))
    if not mappings:
        raise FileNotFoundError(f"`boxes` must have VISOR's {MAPPING}, found none in {folder}; download it too.")
    mapping = json.loads(mappings[0].read_text(encoding="utf-8"))
    return _PerVideo(masks, lambda path: read_visor(path, mapping.get(path.stem, {})), tolerance, tuple)


class _PerVideo:
    """Boxes of one file a video; the file of the latest video is kept, and only what is asked for is decoded."""

    def __init__(
        self,
        files: dict[str, Path],
        read: Callable[[Path], list[tuple[float, Any]]],
        tolerance: float,
        decode: Callable[[Any], tuple[Box, ...]],
    ):
        self.files, self.read, self.tolerance, self.decode = files, read, tolerance, decode
        self._video, self._moments = "", []

    def __call__(self, action: Action, time: float) -> tuple[Box, ...] | None:
        path = self.files.get(action.video)
        if path is None:
            return None
        if action.video != self._video:
            self._video, self._moments = action.video, self.read(path)
        found = _nearest(self._moments, time, self.tolerance)
        try:
            return None if found is None else self.decode(found)
        except (ValueError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: the boxes at {time:.2f} s must be readable, got: {error}.") from error


def _nearest(moments: Sequence[tuple[float, Any]], time: float, tolerance: float) -> Any:
    """What belongs to the moment nearest to a time, None if none is within the tolerance; moments are in order."""
    after = bisect_left(moments, time, key=lambda moment: moment[0])
    nearest = min(moments[max(after - 1, 0) : after + 1], key=lambda moment: abs(moment[0] - time), default=None)
    return nearest[1] if nearest is not None and abs(nearest[0] - time) <= tolerance else None


# --- VISOR -----------------------------------------------------------------------------------------------------------


def read_visor(path: Path, mapping: dict[str, str]) -> list[Moment]:
    """Boxes around VISOR's masks of hands (gloves too) and of what they touch.

    Args:
        path: `<video>.json`.
        mapping: VISOR's image names to those of EPIC's JPEG frames, of this video. Frames that it doesn't have (the
            interpolated ones of dense files) are left out.

    Raises:
        ValueError: the file is not of VISOR's layout.
    """
    try:
        frames = json.loads(path.read_text(encoding="utf-8"))["video_annotations"]
        moments = []
        for frame in frames:
            name = mapping.get(frame["image"]["name"].rsplit(".", 1)[0] + ".jpg")
            if name is None:
                continue
            number = int(re.findall(r"\d+", name)[-1])
            size = DENSE_SIZE if "interpolation" in frame["image"] else SPARSE_SIZE
            moments.append((jpeg_time(path.stem, number), _mask_boxes(frame["annotations"], size)))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} must be a file of VISOR, got {type(error).__name__}: {error}.") from error
    return sorted(moments, key=lambda moment: moment[0])


def _mask_boxes(annotations: list[dict[str, Any]], size: tuple[int, int]) -> tuple[Box, ...]:
    """Boxes of the hands and of the entities that a hand is in contact with."""
    touched = {entity.get("in_contact_object") for entity in annotations}
    boxes = []
    for entity in annotations:
        hand = re.fullmatch(r"(left|right) (hand|glove)", entity["name"])
        if hand is None and entity.get("id") not in touched:
            continue
        points = [point for polygon in entity["segments"] for point in polygon]
        if points:
            xs, ys = [x / size[0] for x, _ in points], [y / size[1] for _, y in points]
            name = f"hand_{hand[1]}" if hand else entity["name"]
            boxes.append(clipped_box(name, min(xs), min(ys), max(xs), max(ys)))
    return tuple(box for box in boxes if box is not None)


# --- EPIC hand-object detections -------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, bytes, texts and numbers; a file that names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no list of messages needs")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside the file")


def read_detections(path: Path) -> list[tuple[float, bytes]]:
    """Times and messages of EPIC-KITCHENS' hand-object detections, for `detected_boxes`.

    Layout: epic-kitchens/epic-kitchens-100-hand-object-bboxes, `types.proto`; frame numbers are those of the
    published JPEG frames.

    Raises:
        ValueError: the file is another pickle, or damaged.
    """
    try:
        messages = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(messages, list) or not all(isinstance(message, bytes) for message in messages):
            raise pickle.UnpicklingError("it holds no list of messages")
        moments = []
        for message in messages:
            number = next((value for field, value in wire_fields(message) if field == 2), 0)
            moments.append((jpeg_time(path.stem, max(number, 1)), message))
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        IndexError,
        AttributeError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ValueError(
            f"{path} must be a file of EPIC-KITCHENS' hand-object detections, got: {error}; download it again."
        ) from error
    return sorted(moments, key=lambda moment: moment[0])


def detected_boxes(message: bytes) -> tuple[Box, ...]:
    """Boxes of a message with a score of at least `SCORE`; objects have no class.

    A field that is zero is absent from the message: a left hand, a left edge at 0.
    """
    found = [_detected_box(value, field == 3) for field, value in wire_fields(message) if field in (3, 4)]
    return tuple(box for box in found if box is not None)


def _detected_box(message: bytes, is_hand: bool) -> Box | None:
    fields = dict(wire_fields(message))
    if fields.get(2, 0.0) < SCORE:
        return None
    edges = dict(wire_fields(fields.get(1, b"")))
    name = HAND_NAMES[fields.get(5, 0)] if is_hand else "object"
    return clipped_box(name, *(edges.get(edge, 0.0) for edge in (1, 2, 3, 4)))


def wire_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: varint as int, 32 bits as float, a length-delimited one as bytes.

    Source: protobuf.dev, "Encoding". Raises ValueError if the message breaks off or has another wire type.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if key & 7 == 0:
            value, position = _varint(message, position)
        elif key & 7 == 5:
            if position + 4 > len(message):
                raise ValueError("a message breaks off")
            (value,) = struct.unpack_from("<f", message, position)
            position += 4
        elif key & 7 == 2:
            length, position = _varint(message, position)
            if position + length > len(message):
                raise ValueError("a message breaks off")
            value, position = message[position : position + length], position + length
        else:
            raise ValueError(f"a message has the wire type {key & 7}")
        yield key >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError("a message breaks off")
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
