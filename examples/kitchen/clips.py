"""Render the kitchen as short videos with annotation files, for the curation of `train/curate_frames.py` to work on.

    python -m examples.kitchen.clips --clips 20 --out DIR --spoilt 0.3

writes `DIR/videos/P01_01.mp4`, ... (H.264; one action of 2.4 s each) and the same annotations in three layouts:
`annotations.csv` (a plain table), `EPIC_100_train.csv` (EPIC-KITCHENS-100) and `fho_main.json` (Ego4D FHO).
`--spoilt 0.3` plants a defect in three of ten clips; `planted.json` says which. The same command again goes on where
it was stopped. One core renders a clip of 128 pixels in about 4 s.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from lego_pipeline.atomic import write_atomically, write_text
from lego_pipeline.config import run
from lego_pipeline.curation.similarity import COLOUR_BAND, colour_similarity

# Seconds: hands rest, reach from START on, carry from GRASP on, have done it at HEIGHT and hold it until STOP.
START, GRASP, HEIGHT, STOP, END = 0.8, 1.2, 1.6, 2.3, 2.4
INPUT = 0.5  # about when input frames are looked for
FAR = COLOUR_BAND[0] - 0.03  # similarity of kitchens that are surely told apart
DRAWS = 200  # kitchens that are looked at for one as different
EGO4D_RATE = 30  # frames a second by which its annotations count
DEFECTS = (
    "black frame",
    "blurred frame",
    "frozen video",
    "too similar",
    "too different",
    "no hands",
    "near duplicate",
    "bad times",
    "starts too early",
    "outside the video",
    "truncated video",
    "unreadable video",
    "missing video",
    "no label",
)


@dataclass(kw_only=True)
class ClipsConfig:
    clips: int  # number of clips
    out: Path  # folder of the videos and annotations
    split: Literal["train", "val", "test"] = "train"  # settled seed, kitchens and actions
    size: int = 128  # pixels along a side, even
    rate: int = 12  # frames a second
    spoilt: float = 0.0  # share of clips with a planted defect

    def __post_init__(self):
        if not 1 <= self.clips <= 9000:
            raise ValueError(f"`clips` must be 1 to 9000, got {self.clips}.")
        if self.size % 2 or not 32 <= self.size <= 1024:
            raise ValueError(f"`size` must be an even number from 32 to 1024, got {self.size}.")
        if not 5 <= self.rate <= 60:
            raise ValueError(f"`rate` must be 5 to 60 frames a second, got {self.rate}.")
        if not 0 <= self.spoilt <= 1:
            raise ValueError(f"`spoilt` must be a share from 0 to 1, got {self.spoilt}.")


@dataclass
class Clip:
    """A rendered clip: F frames and what is known about them."""

    video: str
    frames: list[np.ndarray]  # F of (size, size, 3) uint8
    boxes: list[dict[str, list[float]]]  # F, name -> edges as in `scene.sample`
    rate: int
    action: str
    verb: str
    noun: str
    start: float = START  # seconds, as annotated
    height: float = HEIGHT
    stop: float = STOP
    planted: str | None = None  # a name in DEFECTS

    def near(self, time: float) -> int:
        """Number of the frame at a time, within the clip."""
        return min(max(round(time * self.rate), 0), len(self.frames) - 1)


def render_clip(
    split: str, index: int, *, size: int = 128, rate: int = 12, samples: int = 2, show_hands: bool = True
) -> Clip:
    """Render the action of pair `index` of a settled split; the frame at `HEIGHT` shows what its target frame does."""
    from .actions import ACTIONS
    from .hand import SIDES
    from .motion import Moving
    from .raytrace import trace
    from .scene import SPLITS, build, visible_boxes

    own = SPLITS[split]
    scene = build(
        own.seed,
        index,
        kitchens=own.kitchens,
        first_kitchen=own.first_kitchen,
        actions=own.actions,
        show_hands=show_hands,
    )
    moving, action = Moving(scene), ACTIONS[scene.action]
    wanted = {*scene.shot.active, *(f"hand_{side}" for side in SIDES)}
    frames, boxes = [], []
    for number in range(round(END * rate)):
        time = number / rate
        reach, motion, progress = (
            float(np.clip((time - first) / (last - first), 0, 1))
            for first, last in ((START, GRASP), (GRASP, HEIGHT), (START, HEIGHT))
        )
        camera = moving.camera(progress, time)
        frame, part_map, names = trace(moving.parts(reach, motion), camera, scene.shot.kitchen.light, size, samples)
        frames.append(frame)
        boxes.append(visible_boxes(part_map, names, wanted))
    return Clip(
        f"P{index // 90 + 1:02d}_{index % 90 + 1:02d}", frames, boxes, rate, scene.action, action.verb, action.noun
    )


def plant(clip: Clip, defect: str, rng: np.random.Generator, others: Sequence[Clip] = ()) -> Clip:
    """The clip with a defect; those of its file are planted by `write_clip`, "no hands" when it is rendered.

    Args:
        clip: left as it is.
        defect: a name in `DEFECTS`.
        rng: decides which of the two frames is spoilt.
        others: clips of other kitchens; for "too different" the picture changes to that with the least alike colours,
            as kitchens of this world may look much alike (see `other_kitchen`).
    """
    frames, spoilt = list(clip.frames), replace(clip, planted=defect)
    is_input = rng.random() < 0.5
    part = [i for i in range(len(frames)) if (i / clip.rate < START if is_input else i / clip.rate > GRASP)]
    if defect == "black frame":
        for i in part:
            frames[i] = (frames[i] * 0.02).astype(np.uint8)
    elif defect == "blurred frame":
        blur = ImageFilter.GaussianBlur(len(frames[0]) / 20)
        for i in part:
            frames[i] = np.asarray(Image.fromarray(frames[i]).filter(blur))
    elif defect == "frozen video":
        frames = frames[:2] + [frames[2]] * (len(frames) - 2)
    elif defect == "too different":
        own = Image.fromarray(frames[clip.near(INPUT)])
        other = min(others, key=lambda one: colour_similarity(own, Image.fromarray(one.frames[one.near(HEIGHT)])))
        frames = [frame if i / clip.rate < GRASP else other.frames[i] for i, frame in enumerate(frames)]
    elif defect == "too similar":  # the annotated action lies where nothing happens yet
        return replace(spoilt, start=0.6, height=0.7, stop=0.75)
    elif defect == "bad times":
        return replace(spoilt, start=STOP, height=START, stop=START)
    elif defect == "starts too early":
        return replace(spoilt, start=0.1, height=0.9, stop=1.4)
    elif defect == "outside the video":
        return replace(spoilt, start=START + 60, height=HEIGHT + 60, stop=STOP + 60)
    elif defect == "no label":
        return replace(spoilt, action="", verb="", noun="")
    return replace(spoilt, frames=frames)


def encode(frames: list[np.ndarray], rate: int, path: Path, **options: str) -> None:
    """Write frames as H.264 in MP4, its index in front, with B-frames and a key frame every second."""
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": "16", "g": str(rate), "bf": "2", **options}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_clip(clip: Clip, folder: Path) -> None:
    """Write a clip's video, or what its defect leaves of it."""
    path = folder / f"{clip.video}.mp4"
    if clip.planted == "missing video":
        return
    folder.mkdir(parents=True, exist_ok=True)

    def write(unfinished: Path) -> None:
        encode(clip.frames, clip.rate, unfinished)
        content = unfinished.read_bytes()
        if clip.planted == "truncated video":  # the first third of the frames' data is there
            data = content.index(b"mdat") + 4
            unfinished.write_bytes(content[: data + (len(content) - data) // 3])
        elif clip.planted == "unreadable video":
            unfinished.write_bytes(content[: len(content) // 50])

    write_atomically(path, write)


# --- Annotations -----------------------------------------------------------------------------------------------------


def facts(clip: Clip) -> dict[str, Any]:
    """What the annotation files need to know of a clip, for JSON: all but the frames."""
    known = {name: value for name, value in asdict(replace(clip, frames=[])).items() if name != "frames"}
    if clip.planted == "outside the video":
        known["boxes"] = []
    return known | {"size": clip.frames[0].shape[0]}


def write_annotations(clips: list[dict[str, Any]], folder: Path) -> None:
    """Write the three annotation files of clips (see `facts`) and `planted.json`, id -> defect or null."""
    rows = [(name, clip, start, height, stop) for clip in clips for name, start, height, stop in _segments(clip)]
    write_text(folder / "annotations.csv", _csv([_table_row(*row) for row in rows]))
    write_text(folder / "EPIC_100_train.csv", _csv([_epic_row(*row) for row in rows]))
    content = {"version": "2", "description": "rendered kitchen", "videos": [_ego4d_video(clip) for clip in clips]}
    write_text(folder / "fho_main.json", json.dumps(content))
    planted = {}
    for name, clip, *_ in rows:
        is_first = name.endswith("_0")  # of a near duplicate, the second is to be dropped
        planted[name] = None if clip["planted"] == "near duplicate" and is_first else clip["planted"]
    write_text(folder / "planted.json", json.dumps(planted, indent=1) + "\n")


def _segments(clip: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Id, start, height and stop of a clip's actions: one, or two where an annotator has said it again."""
    first = f"{clip['video']}_0", clip["start"], clip["height"], clip["stop"]
    if clip["planted"] != "near duplicate":
        return [first]
    return [first, (f"{clip['video']}_1", clip["start"] + 0.02, clip["height"] + 0.02, clip["stop"])]


def _box_list(clip: dict[str, Any], number: int) -> list[dict[str, Any]]:
    return [
        {"name": name, "x0": x0, "y0": y0, "x1": x1, "y1": y1}
        for name, (x0, y0, x1, y1) in clip["boxes"][number].items()
    ]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table_row(name: str, clip: dict[str, Any], start: float, height: float, stop: float) -> dict[str, Any]:
    moments = [
        {"time": round(i / clip["rate"], 4), "boxes": _box_list(clip, i)} for i in range(0, len(clip["boxes"]), 2)
    ]
    return {
        "video": f"{clip['video']}.mp4",
        "start": f"{start:.3f}",
        "stop": f"{stop:.3f}",
        "action": clip["action"],
        "verb": clip["verb"],
        "noun": clip["noun"],
        "id": name,
        "boxes": json.dumps(moments),
        "source": "rendered kitchen",
        "licence": "Apache-2.0",
    }


def _epic_row(name: str, clip: dict[str, Any], start: float, height: float, stop: float) -> dict[str, Any]:
    def clock(seconds: float) -> str:
        return f"{int(seconds // 3600):02d}:{int(seconds // 60) % 60:02d}:{seconds % 60:05.2f}"

    return {
        "narration_id": name,
        "participant_id": clip["video"].split("_")[0],
        "video_id": clip["video"],
        "narration_timestamp": f"{clock(start)}0",
        "start_timestamp": clock(start),
        "stop_timestamp": clock(stop),
        "start_frame": int(start * 60),
        "stop_frame": int(stop * 60),
        "narration": clip["action"],
        "verb": clip["verb"].replace(" ", "-"),
        "verb_class": 0,
        "noun": clip["noun"],
        "noun_class": 0,
        "all_nouns": str([clip["noun"]]),
        "all_noun_classes": "[0]",
    }


def _ego4d_video(clip: dict[str, Any]) -> dict[str, Any]:
    length, size = round(END * EGO4D_RATE), clip["size"]
    return {
        "video_uid": clip["video"],
        "video_metadata": {
            "fps": EGO4D_RATE,
            "num_frames": length,
            "width": size,
            "height": size,
            "duration_sec": END,
            "rotation": None,
            "video_start_pts": 0,
            "video_base_numerator": 1,
            "video_base_denominator": 15360,
        },
        "annotated_intervals": [
            {
                "clip_id": 1,
                "clip_uid": None,
                "start_sec": 0.0,
                "end_sec": END,
                "start_frame": 0,
                "end_frame": length,
                "redacted": False,
                "narrated_actions": [_ego4d_action(name, clip, *times) for name, *times in _segments(clip)],
            }
        ],
    }


def _ego4d_action(name: str, clip: dict[str, Any], start: float, height: float, stop: float) -> dict[str, Any]:
    pre = round(start * EGO4D_RATE)
    critical: dict[str, int | None] = {f"pre_{back}": pre - back if pre >= back else None for back in (45, 30, 15)}
    middle = round((start + height) / 2 * EGO4D_RATE)
    critical |= {"pre_frame": pre, "contact_frame": middle, "pnr_frame": round(height * EGO4D_RATE)}
    critical["post_frame"] = round(stop * EGO4D_RATE)
    frames = []
    for kind, number in critical.items():
        near = 0 if number is None else round(number / EGO4D_RATE * clip["rate"])
        if number is not None and near < len(clip["boxes"]):
            boxes = [_ego4d_box(box, clip["size"]) for box in _box_list(clip, near)]
            frames.append({"frame_type": kind, "frame_number": number, "clip_frame_number": number, "boxes": boxes})
    verb, _, particle = clip["verb"].partition(" ")
    words = " ".join(filter(None, [f"{verb}s", particle, "the", clip["noun"]]))
    return {
        "uid": name,
        "start_sec": start,
        "end_sec": stop,
        "start_frame": pre,
        "end_frame": round(stop * EGO4D_RATE),
        "narration_text": f"#C C {words}" if clip["action"] else "#C C",
        "structured_verb": f"{clip['verb'].replace(' ', '_')}_(do,_perform)" if clip["verb"] else None,
        "freeform_verb": None,
        "state_transition": "state_change",
        "critical_frames": critical,
        "clip_critical_frames": critical,
        "frames": frames,
        "is_valid_action": True,
        "is_partial": False,
        "is_rejected": False,
        "is_invalid_annotation": False,
        "reject_reason": None,
        "stage": "reannotation",
        "warnings": [],
    }


def _ego4d_box(box: dict[str, Any], size: int) -> dict[str, Any]:
    kinds = {"hand_left": "left_hand", "hand_right": "right_hand"}
    x, y = box["x0"] * size, box["y0"] * size
    return {
        "object_type": kinds.get(box["name"], "object_of_change"),
        "structured_noun": None if box["name"] in kinds else f"{box['name'].replace(' ', '_')}_(thing)",
        "instance_number": None,
        "bbox": {"x": x, "y": y, "width": box["x1"] * size - x, "height": box["y1"] * size - y},
    }


# --- The command -----------------------------------------------------------------------------------------------------


def make_clip(config: ClipsConfig, index: int) -> Clip:
    """Clip `index`, with its defect if it draws one."""
    rng = np.random.default_rng([7, index])
    is_spoilt, defect = rng.random() < config.spoilt, DEFECTS[int(rng.integers(len(DEFECTS)))]
    show_hands = not is_spoilt or defect != "no hands"
    clip = render_clip(config.split, index, size=config.size, rate=config.rate, show_hands=show_hands)
    if not is_spoilt:
        return clip
    others = [other_kitchen(config, index, clip)] if defect == "too different" else []
    return plant(clip, defect, rng, others)


def other_kitchen(config: ClipsConfig, index: int, clip: Clip) -> Clip:
    """A clip whose target frame has other colours than a clip's input frame, `FAR` from what curation keeps."""
    from .scene import SPLITS, sample

    own, name = Image.fromarray(clip.frames[clip.near(INPUT)]), SPLITS[config.split]
    options: dict[str, Any] = {"kitchens": name.kitchens, "first_kitchen": name.first_kitchen, "actions": name.actions}
    for other in range(index + 10_000, index + 10_000 * (DRAWS + 1), 10_000):
        target = sample(name.seed, other, size=config.size, samples=1, **options)["target"]
        if colour_similarity(own, Image.fromarray(target)) < FAR:
            return render_clip(config.split, other, size=config.size, rate=config.rate)
    raise ValueError(f"`split` must have kitchens of other colours than clip {index}, found none; lower `spoilt`.")


def main(config: ClipsConfig) -> None:
    known = config.out / ".clips"  # facts of the clips that are done
    known.mkdir(parents=True, exist_ok=True)
    settings = json.dumps([config.split, config.size, config.rate, config.spoilt])
    claim = known / "settings.json"
    if claim.exists() and claim.read_text() != settings:
        raise ValueError(f"`out` {config.out} holds clips with other settings; name another folder.")
    write_text(claim, settings)
    clips = []
    for index in tqdm(range(config.clips), desc="kitchen clips", unit="clip"):
        done = known / f"{index:04d}.json"
        if not done.exists():
            clip = make_clip(config, index)
            write_clip(clip, config.out / "videos")
            write_text(done, json.dumps(facts(clip)))
        clips.append(json.loads(done.read_text()))
    write_annotations(clips, config.out)


if __name__ == "__main__":
    run(main, ClipsConfig, __doc__)
