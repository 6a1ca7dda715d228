"""Errors and warnings as messages in the page, never as a traceback."""

import html
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")


@contextmanager
def messages() -> Generator[None]:
    """What the code inside warns of becomes a note, and what it refuses an error of the page."""
    import gradio as gr

    with warnings.catch_warnings(record=True) as noticed:
        warnings.simplefilter("always")
        try:
            yield
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            raise gr.Error(one_line(error), print_exception=False) from error
    for text in dict.fromkeys(one_line(item.message) for item in noticed if issubclass(item.category, UserWarning)):
        gr.Warning(text)


def told(results: Iterator[Result]) -> Iterator[Result]:
    """The same results, with `messages` around the making of each."""
    while True:
        with messages():
            result = next(results, None)
        if result is None:
            return
        yield result


def one_line(error: Exception | Warning | str) -> str:
    """The message of an error, or its kind if it has none; a page would take it for HTML."""
    return html.escape(" ".join(str(error).split()) or type(error).__name__, quote=False)
