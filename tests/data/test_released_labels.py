"""Labels of the released files: cleaned by default, and with the release's oddities, one by one and all."""

import json
import os
from pathlib import Path

import pytest

from lego_pipeline.data.released.labels import ODDITIES, LabelError, base_form, clean_label, cut_label, split_phrase

CLEAN = {
    "#C C opens the drawer": "open the drawer",
    "#C C Picks up Cup": "pick up cup",
    "#c c turns on tap": "turn on tap",
    "#CC cuts": "cut",
    "#C  C cuts": "cut",
    "#C Closes it": "close it",
    "C  walks.": "walk",
    "close the tap": "close the tap",
    "#C C puts the cup. ": "put the cup",
}
PAPER = {
    "#C C opens the drawer": "open the drawer",
    "#C C Picks up Cup": "pick up Cup",
    "#C C walks": "walk",
    "#O a man X talks": "man X talks",
    "#C Closes it": "oses it",
    "#unsure": "ure",
    "#C C": "",
    "#C C picks a knife from the table with his right hand.": "pick a knife from the table with his right hand.",
}
# What NLTK's WordNet lemmatiser gives for verbs; the last two are no verbs of WordNet.
BASE_FORMS = {
    "opens": "open", "does": "do", "has": "have", "lies": "lie", "ties": "tie", "carries": "carry", "washes": "wash",
    "passes": "pass", "leaves": "leave", "goes": "go", "is": "be", "held": "hold", "cutting": "cut", "moved": "move",
    "adjusts": "adjust", "swipes": "swipe", "man": "man", "oses": "oses", "ure": "ure",
}  # fmt: skip


@pytest.mark.parametrize("label", CLEAN)
def test_a_label_becomes_a_clean_phrase(label: str) -> None:
    assert clean_label(label) == CLEAN[label]


@pytest.mark.parametrize("label", PAPER)
def test_with_all_oddities_a_label_is_what_the_release_makes_of_it(label: str) -> None:
    assert clean_label(label, oddities=ODDITIES) == PAPER[label]


@pytest.mark.parametrize(
    ("oddity", "phrase"), [("cut", "pick up cup"), ("case", "pick up Cup"), ("full-stop", "pick up cup.")]
)
def test_each_oddity_can_be_had_alone(oddity: str, phrase: str) -> None:
    assert clean_label("#C C Picks up Cup.", oddities=(oddity,)) == phrase
    blind = "oses it" if oddity == "cut" else "close it"
    assert clean_label("#C Closes it", oddities=(oddity,)) == blind


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("#O a man X talks", "another person acts"),
        ("#unsure", "unsure"),
        ("#C C picks #Unsure", "unsure"),
        ("#C C", "no action is named"),
        ("", "no action is named"),
        ("#Summary C cooks", "the tag #Summary is unknown"),
        ("#Cuts bread", "the tag #Cuts is unknown"),
    ],
)
def test_a_label_without_an_action_of_the_wearer_is_an_error_that_quotes_it(label: str, reason: str) -> None:
    with pytest.raises(LabelError, match=reason) as error:
        clean_label(label)
    assert repr(label) in str(error.value)


def test_labels_of_epic_kitchens_are_phrases_already() -> None:
    assert clean_label("Take  plate ", "epic_kitchens") == "Take plate"
    assert clean_label("Take  plate ", "epic_kitchens", ODDITIES) == "Take  plate "


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="`oddities` must be of cut, case, full-stop, got verb"):
        clean_label("a", oddities=("verb",))
    with pytest.raises(ValueError, match="`dataset` must be one of ego4d, epic_kitchens, got 'kitchen'"):
        clean_label("a", "kitchen")


@pytest.mark.parametrize("verb", BASE_FORMS)
def test_base_forms_are_those_of_wordnet(verb: str) -> None:
    assert base_form(verb) == BASE_FORMS[verb]


@pytest.mark.parametrize(
    ("phrase", "parts"),
    [("open the drawer", ("open", "drawer")), ("walk", ("walk", None)), ("cut an onion.", ("cut", "onion"))],
)
def test_a_phrase_has_a_verb_and_a_noun(phrase: str, parts: tuple[str, str | None]) -> None:
    assert split_phrase(phrase) == parts


def test_parity_of_label_cutting() -> None:
    folder = os.environ.get("LEGO_REFERENCE_DIR")
    file = Path(folder or ".") / "ego4d_labels.json"
    if folder is None or not file.is_file():
        pytest.skip("LEGO_REFERENCE_DIR names no folder with ego4d_labels.json")
    cases = json.loads(file.read_text())["cases"]
    assert cases
    for case in cases:
        cut = cut_label(case["label"])
        assert cut == case["after_second_cut"]
        verb, _, rest = cut.partition(" ")
        assert (verb.lower(), rest) == (case["verb_before_lemmatisation"], case["rest"])
        phrase = clean_label(case["label"], oddities=ODDITIES)
        assert phrase == " ".join(filter(None, (base_form(case["verb_before_lemmatisation"]), case["rest"])))
