"""The parity tests read all from the folder: another one passes, a missing one is skipped, a changed one fails."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comparison
import make_folder
import pytest
import released
import released_vlm
import torch

ROOT = Path(__file__).parents[2]


def run_parity_tests(folder: Path) -> str:
    """Output of `pytest -k parity` on a folder, the tests of this file left out."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "parity"]
    result = subprocess.run(
        [*command, "tests/parity/test_parity_arrays.py"],
        cwd=ROOT,
        env={**os.environ, "LEGO_REFERENCE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    return result.stdout


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with other weights, widths, levels, token counts, resolution, scales and steps, and its models."""
    folder, work = tmp_path_factory.mktemp("other") / "reference", tmp_path_factory.mktemp("work")
    make_folder.main(folder, work)
    return folder, work


@pytest.mark.slow
def test_another_folder_passes(other: tuple[Path, Path]) -> None:
    output = run_parity_tests(other[0])
    assert "skipped" not in output
    assert "passed" in output


@pytest.mark.slow
def test_a_missing_subfolder_skips_its_own_tests_by_name(tmp_path: Path) -> None:
    output = run_parity_tests(tmp_path)
    for name in ("parity", "vllm", "vllm_prompts.json"):
        assert f"no {name} in {tmp_path}; set LEGO_REFERENCE_DIR" in output
    assert "passed" not in output


def changed(name: str, array: torch.Tensor) -> torch.Tensor:
    """The array with one value moved by a twentieth of the largest; ids, counts and thresholds with places changed."""
    if name == "dropout_draw" or array.dtype == torch.long:
        return array.roll(1, dims=-1)
    other = array.clone().contiguous()
    value = other.view(-1)[other.numel() // 2]
    if array.dtype == torch.uint8:
        other.view(-1)[other.numel() // 2] = (int(value) + 40) % 256
    else:
        other.view(-1)[other.numel() // 2] = value + (float(array.abs().max()) or 1.0) / 20
    return other


def unnoticed(
    file: str, arrays: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], compute: Any
) -> Iterator[str]:
    """Arrays of a file that can be changed without a failing test."""
    for name, array in arrays.items():
        mutated = {**arrays, name: changed(name, array)}
        found = ours if name in ours else compute(mutated)
        compared = [name] if name in ours else list(found)
        if all(comparison.difference(file, key, found[key], mutated[key]).is_within for key in compared):
            yield f"{file}/{name}"


@pytest.mark.slow
@pytest.mark.parametrize("file", released.COMPUTE)
def test_a_changed_array_of_the_ldm_fails_its_test(
    file: str, models: released.Models, files: released.Files, outputs: Any
) -> None:
    def compute(mutated: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return released.compute(file, models, {**files, file: mutated})

    assert not list(unnoticed(file, files[file], outputs(file), compute))


@pytest.mark.slow
def test_a_changed_array_of_the_vlm_fails_its_test(vlm: Any, vlm_features: Any, vlm_outputs: Any) -> None:
    def compute(mutated: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return released_vlm.features(vlm, mutated)

    assert not list(unnoticed(released_vlm.FEATURES, vlm_features, vlm_outputs, compute))


@pytest.mark.slow
def test_a_changed_weight_fails(models: released.Models, files: released.Files) -> None:
    weight = models.pipeline.unet.mid_block.attentions[0].proj_in.weight
    before = weight.detach().clone()
    try:
        weight.data.view(-1)[0] += 0.05
        ours = released.compute("b_unet", models, files)
    finally:
        weight.data.copy_(before)
    assert not comparison.difference("b_unet", "eps_ema", ours["eps_ema"], files["b_unet"]["eps_ema"]).is_within
    assert comparison.difference("b_unet", "eps_raw", ours["eps_raw"], files["b_unet"]["eps_raw"]).is_within
