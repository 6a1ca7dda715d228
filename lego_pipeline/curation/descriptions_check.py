"""What an answer of a language model must be to become a description; what is wrong with it is said in words."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import dropwhile, takewhile

# What may stand in a label between its verb and its object ("turn on the tap"), and what ends the object's name.
_FILLERS = frozenset("a an the of on off in into onto to from with at up down out over back and it them some".split())
_REFUSAL = re.compile(
    r"\bas an? (ai|assistant|language model)\b|\b(i am|i'm|we are) (sorry|unable|not able)\b|\bsorry[,.]"
    r"|\bi (cannot|can't|can not|could not|couldn't) (provide|assist|help|see|describe|determine|answer|write)\b"
    r"|\b(not enough|insufficient) (information|context)\b|\bno (image|picture|frame) (is|was|has been)\b",
    re.IGNORECASE,
)
_COORDINATES = re.compile(  # a fraction such as 0.25, not the 2.5 of a bottle
    r"(?<!\d)0?\.\d|(?<!\d)0,\d|\b1\.0|\(\s*\d|\d\s*%|\b[xy][01]\b|\bcoordinates?\b|\bbounding box|\bpixels?\b",
    re.IGNORECASE,
)
_BOXES = re.compile(r"\bbox(es)? (at|around|during|before)\b", re.IGNORECASE)
_BOX = re.compile(r"\bbox(es)?\b", re.IGNORECASE)
_LABEL = re.compile(r"^\s*\**(description|answer|output|assistant|response)\**\s*:\s*\**", re.IGNORECASE)
_REASONING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_QUOTES = "\"'“”‘’`"


@dataclass(frozen=True)
class DescriptionRules:
    """What is asked of a description.

    Attributes:
        min_words, max_words: its length; a CLIP text encoder reads about 60 words, the rest is cut off there.
    """

    min_words: int = 6
    max_words: int = 60


def clean_answer(text: str) -> str:
    """An answer without what models put around it: their reasoning, a label, quotation marks, line breaks, blanks.

    What can't be shown goes too: half an emoji, for instance, which no file in UTF-8 can hold.
    """
    text = _REASONING.sub("", text)
    text = one_line(_LABEL.sub("", text.strip()))
    while len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1].strip()
    return text


def one_line(text: str) -> str:
    """A text in one line, without characters that can't be shown."""
    return " ".join("".join(letter for letter in text if letter.isprintable() or letter.isspace()).split())


def find_objection(
    text: str,
    action: str,
    noun: str | None,
    rules: DescriptionRules,
    copied: Collection[str] = (),
    is_cut_off: bool = False,
    boxes: Collection[str] = (),
) -> str | None:
    """What is wrong with a description, as the end of a sentence that begins with "it"; None if nothing is.

    Args:
        text: of `clean_answer`.
        action, noun: of the pair; the object's name is taken from the noun ("slice:pizza": either word will do), and
            where there is none from the label.
        rules: the length.
        copied: descriptions of worked examples with another label, which must not come back.
        is_cut_off: whether the server ended it at its limit of tokens.
        boxes: names of the objects that have a box. Where one of them, or the pair's object, is itself a box, boxes
            may be spoken of.
    """
    words = re.findall(r"[a-z']+", text.lower())
    if not words:
        return "has no words"
    if _REFUSAL.search(text):
        return "is a refusal"
    if is_cut_off or len(words) > rules.max_words:
        return f"is too long (more than {rules.max_words} words, or cut off)"
    if len(words) < rules.min_words:
        return f"is too short (fewer than {rules.min_words} words)"
    is_about_boxes = _BOX.search(" ".join([action, noun or "", *boxes]))
    if _COORDINATES.search(text) or re.search(r"\w_\w", text) or (_BOXES.search(text) and not is_about_boxes):
        return "reads numbers or boxes aloud"
    if sum(letter.isalpha() or letter.isspace() for letter in text) < 0.85 * len(text) or re.search(
        r"[{}<>#*|\\]", text
    ):
        return "is no plain sentence"
    if _repeats(text, words):
        return "repeats itself"
    if text in copied:
        return "is the description of an example"
    names = object_names(action, noun)
    if names and not any(word.removesuffix("'s") in _forms(name) for name in names for word in words):
        return f"does not name the object ({' or '.join(names)})"
    return None


def object_names(action: str, noun: str | None) -> list[str]:
    """Words any of which names a pair's object; none where the label has none.

    A name of several words is known by its last: "chopping board" by "board". Without a noun the name is what follows
    the verb, up to a preposition: "cup" in "put the cup in the sink".
    """
    if noun:
        names = [name.split() for name in re.split(r"[^a-z ]+", noun.lower().replace("_", " "))]
        names = [list(takewhile(lambda word: word not in _FILLERS, name)) or name for name in names]
    else:
        words = dropwhile(lambda word: word in _FILLERS, re.findall(r"[a-z]+", action.lower())[1:])
        names = [list(takewhile(lambda word: word not in _FILLERS, words))]
    return list(dict.fromkeys(name[-1] for name in names if name))


def _forms(noun: str) -> set[str]:
    """A noun and what may be its singular and plural."""
    forms = {noun, noun + "s", noun + "es"}
    for singular, plural in (("", "s"), ("", "es"), ("y", "ies"), ("f", "ves"), ("fe", "ves")):
        if noun.endswith(plural):
            forms.add(noun.removesuffix(plural) + singular)
        if noun.endswith(singular):
            forms.add(noun.removesuffix(singular) + plural)
    return forms


def _repeats(text: str, words: list[str]) -> bool:
    """Whether a sentence, or half of the words, comes twice."""
    sentences = [sentence.strip().lower() for sentence in re.split(r"[.!?]", text) if sentence.strip()]
    half = len(words) // 2
    return (
        len(set(sentences)) < len(sentences)
        or (half > 2 and words[:half] == words[-half:])
        or len(set(words)) * 3 < len(words)
    )
