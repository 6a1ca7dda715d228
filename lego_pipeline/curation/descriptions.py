"""Prompts that have a language model write detailed descriptions, by worked examples in context (paper section 3.1).

The model sees no pixels: for each of a few worked examples it gets the label, the boxes of hands and objects and a
description, then label and boxes of the pair that is asked for. What the examples say beyond label and boxes, colours
for instance, the model learns to make up. They come first and are the same for all pairs, so that a server can keep
what it made of them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KITCHEN_EXAMPLES = Path(__file__).parent / "kitchen_examples.jsonl"
FRAMES = (("boxes_0", "before the action"), ("boxes_1", "during the action"))
TASK = """You describe how a person carries out an action, seen through the camera that the person wears on the head. \
You get the action's label and, where they are known, boxes of hands and objects in two frames: one shortly before \
the action, one during it. A box is given by its left, top, right and bottom edge as fractions of the frame, top left \
being (0, 0).

Write one or two sentences in plain English that say which hand does what with which object, where it is held, where \
it is and how it moves. Name the object. Read from the boxes where things are and which hand moved, but say it in \
words: no numbers, no boxes. Say nothing that label and boxes don't tell: no colours, no materials. Write nothing but \
the description."""
Message = dict[str, str]  # role and content


@dataclass(frozen=True)
class WorkedExample:
    """A label with its boxes, as in a manifest's row, and the description that belongs to them."""

    action: str
    description: str
    boxes_0: tuple[dict[str, Any], ...] = ()
    boxes_1: tuple[dict[str, Any], ...] = ()


def read_examples(path: Path, count: int = 0) -> list[WorkedExample]:
    """Worked examples of a file: one JSON object a line with the manifest's names, `action` and `description` needed.

    Args:
        path: of the file.
        count: only the first ones; 0 = all.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that is no such object, or fewer lines than asked for.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"`examples` must be a file of worked examples, found none at {path}; copy {KITCHEN_EXAMPLES} and write "
            "your own in its place."
        )
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            boxes = {name: tuple(row.get(name) or ()) for name, _ in FRAMES}
            example = WorkedExample(str(row["action"]), str(row["description"]), **boxes)
            build_query(example.action, boxes)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: must be a JSON object with `action`, `description` and boxes as in a "
                f"manifest, got {line[:80]!r} ({type(error).__name__}: {error})."
            ) from error
        examples.append(example)
    if len(examples) < max(count, 1):
        raise ValueError(
            f"`examples` must hold at least {max(count, 1)} worked examples, got {len(examples)} in {path}."
        )
    return examples[:count] if count else examples


def build_query(action: str, boxes: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> str:
    """What is asked about one pair: its label, and its boxes where it has some.

    Args:
        action: the label.
        boxes: `boxes_0` and `boxes_1` of a manifest's row; absent or empty ones are left out.
    """
    lines = [f"Action: {action}"]
    for name, moment in FRAMES:
        found = [_box_words(box) for box in boxes.get(name) or ()]
        if found:
            lines.append(f"Boxes {moment}: {'; '.join(found)}")
    return "\n".join(lines)


def _box_words(box: Mapping[str, Any]) -> str:
    edges = ", ".join(f"{float(box[side]):.2f}" for side in ("x0", "y0", "x1", "y1"))
    name = {"hand_left": "left hand", "hand_right": "right hand"}.get(str(box["name"]), str(box["name"]))
    return f"{name} ({edges})"


def build_messages(row: Mapping[str, Any], examples: Sequence[WorkedExample]) -> list[Message]:
    """The conversation that asks for the description of a manifest's row: task, worked examples, query."""
    messages = [{"role": "system", "content": TASK}]
    for example in examples:
        query = build_query(example.action, {"boxes_0": example.boxes_0, "boxes_1": example.boxes_1})
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": example.description}]
    return [*messages, {"role": "user", "content": build_query(row["action"], row)}]


def ask_again(messages: Sequence[Message], answer: str, objection: str) -> list[Message]:
    """The conversation continued after an answer that can't be used; after an empty one, the same once more."""
    if not answer:
        return list(messages)
    complaint = f"That can't be used: it {objection}. Write the description again: one or two sentences, nothing else."
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": complaint}]


def has_boxes(row: Mapping[str, Any]) -> bool:
    """Whether a row's query has boxes."""
    return any(row.get(name) for name, _ in FRAMES)


def estimate_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a conversation, by the rule of thumb that English has four letters to a token."""
    return sum(len(message["content"]) // 4 + 4 for message in messages)
