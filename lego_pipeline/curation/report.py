"""The report of a curation: how many pairs, what was dropped and why, with example pictures, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lego_pipeline.atomic import write_text
from lego_pipeline.curation.frames import REASONS

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(path: Path, summary: Mapping[str, Any], examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes the report; it refers to nothing outside itself.

    Args:
        path: of the HTML file.
        summary: see `lego_pipeline.curation.work.summarise`, with `settings`.
        examples: lists by reason (and "kept") of {id, action, detail, pictures}, the last as base64 JPEG.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError('the report is written with jinja2; run `pip install "lego-pipeline[train]"`.') from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(path, template.render(summary=summary, examples=examples, reasons=REASONS))
