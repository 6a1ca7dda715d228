"""The folder of released arrays that `LEGO_REFERENCE_DIR` names, its models converted once per session."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file, which no test is in

import released
import released_vlm

REFERENCE = Path(os.environ.get("LEGO_REFERENCE_DIR", "reference"))


@pytest.fixture(scope="session")
def subfolder() -> Callable[[str], Path]:
    """A part of the reference by name; the test is skipped where there is none."""

    def find(name: str) -> Path:
        if not (REFERENCE / name).exists():
            pytest.skip(f"no {name} in {REFERENCE}; set LEGO_REFERENCE_DIR")
        return REFERENCE / name

    return find


@pytest.fixture(scope="session")
def files(subfolder: Callable[[str], Path]) -> released.Files:
    return released.read_folder(subfolder("parity"))


@pytest.fixture(scope="session")
def models(subfolder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> released.Models:
    return released.build_models(subfolder("parity"), tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="session")
def outputs(models: released.Models, files: released.Files) -> Callable[[str], released.Arrays]:
    """Our outputs of a file, computed once."""
    known: dict[str, released.Arrays] = {}

    def of(file: str) -> released.Arrays:
        if file not in known:
            known[file] = released.compute(file, models, files)
        return known[file]

    return of


@pytest.fixture(scope="session")
def vlm(subfolder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return released_vlm.build_vlm(subfolder("vllm"), tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="session")
def vlm_features(subfolder: Callable[[str], Path]) -> dict[str, torch.Tensor]:
    return released_vlm.read_features(subfolder("vllm"))


@pytest.fixture(scope="session")
def vlm_outputs(vlm: Any, vlm_features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return released_vlm.features(vlm, vlm_features)
