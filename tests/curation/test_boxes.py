"""Boxes are read from the data sets' published layouts; a pickle that names anything is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from lego_pipeline.curation.actions import Action
from lego_pipeline.curation.boxes import annotated_boxes, open_boxes, read_detections, wire_fields

ACTION = {"action": "open drawer", "source": "s", "licence": "l"}


def action(video: str = "P01_01", **changes: Any) -> Action:
    return Action(id="a", video=video, **ACTION, **changes)


def message_classes() -> dict[str, Any]:
    """The data set's messages as the protobuf library builds them from a schema."""
    file = descriptor_pb2.FileDescriptorProto(name="hands.proto", package="hands", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    layouts = {
        "Box": [("left", 1, kinds.TYPE_FLOAT), ("top", 2, kinds.TYPE_FLOAT), ("right", 3, kinds.TYPE_FLOAT)]
        + [("bottom", 4, kinds.TYPE_FLOAT)],
        "Hand": [("bbox", 1, "Box"), ("score", 2, kinds.TYPE_FLOAT), ("state", 3, kinds.TYPE_INT32)]
        + [("side", 5, kinds.TYPE_INT32)],
        "Thing": [("bbox", 1, "Box"), ("score", 2, kinds.TYPE_FLOAT)],
        "Detections": [("video_id", 1, kinds.TYPE_STRING), ("frame_number", 2, kinds.TYPE_INT32)]
        + [("hands", 3, "Hand"), ("objects", 4, "Thing")],
    }
    for name, fields in layouts.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            label = kinds.LABEL_REPEATED if field in ("hands", "objects") else kinds.LABEL_OPTIONAL
            made = message.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                made.type, made.type_name = kinds.TYPE_MESSAGE, f".hands.{kind}"
            else:
                made.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"hands.{name}")) for name in layouts}


def detections(folder: Path, video: str = "P01_01", protocol: int = 4) -> Path:
    """Frames 1 to 120; a left hand at the left edge from frame 61 on, a right one of low score, two objects."""
    made = message_classes()
    messages = []
    for number in range(1, 121):
        frame = made["Detections"](video_id=video, frame_number=number)
        if number > 60:
            frame.hands.add(bbox=made["Box"](left=0.0, top=0.5, right=0.25, bottom=1.0), score=0.9, state=3, side=0)
        frame.hands.add(bbox=made["Box"](left=0.5, top=0.5, right=0.75, bottom=1.0), score=0.2, side=1)
        frame.objects.add(bbox=made["Box"](left=0.5, top=0.25, right=0.75, bottom=0.5), score=0.6)
        frame.objects.add(bbox=made["Box"](left=0.1, top=0.1, right=0.2, bottom=0.2), score=0.02)
        messages.append(frame.SerializeToString())
    path = folder / f"{video}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(messages, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_hand_object_detections_are_read(tmp_path: Path, protocol: int) -> None:
    detections(tmp_path / "P01", protocol=protocol)
    boxes = open_boxes(tmp_path)
    thing = {"name": "object", "x0": 0.5, "y0": 0.25, "x1": 0.75, "y1": 0.5}
    assert boxes(action(), 0.5) == (thing,)
    assert boxes(action(), 1.5) == ({"name": "hand_left", "x0": 0.0, "y0": 0.5, "x1": 0.25, "y1": 1.0}, thing)
    assert boxes(action(), 9.0) is None
    assert boxes(action("P09_09"), 1.5) is None


def test_detections_of_the_extension_are_50_a_second(tmp_path: Path) -> None:
    moments = read_detections(detections(tmp_path, "P01_101"))
    assert [time for time, _ in moments[:3]] == [0.0, 0.02, 0.04]


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    "content", [[Evil()], [b"a", Path("x")], {"a": b""}, ["text"]], ids=["call", "class", "dict", "str"]
)
def test_another_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "P01_01.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(
        ValueError, match=r"P01_01.pkl must be a file of EPIC-KITCHENS' hand-object detections, got: it"
    ):
        open_boxes(tmp_path)(action(), 0.0)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = detections(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="P01_01.pkl must be a file of EPIC-KITCHENS'"):
        read_detections(path)
    path.write_bytes(b"\x80\x04\x95" + b"\xff" * 8)  # a frame longer than any memory
    with pytest.raises(ValueError, match="P01_01.pkl must be a file of EPIC-KITCHENS'"):
        read_detections(path)


@pytest.mark.parametrize(
    "message",
    [b"\x10\x01\x1a\x05\x0a\x09", b"\x10\x01\x1a\x09\x15\x00\x00\x80\x3f\x0a\x02\x0d\x00"],
    ids=["box", "edge"],
)
def test_a_message_that_is_longer_than_its_bytes_is_named(tmp_path: Path, message: bytes) -> None:
    (tmp_path / "P01_01.pkl").write_bytes(pickle.dumps([message]))
    with pytest.raises(ValueError, match="a message breaks off"):
        open_boxes(tmp_path)(action(), 0.0)


def test_the_wire_format_is_read() -> None:
    assert list(wire_fields(b"\x08\xac\x02\x12\x02hi\x1d\x00\x00\x80\x3f")) == [(1, 300), (2, b"hi"), (3, 1.0)]


def visor(folder: Path) -> None:
    square = [[[192, 108], [384, 108], [384, 540], [192, 540]]]
    annotations = [
        {"id": "h", "name": "right hand", "class_id": 301, "segments": square, "in_contact_object": "k"},
        {"id": "k", "name": "knife", "class_id": 4, "segments": [[[960, 540], [1920, 540], [1920, 1080]]]},
        {"id": "t", "name": "table", "class_id": 5, "segments": square},
    ]
    frames = [{"image": {"name": f"P01_01_frame_{i:010d}.jpg"}, "annotations": annotations} for i in (100, 200)]
    folder.mkdir(exist_ok=True)
    (folder / "P01_01.json").write_text(json.dumps({"video_annotations": frames}))


def test_visor_gives_hands_and_what_they_touch_at_the_mapped_time(tmp_path: Path) -> None:
    visor(tmp_path)
    mapping = {"P01_01": {"P01_01_frame_0000000100.jpg": "frame_0000000121.jpg"}}
    (tmp_path / "frame_mapping.json").write_text(json.dumps(mapping))
    boxes = open_boxes(tmp_path)
    assert boxes(action(), 2.0) == (
        {"name": "hand_right", "x0": 0.1, "y0": 0.1, "x1": 0.2, "y1": 0.5},
        {"name": "knife", "x0": 0.5, "y0": 0.5, "x1": 1.0, "y1": 1.0},
    )
    assert boxes(action(), 3.3) is None  # frame 200 is not in the mapping


def test_visor_without_its_mapping_is_refused(tmp_path: Path) -> None:
    visor(tmp_path)
    with pytest.raises(FileNotFoundError, match="must have VISOR's frame_mapping.json"):
        open_boxes(tmp_path)


def test_a_folder_without_boxes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has 0 and 0; check the path"):
        open_boxes(tmp_path)


def test_annotated_boxes_are_those_of_the_nearest_moment() -> None:
    box = {"name": "hand_left", "x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.5}
    known = action(moments=((1.0, ()), (2.0, (box,))))
    assert annotated_boxes(known, 1.1) == ()
    assert annotated_boxes(known, 1.9) == (box,)
    assert annotated_boxes(known, 1.5) is None
    assert annotated_boxes(known, 1.5, tolerance=0.6) is not None
    assert annotated_boxes(action(), 1.0) is None
