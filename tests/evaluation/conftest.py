"""Pairs of small frames and a system's pictures of them, for tests of the evaluation."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.evaluation.rows import Pairs, Row
from tests.evaluation.known import flat

ACTIONS = ("open drawer", "close drawer", "open fridge", "take cup")
COUNT = 12


@pytest.fixture(scope="session")
def manifest_rows() -> list[dict[str, Any]]:
    """Twelve pairs: grey inputs, targets in the colour of their verb, three videos of four pairs."""
    colours = {"open": (200, 40, 40), "close": (40, 200, 40), "take": (40, 40, 200)}
    rows = []
    for i in range(COUNT):
        action = ACTIONS[i % len(ACTIONS)]
        verb, noun = action.split()
        target = np.clip(np.array(colours[verb]) + i, 0, 255).tolist()
        rows.append(
            {
                "id": f"pair-{i:02d}",
                "image_0": flat(100 + i, 100 + i, 100 + i),
                "image_1": flat(*target),
                "action": action,
                "verb": verb,
                "noun": noun,
                "description": f"I {action} in way {i}.",
                "video": f"video {i % 3}",
                "time_1": float(i),
                "split": "test" if i < 10 else "train",
                "source": "test",
            }
        )
    return rows


@pytest.fixture(scope="session")
def manifest(manifest_rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_shard(manifest_rows, folder / "pairs.parquet")
    return folder


@pytest.fixture
def pairs(manifest: Path) -> Pairs:
    """All twelve."""
    return Pairs(read_manifest(manifest))


@pytest.fixture
def make_system(tmp_path: Path) -> Callable[..., Row]:
    """`make_system(name, pictures)`: a row of pictures, None where there is none."""

    def make(name: str, pictures: Sequence[PIL.Image.Image | None], **facts: Any) -> Row:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        read = []
        for i, picture in enumerate(pictures):
            if picture is not None:
                picture.save(folder / f"{i}.png")
            read.append(None if picture is None else partial(Path, folder / f"{i}.png"))
        return Row(name=name, kind="system", pictures=read, facts=facts)

    return make
