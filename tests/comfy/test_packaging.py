"""The pack as the node registry and ComfyUI's users get it: metadata, requirements, archive, languages, import."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent.parent
TREE = os.environ.get("COMFYUI_PATH")
COMFY_CLI = Path(sys.prefix).parent / "cli" / "bin" / "comfy"
CONTRACT = json.loads((ROOT / "tests" / "comfy" / "contract.json").read_text(encoding="utf-8"))
HELP = ROOT / "comfy_nodes" / "web" / "docs"
OF_COMFYUI = ("torch", "torchvision", "torchaudio", "numpy", "pillow")
IMPORT_SECONDS = 0.3

# Loads the pack as ComfyUI does once its own nodes are there, and prints the CPU seconds that it took.
LOAD_PACK = """
import asyncio, importlib.util, sys, time
sys.path.insert(0, {tree!r})
import comfy.cli_args
comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = {base!r}
import nodes, comfy_extras.nodes_custom_sampler
{before}
start = time.process_time()
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
extension = pack.comfy_entrypoint()
asyncio.run(extension.on_load())
found = asyncio.run(extension.get_node_list())
schemas = [node.GET_SCHEMA() for node in found]
print("SECONDS", time.process_time() - start, "NODES", len(found))
{after}
"""
HIDE = """
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def load_pack(base: Path, before: str = "", after: str = "") -> str:
    """What a fresh process prints that loads the pack into ComfyUI."""
    if not TREE:
        pytest.skip("ComfyUI is not here: run `make test-comfy`, or set COMFYUI_PATH to a checkout of ComfyUI")
    for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir(exist_ok=True)
    code = LOAD_PACK.format(tree=TREE, base=str(base), root=str(ROOT), before=before, after=after)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=base, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_the_metadata_is_what_the_registry_asks_for() -> None:
    content = project()
    comfy = content["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and "comfyui" not in content["project"]["name"].lower()
    assert comfy["requires-comfyui"] == ">=0.16.3"  # ComfyUI-oldest in fetch_tree.py
    assert (ROOT / comfy["version"]["path"]).is_file()
    with PIL.Image.open(ROOT / comfy["Icon"]) as icon:
        assert icon.width == icon.height <= 400


def test_the_requirements_are_the_projects_without_what_comfyui_brings() -> None:
    declared = {canonicalize_name(Requirement(line).name): line for line in project()["project"]["dependencies"]}
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name not in OF_COMFYUI
        assert [part.operator for part in requirement.specifier] == [">="]
        assert Requirement(declared[name]).specifier == requirement.specifier
    # pyyaml and tqdm are among ComfyUI's own.
    assert declared.keys() - {canonicalize_name(r.name) for r in requirements()} <= {*OF_COMFYUI, "pyyaml", "tqdm"}


@pytest.mark.parametrize("language", ["en", "fr"])
def test_every_text_is_there_in_each_language(language: str) -> None:
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert texts.keys() == CONTRACT.keys()
    for node_id, contract in CONTRACT.items():
        text = texts[node_id]
        assert text["display_name"].startswith("LEGO ") and text["description"].endswith(".")
        assert list(text["inputs"]) == [entry[0] for entry in contract["inputs"]]
        assert list(text["outputs"]) == [str(number) for number in range(len(contract["outputs"]))]
        for entry in (*text["inputs"].values(), *text["outputs"].values()):
            assert entry["name"] and entry["tooltip"].endswith(".")


def test_the_english_texts_are_the_nodes_own(nodes_of_pack: dict[str, Any]) -> None:
    """`LEGO_WRITE_CONTRACT=1` writes the file anew."""
    texts = {}
    for node_id, node in nodes_of_pack.items():
        schema = node.GET_SCHEMA()
        outputs = [{"name": out.display_name or out.get_io_type(), "tooltip": out.tooltip} for out in schema.outputs]
        texts[node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: {"name": entry.id, "tooltip": entry.tooltip} for entry in schema.inputs},
            "outputs": {str(number): entry for number, entry in enumerate(outputs)},
        }
    file = ROOT / "locales" / "en" / "nodeDefs.json"
    if os.environ.get("LEGO_WRITE_CONTRACT"):
        file.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(file.read_text(encoding="utf-8")) == texts


@pytest.mark.parametrize("node_id", CONTRACT)
@pytest.mark.parametrize("language", ["en", "fr"])
def test_every_node_has_a_help_page(node_id: str, language: str) -> None:
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))[node_id]
    file = HELP / f"{node_id}.md" if language == "en" else HELP / node_id / f"{language}.md"
    page = file.read_text(encoding="utf-8")
    assert page.startswith(f"# {texts['display_name']}\n") and texts["description"] in page
    for entry in (*texts["inputs"].values(), *texts["outputs"].values()):
        assert f"- **`{entry['name']}`** (" in page and entry["tooltip"] in page


def test_no_help_page_is_left_of_a_node_that_is_gone() -> None:
    assert {path.stem if path.suffix else path.name for path in HELP.iterdir()} == CONTRACT.keys()


@pytest.mark.slow
def test_the_pack_is_imported_quickly(tmp_path: Path) -> None:
    """The best of three, as other processes slow one down."""
    seconds = []
    for _ in range(3):
        found = re.search(r"SECONDS ([\d.]+) NODES (\d+)", load_pack(tmp_path))
        assert found and int(found[2]) == len(CONTRACT)
        seconds.append(float(found[1]))
    assert min(seconds) < IMPORT_SECONDS, seconds


@pytest.mark.slow
@pytest.mark.parametrize("names", [("datasets",), ("diffusers", "accelerate", "tyro", "peft")])
def test_without_a_package_the_other_nodes_work_and_the_message_brings_it(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    run = """
import torch
by_id = {node.GET_SCHEMA().node_id: node for node in found}
frame = ("LegoLoadFrame", {"number": 0})
vlm = ("LegoLoadVlm", {"model": "kitchen (embedded)", "dtype": "auto"})
grid = by_id["LegoCompareGrid"].execute(image_1=torch.zeros(1, 32, 32, 3))
print("GRID", grid.result[0].shape[-1])
node, inputs = {"datasets": frame, "diffusers": vlm}[NAME]
try:
    by_id[node].execute(**inputs)
except ImportError as error:
    print("MESSAGE", error)
""".replace("NAME", repr(names[0]))
    said = load_pack(tmp_path, before=HIDE.format(names=names), after=run)
    assert f"NODES {len(CONTRACT)}" in said and "GRID 3" in said
    line = next(line for line in project()["project"]["dependencies"] if line.startswith(names[0]))
    assert f"MESSAGE `{names[0]}` must be installed for this node" in said
    assert f'run "{sys.executable}" -m pip install "{line}" and start ComfyUI again' in said


@pytest.mark.parametrize(("name", "line"), [("peft", "peft>=0.18"), ("huggingface_hub", "huggingface_hub>=1.32")])
def test_the_line_for_a_package_has_the_projects_bound(name: str, line: str) -> None:
    source = importlib.util.spec_from_file_location("packages", ROOT / "comfy_nodes" / "packages.py")
    assert source is not None and source.loader is not None
    packages = importlib.util.module_from_spec(source)
    source.loader.exec_module(packages)

    def missing() -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=f"{name}.inner")

    with pytest.raises(ImportError, match=re.escape(f'pip install "{line}" and')):
        packages.explained(missing)()
    with pytest.raises(ModuleNotFoundError, match="No module named 'nothing_of_ours'"):
        packages.explained(lambda: importlib.import_module("nothing_of_ours"))()


def needed_by(requirements: list[Requirement]) -> set[str]:
    """Installed packages that these need, with what those need, by normalised name."""
    done: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(wanted.name), extra) for wanted in requirements for extra in ("", *wanted.extras)]
    while waiting:
        name, extra = waiting.pop()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if (name, extra) in done:
            continue
        done.add((name, extra))
        for wanted in map(Requirement, lines):
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(wanted.name), own) for own in ("", *wanted.extras)]
    return {name for name, _ in done}


@pytest.mark.slow
def test_installing_the_requirements_changes_nothing_of_comfyuis(tmp_path: Path) -> None:
    """A dry run in an environment that has what ComfyUI's own requirements name, and nothing else."""
    if not TREE:
        pytest.skip("ComfyUI is not here: run `make test-comfy`, or set COMFYUI_PATH to a checkout of ComfyUI")
    lines = (Path(TREE) / "requirements.txt").read_text(encoding="utf-8").splitlines()
    standard = needed_by([Requirement(line) for line in (line.split("#")[0].strip() for line in lines) if line])
    assert {"torch", "transformers", "numpy"} <= standard
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name in standard:
        # A fresh environment has an old setuptools of its own before the one that torch wants.
        newest = max(importlib.metadata.distributions(name=name), key=lambda found: Version(found.version))
        folder = site / f"{name.replace('-', '_')}-{newest.version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(newest.read_text("METADATA") or "", encoding="utf-8")
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "venv" / "bin" / "python"]
    options = ["--quiet", "--disable-pip-version-check", "--dry-run", "--report", report]
    subprocess.run([*pip, "install", *options, "-r", ROOT / "requirements.txt"], check=True, timeout=300)
    installed = {canonicalize_name(item["metadata"]["name"]) for item in json.loads(report.read_text())["install"]}
    assert "diffusers" in installed
    assert not installed & standard, sorted(installed & standard)


@pytest.mark.slow
def test_the_registrys_own_tool_finds_nothing(tmp_path: Path) -> None:
    """comfy-cli on a copy of the working tree, as it packs what git has."""
    if not COMFY_CLI.is_file():
        pytest.skip("comfy-cli is not here: `make test-comfy` installs it")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONUTF8": "1", "HOME": str(tmp_path / ".home")}
    for words in (["validate"], ["pack"]):
        result = subprocess.run(
            [COMFY_CLI, "--skip-prompt", "--no-enable-telemetry", "node", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        said = result.stdout + result.stderr
        assert result.returncode == 0 and "arning" not in said, said
        if words == ["validate"]:
            assert "All validation checks passed" in said, said
    packed = set(zipfile.ZipFile(tmp_path / "node.zip").namelist())
    assert {
        "__init__.py",
        "requirements.txt",
        "locales/fr/nodeDefs.json",
        "comfy_nodes/web/docs/LegoGuidance.md",
    } <= packed
    assert {"lego_pipeline/checkpoints/kitchen/model_index.json", "example_workflows/LEGO action frame.jpg"} <= packed
    assert not [name for name in packed if name.startswith(("tests/", "examples/", "train/", ".ci/"))]
