"""train/README.md: its commands run as they stand and end with a picture, and its memory table is what is computed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from lego_pipeline.config import parse_config
from lego_pipeline.data.manifest import read_manifest
from tests.curation.chat_server import ChatServer, sentence
from train import train_ldm, tune_vlm

ROOT = Path(__file__).parents[2]
README = (ROOT / "train" / "README.md").read_text(encoding="utf-8")
CONFIG = ROOT / "train" / "configs" / "one_24gb_gpu.yaml"
SHAPES = ROOT / "train" / "configs" / "shapes"


def section(title: str) -> str:
    """Text below a heading, up to the next."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text: str) -> str:
    """All code of a text as one bash script."""
    script = ""
    for language, code in re.findall(r"^```(bash|python)\n(.*?)^```", text, re.M | re.S):
        script += code if language == "bash" else f"python - <<'EOF'\n{code}EOF\n"
    return script


def run_section(title: str, folder: Path, **variables: str) -> None:
    """Runs the commands below a heading as they stand, in a folder that looks like this repository."""
    for name in ("train", "examples", "lego_pipeline"):
        (folder / name).symlink_to(ROOT / name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    script = commands(section(title))
    done = subprocess.run(
        ["bash", "-euxc", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_twenty_pairs_become_a_picture(tmp_path: Path) -> None:
    run_section("Twenty pairs", tmp_path)
    with PIL.Image.open(tmp_path / "runs/guide/action.png") as picture:
        assert picture.size == (128, 128)
        assert "open drawer" in str(picture.text)  # ty: ignore[unresolved-attribute]
    for name in ("last", "best"):
        assert (tmp_path / "runs/guide/ldm" / name / "README.md").is_file()
    log = (tmp_path / "runs/guide/ldm/validation.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in log.splitlines()]
    assert steps == [0, 2, 4]


@pytest.mark.slow
def test_twenty_videos_become_a_picture(tmp_path: Path) -> None:
    with ChatServer() as server:
        run_section("From your own videos", tmp_path, LLM_URL=server.url, LLM_NAME="m", NO_PROXY="127.0.0.1")
    own = tmp_path / "runs/own"
    summary = json.loads((own / "frames/summary.json").read_text())
    assert summary["actions"] == 20 == summary["pairs"] + sum(summary["dropped"].values()) and summary["pairs"] >= 15
    described = read_manifest(own / "described/manifest", "train")
    assert len(described) == summary["pairs_by_split"]["train"] == len(server.bodies)
    assert all(
        text == sentence(action)
        for text, action in zip(described["description"][:], described["action"][:], strict=True)
    )
    assert sum("right hand (" in body["messages"][-1]["content"] for body in server.bodies) > 5
    with PIL.Image.open(own / "action.png") as picture:
        assert picture.size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("column", [0, 1], ids=["tune_vlm", "train_ldm"])
def test_the_24_gb_table_is_what_is_computed_and_leaves_room(column: int, capsys: pytest.CaptureFixture[str]) -> None:
    config_class = (tune_vlm.TuneVlmConfig, train_ldm.TrainLdmConfig)[column]
    shapes = (["--vlm", SHAPES / "llava-1.5-7b"], ["--pipeline", SHAPES / "stable-diffusion-1.5"])[column]
    with pytest.raises(SystemExit):
        parse_config(config_class, arguments=["--config", str(CONFIG), *map(str, shapes), "--dry-run"])
    computed = dict(re.findall(r"^# ([^\d\n]*?)  +([\d.]+) GB$", capsys.readouterr().out, re.M))
    table = {}
    for line in section("One GPU with 24 GB").splitlines():
        if line.startswith("|") and "---" not in line:
            name, *values = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
            table[name.split(",")[0]] = values[column]
    assert len(computed) >= 6
    for name, value in computed.items():
        assert table[name.split(",")[0]] == value, name
    assert float(table["at most in use"]) + 2 < 24


def test_every_command_of_the_24_gb_recipe_reads_a_section_of_its_file() -> None:
    names = re.findall(r"^python train/(\w+)\.py --config train/configs/one_24gb_gpu.yaml", README, re.M)
    text = CONFIG.read_text(encoding="utf-8")
    assert names == ["tune_vlm", "train_ldm"]
    assert all(f"\n{name}:\n" in text for name in (*names, "cache_embeddings"))


def test_flags_of_the_settings_table_exist() -> None:
    known = set(train_ldm.TrainLdmConfig.__dataclass_fields__)
    flags = re.findall(r"--([a-z][a-z-]*)", section("Settings that change what is learnt"))
    assert {flag.removeprefix("no-").replace("-", "_") for flag in flags} <= known
