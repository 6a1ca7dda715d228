"""Tiny folders for the baselines, saved once."""

from pathlib import Path
from typing import Any

import pytest

from tests.baselines import folders


@pytest.fixture(scope="session")
def text_to_image(tiny_components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.text_to_image_folder(tiny_components, tmp_path_factory.mktemp("sd") / "text-to-image")


@pytest.fixture(scope="session")
def edit(tiny_components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.instruct_pix2pix_folder(tiny_components, tmp_path_factory.mktemp("sd") / "instruct-pix2pix")
