"""What a newcomer types works from the second time on without set-up and without the network."""

import os
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).parent.parent
READY = ROOT / ".venv" / ".ready"
LEGO = (sys.executable, "-m", "lego_pipeline.cli")
NO_NETWORK = """
import socket

connect = socket.socket.connect

def connect_here(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise AssertionError(f"connects to {address}")
    return connect(self, address)

socket.socket.connect = connect_here
"""


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """Environment in which Python connects to this machine only."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"}


@pytest.mark.skipif(not READY.exists(), reason="`make demo` has not set .venv up here")
def test_a_demo_after_the_set_up_installs_nothing() -> None:
    sources = [(ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt")]
    if READY.stat().st_mtime < max(sources):
        pytest.skip("pyproject.toml or constraints.txt is newer than the set-up, so the next `make` sets up again")
    start = time.perf_counter()
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 2
    assert "lego_pipeline.cli demo" in shown and "pip install" not in shown and "-m venv" not in shown


def test_the_block_of_these_tests_blocks(offline: dict[str, str]) -> None:
    code = "import socket; socket.socket().connect(('192.0.2.1', 80))"
    result = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=False)
    assert "connects to ('192.0.2.1', 80)" in result.stderr


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"]], ids=" ".join)
def test_help_needs_no_network(argv: list[str], offline: dict[str, str]) -> None:
    result = subprocess.run([*LEGO, *argv], env=offline, capture_output=True, text=True, check=True)
    assert "usage: lego" in result.stdout


@pytest.mark.slow
def test_a_demo_needs_no_network(offline: dict[str, str], tmp_path: Path) -> None:
    offline.pop("HF_HUB_OFFLINE", None)
    command = [*LEGO, "demo", "--frames", "1", "--output", str(tmp_path / "demo.png")]
    subprocess.run(command, env=offline, cwd=tmp_path, check=True)
    with PIL.Image.open(tmp_path / "demo.png") as sheet:
        assert min(sheet.size) > 200
