"""Ego4D FHO annotations (`fho_main.json`, version 2) as actions.

Layout: facebookresearch/Ego4d and the data set's own page "Annotations Schemas". An interaction has critical frames:
pre_45, pre_30, pre_15 (1.5, 1 and 0.5 s before the pre-condition), pre_frame, contact_frame, pnr_frame (point of no
return), post_frame, numbered at the rate that `video_metadata` names (30). Numbers without `clip_` count from the
start of the canonical video, the others from the start of the clip. A frame's boxes are in pixels of the annotated
video. Actions of other persons, rejected annotations and redacted stretches are left out, each counted.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lego_pipeline.curation.actions import Action, Box, Moment, Timing, clipped_box, split_of

logger = logging.getLogger(__name__)

LICENCE = "Ego4D licence agreement"
SOURCE = "Ego4D FHO v2"
INPUT_FRAMES = ("pre_45", "pre_30", "pre_15", "pre_frame")
TARGET_FRAMES = ("contact_frame", "pnr_frame", "post_frame")
ORDER = (*INPUT_FRAMES, *TARGET_FRAMES)
HANDS = {"left_hand": "hand_left", "right_hand": "hand_right"}  # the names that manifests use
KNOWN_OBJECTS = {*HANDS, "object_of_change", "tool", "object_tool"}
RATE = 30.0  # frames a second of the canonical videos
IRREGULAR = {"is": "be", "has": "have", "does": "do", "goes": "go"}


def read_ego4d(path: Path, timing: Timing, clips: bool = False) -> list[Action]:
    """Actions of `fho_main.json`.

    Args:
        path: of the file.
        timing: which critical frames are wanted.
        clips: the videos are Ego4D's clips (`<clip_uid>.mp4`, their own clock), not the whole videos
            (`<video_uid>.mp4`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of this layout (the older `fho.json` is not read).
    """
    try:
        return _read(_videos(path), timing, clips)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be a whole fho_main.json of Ego4D version 2, got {type(error).__name__}: {error}."
        ) from error


def _read(videos: list[dict[str, Any]], timing: Timing, clips: bool) -> list[Action]:
    actions, unknown = [], Counter()
    for video, interval, number, action in _interactions(videos):
        size = video["video_metadata"]["width"], video["video_metadata"]["height"]
        rate = video["video_metadata"].get("fps") or RATE
        moments = _moments(action, size, rate, clips)
        unknown.update(box["object_type"] for box in _boxes(action) if box["object_type"] not in KNOWN_OBJECTS)
        name = interval.get("clip_uid") or interval.get("clip_id") if clips else video["video_uid"]
        verb, rest, own_reason = read_narration(action.get("narration_text") or "")
        reason = _reason(video, interval, action) or own_reason or _times(action, timing, rate, clips)
        facts = {"narration": action.get("narration_text")} | {
            key: action[key] for key in ("state_transition", "structured_verb", "freeform_verb") if action.get(key)
        }
        actions.append(
            Action(
                id=f"ego4d-{action.get('uid') or video['video_uid']}-{number:06d}",
                video=str(name),
                action=" ".join(filter(None, [verb, rest])),
                verb=plain_name(action.get("structured_verb")) or verb,
                noun=_noun(action),
                split=split_of(video["video_uid"], timing),
                source=SOURCE,
                licence=LICENCE,
                moments=moments,
                facts={key: value for key, value in facts.items() if value},
                **reason,
            )
        )
    if unknown:
        logger.warning("kinds of boxes that are not known, named as they are: %s", dict(sorted(unknown.items())))
    return actions


def read_narration(text: str) -> tuple[str, str, dict[str, Any]]:
    """Verb, rest and, if it can't be used, the reason of a narration: "#C C opens the drawer" -> "open", "the drawer".

    The wearer's own actions (`#C C`) are taken. The verb loses the ending of the third person; the release does that
    with WordNet, this with rules of spelling.
    """
    tag = re.match(r"\s*#\s*(\w+)\s*", text)
    if tag is None or not text[tag.end() :].strip():
        return "", "", {"reason": "no label", "detail": f"narration {text!r}"}
    if tag[1].upper() != "C":
        return "", "", {"reason": "another person", "detail": f"narration {text!r}"}
    words = re.sub(r"^C\b\s*", "", text[tag.end() :]).split(maxsplit=1)
    if not words:
        return "", "", {"reason": "no label", "detail": f"narration {text!r}"}
    return base_form(words[0].lower()), " ".join(words[1:]).strip().rstrip("."), {}


def base_form(verb: str) -> str:
    """ "open" for "opens", "carry" for "carries", "wash" for "washes"."""
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    if re.fullmatch(r"[a-z]{2,}ies", verb) and verb not in ("ties", "lies", "dies"):
        return f"{verb[:-3]}y"
    if re.search(r"(ss|sh|ch|x|zz|o)es$", verb):
        return verb[:-2]
    return verb[:-1] if re.search(r"[^s]s$", verb) else verb


def plain_name(name: str | None) -> str:
    """ "take" for "take_(pick,_grab,_get)": synonyms follow in brackets."""
    return (name or "").split("_(")[0].replace("_", " ").strip()


def _videos(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"`annotations` must be files, found none at {path}; check the path.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be fho_main.json of Ego4D, got no JSON ({error}).") from error
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, list) or not all("annotated_intervals" in video for video in videos):
        raise ValueError(
            f"{path} must be fho_main.json of Ego4D version 2 (a list `videos` with `annotated_intervals`); download "
            "it with `ego4d --datasets annotations --benchmarks FHO --version v2`."
        )
    return videos


def _interactions(videos: list[dict[str, Any]]) -> Iterator[tuple[dict, dict, int, dict]]:
    """Video, interval, number within the video and interaction."""
    for video in videos:
        number = 0
        for interval in video["annotated_intervals"]:
            for action in interval.get("narrated_actions") or []:
                yield video, interval, number, action
                number += 1


def _reason(video: dict, interval: dict, action: dict) -> dict[str, Any]:
    """Why the annotators or the recording rule an interaction out, empty if they don't."""
    if video.get("is_stereo"):
        return {"reason": "rejected annotation", "detail": "two views side by side (is_stereo)"}
    if interval.get("redacted"):
        return {"reason": "rejected annotation", "detail": "a redacted stretch of the video"}
    for flag in ("is_invalid_annotation", "is_rejected"):
        if action.get(flag):
            return {"reason": "rejected annotation", "detail": f"{flag}: {action.get('reject_reason') or 'true'}"}
    if action.get("stage") is None and not action.get("frames"):
        return {"reason": "rejected annotation", "detail": "neither a stage nor annotated frames"}
    return {}


def _times(action: dict, timing: Timing, rate: float, clips: bool) -> dict[str, Any]:
    """`time_0` and `time_1` from the critical frames, or the reason why there are none."""
    critical = action.get("clip_critical_frames" if clips else "critical_frames") or {}
    found = {name: critical[name] for name in ORDER if critical.get(name) is not None}
    numbers = list(found.values())
    if numbers != sorted(numbers) or any(number < 0 for number in numbers):
        return {"reason": "bad times", "detail": f"critical frames are out of order: {found}"}
    if timing.ego4d_input not in found:
        return {"reason": "no critical frame", "detail": f"{timing.ego4d_input} is not annotated"}
    target = found.get(timing.ego4d_target, found.get("contact_frame"))
    if target is None:
        return {"reason": "no critical frame", "detail": f"neither {timing.ego4d_target} nor contact_frame"}
    if target <= found[timing.ego4d_input]:
        return {"reason": "bad times", "detail": f"input and target are one frame: {found}"}
    return {"time_0": found[timing.ego4d_input] / rate, "time_1": target / rate}


def _boxes(action: dict) -> list[dict[str, Any]]:
    return [box for frame in action.get("frames") or [] for box in frame.get("boxes") or []]


def _moments(action: dict, size: tuple[int, int], rate: float, clips: bool) -> tuple[Moment, ...]:
    """Boxes of the annotated frames, in fractions."""
    key = "clip_frame_number" if clips else "frame_number"
    moments = []
    for frame in action.get("frames") or []:
        if frame.get(key) is not None:
            boxes = [_named_box(box, size) for box in frame.get("boxes") or []]
            moments.append((frame[key] / rate, tuple(box for box in boxes if box is not None)))
    return tuple(sorted(moments, key=lambda moment: moment[0]))


def _named_box(box: dict[str, Any], size: tuple[int, int]) -> Box | None:
    kind, edges = box["object_type"], box["bbox"]
    name = HANDS.get(kind) or plain_name(box.get("structured_noun")) or kind.replace("_", " ")
    x0, y0 = edges["x"] / size[0], edges["y"] / size[1]
    return clipped_box(name, x0, y0, x0 + edges["width"] / size[0], y0 + edges["height"] / size[1])


def _noun(action: dict) -> str:
    """Noun of the object that changes, if it has one."""
    names = [plain_name(box.get("structured_noun")) for box in _boxes(action) if box["object_type"] not in HANDS]
    return next(filter(None, names), "")
