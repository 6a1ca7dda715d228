"""The wheel holds all that `lego demo` needs, proved in a fresh environment far from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that sees neither the checkout nor the hub."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    [path] = folder.glob("lego_pipeline-*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new environment with the wheel and its core dependencies, no extras; removed afterwards (gigabytes)."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    yield folder
    shutil.rmtree(folder)


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lego_pipeline"}
    assert not [name for name in names if "__pycache__" in name]
    for path in sorted((ROOT / "lego_pipeline").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names


def test_the_demo_runs_from_the_wheel_without_extras_and_without_the_examples(fresh: Path) -> None:
    python = fresh / "venv" / "bin" / "python"
    code = (
        "import importlib.util as u, lego_pipeline as p; "
        "print(u.find_spec('examples'), u.find_spec('torchvision'), p.__file__)"
    )
    examples, torchvision, location = run(python, "-c", code, cwd=fresh).split()
    assert (examples, torchvision) == ("None", "None")
    assert Path(location).is_relative_to(fresh)
    run(fresh / "venv" / "bin" / "lego", "doctor", cwd=fresh)
    run(fresh / "venv" / "bin" / "lego", "demo", "--frames", "2", "--output", "demo.png", cwd=fresh)
    with PIL.Image.open(fresh / "demo.png") as sheet:
        assert min(sheet.size) > 200


def test_a_saved_folder_loads_in_a_process_that_imported_nothing_of_ours(fresh: Path) -> None:
    code = (
        "import sys; from diffusers import DiffusionPipeline; "
        "p = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline='lego', trust_remote_code=True); "
        "print(type(p).__name__)"
    )
    python = fresh / "venv" / "bin" / "python"
    [kitchen] = (fresh / "venv").glob("lib/*/site-packages/lego_pipeline/checkpoints/kitchen")
    assert run(python, "-c", code, kitchen, cwd=fresh).split()[-1] == "LegoPipeline"
