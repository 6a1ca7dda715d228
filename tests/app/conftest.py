"""A painter on the tiny pipeline, for the tests that need no browser."""

from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest

from lego_pipeline import LegoPipeline
from lego_pipeline.app.painter import Painter
from lego_pipeline.data.embedding_cache import EmbeddingCache


@pytest.fixture
def make_painter(make_tiny_pipeline: Callable[..., LegoPipeline], tmp_path: Path) -> Callable[..., Painter]:
    """`make_painter(**changes)`: a painter of a fresh tiny pipeline with these changes."""

    def make(load_fast: Callable[[LegoPipeline], LegoPipeline] | None = None, **changes: object) -> Painter:
        return Painter(
            make_tiny_pipeline(**changes),
            model="tiny",
            cache=EmbeddingCache(tmp_path / "cache", dtype="float32"),
            requests=({"model": "plain"}, {"model": "fast"}),
            load_fast=load_fast,
        )

    return make


@pytest.fixture
def painter(make_painter: Callable[..., Painter]) -> Painter:
    return make_painter()


@pytest.fixture
def frame_file(frame: PIL.Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "frame.png"
    frame.save(path)
    return path
