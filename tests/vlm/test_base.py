"""The question that a VLM is asked."""

import pytest

from lego_pipeline.vlm.base import DEFAULT_QUESTION, ask, check_question


@pytest.mark.parametrize("action", ["open drawer", " open drawer. "])
def test_an_action_is_put_into_the_question_without_spaces_and_stops_around_it(action: str) -> None:
    asked = "How does the person properly open drawer that is displayed in the video frame?"
    assert ask(DEFAULT_QUESTION, action) == asked


def test_braces_in_template_and_action_are_text() -> None:
    assert ask("How {}, as JSON {a: b}?", "draw {}") == "How draw {}, as JSON {a: b}?"


@pytest.mark.parametrize("template", ["", "How?", "{} and {}", "{0}"])
def test_a_template_has_exactly_one_place(template: str) -> None:
    with pytest.raises(ValueError, match="must have exactly one {}"):
        check_question(template)
