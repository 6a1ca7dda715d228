"""Prompts: what of a row and of the worked examples is said, and how."""

import re
from pathlib import Path

import pytest

from lego_pipeline.curation.descriptions import (
    KITCHEN_EXAMPLES,
    TASK,
    WorkedExample,
    ask_again,
    build_messages,
    build_query,
    estimate_tokens,
    has_boxes,
    read_examples,
)
from lego_pipeline.curation.descriptions_check import DescriptionRules, find_objection

HAND = {"name": "hand_right", "x0": 0.25, "y0": 0.5, "x1": 0.7512, "y1": 1.0}
CUP = {"name": "cup", "x0": 0.1, "y0": 0.2, "x1": 0.3, "y1": 0.4}
ROW = {"id": "a", "action": "take cup", "noun": "cup", "boxes_0": [CUP], "boxes_1": [HAND, CUP]}
EXAMPLE = WorkedExample("open drawer", "I pull the drawer open.", (CUP,), ())


def test_a_query_has_the_label_and_the_boxes_of_both_frames() -> None:
    assert build_query(ROW["action"], ROW).splitlines() == [
        "Action: take cup",
        "Boxes before the action: cup (0.10, 0.20, 0.30, 0.40)",
        "Boxes during the action: right hand (0.25, 0.50, 0.75, 1.00); cup (0.10, 0.20, 0.30, 0.40)",
    ]


@pytest.mark.parametrize("boxes", [None, []])
def test_absent_boxes_leave_no_line(boxes: list | None) -> None:
    row = {"action": "take cup", "boxes_0": boxes, "boxes_1": boxes}
    assert build_query("take cup", row) == "Action: take cup"
    assert not has_boxes(row) and has_boxes(ROW)


def test_the_worked_examples_come_first_and_are_the_same_for_every_row() -> None:
    first, second = (build_messages(ROW | {"action": action}, [EXAMPLE]) for action in ("take cup", "put cup"))
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user"]
    assert first[:-1] == second[:-1]
    assert (
        first[1]["content"].startswith("Action: open drawer\nBoxes before")
        and first[2]["content"] == EXAMPLE.description
    )
    assert "take cup" in first[-1]["content"] and estimate_tokens(first) > 100


def test_the_second_question_holds_the_answer_and_what_is_wrong_with_it() -> None:
    messages = build_messages(ROW, [])
    *same, answer, complaint = ask_again(messages, "A hand moves.", "is too short")
    assert same == messages and answer == {"role": "assistant", "content": "A hand moves."}
    assert "it is too short" in complaint["content"]
    assert ask_again(messages, "", "has no words") == messages


def test_the_kitchens_examples_are_what_is_asked_for() -> None:
    examples = read_examples(KITCHEN_EXAMPLES)
    assert len(examples) == len({example.action for example in examples}) >= 6
    for example in examples:
        assert find_objection(example.description, example.action, None, DescriptionRules()) is None
        assert example.boxes_1 and all(
            0 <= box[a] < box[b] <= 1 for box in example.boxes_1 for a, b in ("x0 x1".split(), "y0 y1".split())
        )
        moving = {f"{box['name'].removeprefix('hand_')} hand" for box in example.boxes_1 if "hand_" in box["name"]}
        assert all(hand in example.description or "both hands" in example.description for hand in moving)


def test_the_kitchens_examples_say_nothing_that_label_and_boxes_do_not_tell() -> None:
    colours = "red|orange|yellow|green|teal|blue|purple|pink|brown|black|white|grey|gray|silver|dark|light|bright"
    materials = "wood|wooden|metal|steel|iron|plastic|glass|ceramic|stone|paper|cardboard|cloth"
    unseen = "thumbs?|fingers?|palms?|rim|counter|board|hob|sink|stove|table"
    for example in read_examples(KITCHEN_EXAMPLES):
        assert not re.findall(rf"\b({colours}|{materials}|{unseen})\b", example.description.lower())
    assert "no colours, no materials" in " ".join(TASK.split())


def test_the_first_examples_can_be_asked_for(tmp_path: Path) -> None:
    assert read_examples(KITCHEN_EXAMPLES, 2) == read_examples(KITCHEN_EXAMPLES)[:2]
    with pytest.raises(ValueError, match="`examples` must hold at least 99"):
        read_examples(KITCHEN_EXAMPLES, 99)


@pytest.mark.parametrize(
    "line", ["{", "3", '{"action": "a"}', '{"action": "a", "description": "b", "boxes_0": [{"name": "c"}]}']
)
def test_a_bad_example_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text('{"action": "a", "description": "b"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="examples.jsonl, line 3: must be"):
        read_examples(file)
    with pytest.raises(FileNotFoundError, match="`examples`"):
        read_examples(tmp_path / "none")
