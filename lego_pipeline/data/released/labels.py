"""Action labels of the released files as phrases that fit into the VLM's question: "#C C opens the drawer".

Labels of Ego4D are narrations with tags: `#C C ...` is the camera wearer, `#O ...` another person, `#unsure` marks
what the annotator doubted. The release cuts two characters off twice, whatever they are, which is right for the
first kind alone. Here the tags are parsed, and a label that names no action of the wearer is an error; what the
release does otherwise are the `ODDITIES`, by name. The verb becomes its base form as in NLTK's WordNet lemmatiser,
with the verbs of WordNet 3.0 in `verbs.txt`, so nothing is downloaded. Labels of Epic-Kitchens are phrases already.
"""

import re
from collections.abc import Collection
from functools import cache
from importlib.resources import files

DATASETS = ("ego4d", "epic_kitchens")
ODDITIES = {
    "cut": "two characters are cut off twice, whatever they are",
    "case": "only the verb is lower-cased",
    "full-stop": "a full stop at the end stays",
}

_UNSURE = re.compile(r"#\s*unsure", re.IGNORECASE)
# "#C C opens ...", "#c c opens ...", "#CC opens ...", "#C opens ...", "C opens ..."
_WEARER = re.compile(r"#\s*c(?=\b|c\b)\s*(?:c\b)?|C\b(?=\s)", re.IGNORECASE)
_TAG = re.compile(r"#\s*(\w*)")
_ENDINGS = (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""))


class LabelError(ValueError):
    """A label that names no action of the camera wearer."""


def clean_label(label: str, dataset: str = "ego4d", oddities: Collection[str] = ()) -> str:
    """The phrase of a label: "#C C Opens the drawer." of Ego4D as "open the drawer".

    Args:
        label: as the release has it.
        dataset: "ego4d" or "epic_kitchens".
        oddities: keys of `ODDITIES`; all of them give what the release gives. They have no effect on Epic-Kitchens,
            whose labels the release takes as they are.

    Raises:
        LabelError: another person acts, the annotator was unsure, or nothing is left. With "cut" no label is refused.
        ValueError: an unknown data set or oddity.

    Source: `BolinLai/LEGO: vllm/llava/eval/run_llava_in_loop.py`.
    """
    unknown = sorted(set(oddities) - set(ODDITIES))
    if unknown:
        raise ValueError(f"`oddities` must be of {', '.join(ODDITIES)}, got {', '.join(unknown)}; leave it out.")
    if dataset not in DATASETS:
        raise ValueError(f"`dataset` must be one of {', '.join(DATASETS)}, got {dataset!r}.")
    if dataset == "epic_kitchens":
        return label if oddities else _not_empty(" ".join(label.split()), label)
    narration = cut_label(label) if "cut" in oddities else _without_tags(label)
    if "full-stop" not in oddities:
        narration = narration.strip(" .")
    verb, _, rest = narration.partition(" ")
    if "case" not in oddities:
        rest = rest.lower()
    phrase = " ".join(filter(None, (base_form(verb.lower()), rest.strip())))
    return phrase if "cut" in oddities else _not_empty(phrase, label)


def cut_label(label: str) -> str:
    """The release's cutting: two characters off, blanks off, and both once more."""
    return label[2:].strip()[2:].strip()


def base_form(verb: str) -> str:
    """Base form of a lower-case verb, "picks" as "pick"; a word that WordNet lacks stays as it is.

    Of several candidates the shortest wins, of equally short ones the first, as in NLTK.
    """
    bases, irregular = _verbs()
    others = irregular.get(verb) or [verb.removesuffix(end) + new for end, new in _ENDINGS if verb.endswith(end)]
    found = [word for word in (verb, *others) if word in bases]
    return min(found, key=len, default=verb)


def split_phrase(phrase: str) -> tuple[str, str | None]:
    """Verb and noun of a phrase, for the manifest: its first word, and the rest without an article."""
    verb, _, rest = phrase.partition(" ")
    return verb, re.sub(r"^(?:the|a|an)\s+", "", rest.strip(" ."), flags=re.IGNORECASE) or None


def _without_tags(label: str) -> str:
    text = " ".join(label.split())
    if _UNSURE.search(text):
        raise LabelError(f"the annotator was unsure: {label!r}")
    wearer = _WEARER.match(text)
    text = text[wearer.end() :].strip() if wearer else text
    tag = _TAG.search(text)
    if tag:
        who = "another person acts" if tag[1].lower() == "o" else f"the tag #{tag[1]} is unknown"
        raise LabelError(f"{who}: {label!r}")
    return text


def _not_empty(phrase: str, label: str) -> str:
    if not phrase:
        raise LabelError(f"no action is named: {label!r}")
    return phrase


@cache
def _verbs() -> tuple[frozenset[str], dict[str, list[str]]]:
    """Base forms of all verbs, and the base forms of irregular ones."""
    text = (files("lego_pipeline.data.released") / "verbs.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return frozenset(words[0] for words in lines if len(words) == 1), {
        words[0]: words[1:] for words in lines if len(words) > 1
    }
