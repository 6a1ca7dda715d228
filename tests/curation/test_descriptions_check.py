"""What passes for a description and what doesn't."""

import pytest

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.curation.descriptions_check import DescriptionRules, clean_answer, find_objection, object_names
from lego_pipeline.data.manifest import read_manifest

GOOD = "With the right hand I grip the red cup by its handle and lift it toward me."


@pytest.mark.parametrize(
    "text, objection",
    [
        (GOOD, None),
        ("My left hand turns knob 3 of the hob while the right hand holds the cup.", None),
        ("", "has no words"),
        ("...", "has no words"),
        ("I'm sorry, but I can't describe the cup without the image.", "is a refusal"),
        ("As an AI language model I have no access to the cup in the video frame.", "is a refusal"),
        ("I cannot determine how the person takes the cup from the counter.", "is a refusal"),
        ("I take the cup.", "is too short"),
        (GOOD[:-1] + ", then" + " and again" * 30 + ".", "is too long"),
        ("The right hand at (0.25, 0.50) grips the cup and lifts it up.", "reads numbers"),
        ("The right hand grips the cup, which spans 30% of the frame's width.", "reads numbers"),
        ("The right hand goes from .25 to 0,5 and grips the cup there.", "reads numbers"),
        ("The right hand goes from 0.5 to 1.0 and grips the cup there.", "reads numbers"),
        ("My right hand lifts the 2.5 litre cup off the counter.", None),
        ("The hand_right grips the cup by its handle and lifts it.", "reads numbers"),
        ("The bounding box of the cup moves up toward the right hand.", "reads numbers"),
        ("The cup's box around the right hand moves upward in the frame.", "reads numbers"),
        ('{"cup": "the right hand grips it by the handle and lifts it"}', "is no plain sentence"),
        ("* grip the cup with the right hand * lift the cup up toward me", "is no plain sentence"),
        ("cup ... ,,, ;; :: --- ???? !!! cup a b c d e f ::: ;;; ,,, ....", "is no plain sentence"),
        ("I lift the cup with the right hand. I lift the cup with the right hand.", "repeats itself"),
        ("I lift the cup up I lift the cup up", "repeats itself"),
        ("the cup the cup the cup the cup the cup the cup the hand", "repeats itself"),
        ("With the right hand I grip the red jar by its lid and lift it.", "does not name the object (cup)"),
        ("With the right hand I pull the drawer open and look at the cup.", "is the description of an example"),
    ],
)
def test_objections(text: str, objection: str | None) -> None:
    copied = {"With the right hand I pull the drawer open and look at the cup."}
    found = find_objection(text, "take cup", "cup", DescriptionRules(), copied)
    assert found == objection or (objection and str(found).startswith(objection))


def test_an_answer_that_the_server_cut_off_is_too_long() -> None:
    assert find_objection(GOOD, "take cup", "cup", DescriptionRules(), is_cut_off=True) is not None


@pytest.mark.parametrize(
    "action, noun, text",
    [
        ("put knives", "knife", "I lay the knives side by side into the open drawer."),
        ("take knife", "knife", "I take the knife's handle between thumb and fingers and lift it."),
        ("wash tomato", "tomato", "I hold the tomatoes under the water and turn them."),
        ("pick berries", "berries", "Thumb and finger of my right hand pick one berry from the bowl."),
        ("take pizza", "slice:pizza", "My right hand lifts the slice off the plate and holds it up."),
        ("turn on tap", None, "I lift the lever of the tap with my right hand until water runs."),
        ("open the drawer", "", "My left hand pulls the drawer open by its handle."),
        ("stand up", None, "I rise slowly with both hands on the table."),
    ],
)
def test_the_object_may_be_named_in_any_form(action: str, noun: str | None, text: str) -> None:
    assert find_objection(text, action, noun, DescriptionRules()) is None
    if object_names(action, noun):
        assert (
            find_objection("I put my right hand on it and move it away from me.", action, noun, DescriptionRules())
            is not None
        )


@pytest.mark.parametrize(
    "action, noun, boxes, text",
    [
        ("take box", "box", [], "I grip the cardboard box at its corners with both hands and lift it."),
        ("take box", None, [], "I hold the box during the whole way up with both hands."),
        ("take bowl", "bowl", ["egg box"], "My left hand moves the egg box around the bowl with care."),
    ],
)
def test_boxes_are_spoken_of_where_an_object_is_one(
    action: str, noun: str | None, boxes: list[str], text: str
) -> None:
    rules = DescriptionRules()
    assert find_objection(text, action, noun, rules, boxes=boxes) is None
    assert find_objection(text, "take corner", "corners", rules, boxes=["bowl"]) == "reads numbers or boxes aloud"


@pytest.mark.parametrize(
    "action, noun, names",
    [
        ("put cup in sink", None, ["cup"]),
        ("put the cup", None, ["cup"]),
        ("take chopping board", None, ["board"]),
        ("take lid off pan", "", ["lid"]),
        ("turn on tap", None, ["tap"]),
        ("turn tap off", None, ["tap"]),
        ("pour water into pot", None, ["water"]),
        ("stand up", None, []),
        ("take board", "board:chopping", ["board", "chopping"]),
        ("take board", "chopping_board", ["board"]),
        ("take rice", "bag of rice", ["bag"]),
        ("take box", "container_(box)", ["container", "box"]),
    ],
)
def test_the_object_is_what_is_acted_on(action: str, noun: str | None, names: list[str]) -> None:
    assert object_names(action, noun) == names


@pytest.mark.parametrize(
    "action, text",
    [
        ("put cup in sink", "I put it slowly and with care into the sink."),
        ("take chopping board", "I am chopping the carrot with the knife in my right hand."),
    ],
)
def test_a_place_or_half_a_name_does_not_name_the_object(action: str, text: str) -> None:
    assert str(find_objection(text, action, None, DescriptionRules())).startswith("does not name the object")


def test_one_noun_is_not_another_that_begins_alike() -> None:
    assert (
        find_objection(
            "I take the cupboard's door and swing it open with care.", "take cup", "cup", DescriptionRules()
        )
        is not None
    )


@pytest.mark.parametrize(
    "said",
    [GOOD, f'"{GOOD}"', f"Description: {GOOD}", f"**Answer:** {GOOD}", f"  {GOOD[:20]}\n\n{GOOD[20:]} ", f"“{GOOD}”"]
    + [f"<think>Which hand?\nThe right.</think>\n{GOOD}", f"{GOOD}\ud83d", f"{GOOD[:20]}\0\u200b{GOOD[20:]}\x07"],
)
def test_what_models_put_around_an_answer_is_taken_off(said: str) -> None:
    assert clean_answer(said).replace("  ", " ") == GOOD


def test_the_kitchens_own_sentences_pass() -> None:
    rows = read_manifest(FRAMES).select_columns(["action", "noun", "description"]).to_list()
    found = [find_objection(row["description"], row["action"], row["noun"], DescriptionRules()) for row in rows]
    assert found == [None] * len(rows)
