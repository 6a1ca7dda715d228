"""What ComfyUI sees of the pack: its entry, and the contract that saved workflows rely on."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
CONTRACT = Path(__file__).parent / "contract.json"


def contract_of(node: Any) -> dict[str, Any]:
    """What a workflow stores about a node: names, kinds and order of its inputs and outputs."""
    schema = node.GET_SCHEMA()
    inputs = [[item.id, item.get_io_type(), *(["optional"] if item.optional else [])] for item in schema.inputs]
    outputs = [[item.display_name or item.get_io_type(), item.get_io_type()] for item in schema.outputs]
    return {"inputs": inputs, "outputs": outputs}


def test_the_entry_does_nothing_without_comfyui() -> None:
    spec = importlib.util.spec_from_file_location("entry", ROOT / "__init__.py", submodule_search_locations=[])
    assert spec is not None and spec.loader is not None
    if importlib.util.find_spec("folder_paths"):
        pytest.skip("ComfyUI is importable here")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not hasattr(module, "comfy_entrypoint")


def test_an_old_comfyui_is_told_what_is_needed(tmp_path: Path) -> None:
    for name in ("folder_paths.py", "comfy.py"):
        (tmp_path / name).write_text("")
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('entry', r'%s'); u.module_from_spec(s);"
        "s.loader.exec_module(u.module_from_spec(s))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code % (ROOT / "__init__.py")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "must have ComfyUI 0.16.3 or newer" in result.stderr


@pytest.mark.parametrize(
    "path", sorted((ROOT / "comfy_nodes").rglob("*.py")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_only_the_adapter_uses_inner_names(path: Path) -> None:
    inner = {"comfy", "comfy_extras", "folder_paths", "latent_preview", "nodes", "node_helpers", "execution", "server"}
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add((node.module or "").split(".")[0])
    assert path.parent.name == "adapter" or not roots & inner
    assert not roots & {"train", "examples", "tests", "benchmarks"}


def test_ids_inputs_and_outputs_keep_their_names_and_order(nodes_of_pack: dict[str, Any]) -> None:
    """A saved workflow stores widget values by position: new inputs go to the end, nothing is renamed.

    `LEGO_WRITE_CONTRACT=1` writes the file anew, for a change that is meant.
    """
    found = {node_id: contract_of(node) for node_id, node in nodes_of_pack.items()}
    if os.environ.get("LEGO_WRITE_CONTRACT"):
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
        CONTRACT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    assert found == json.loads(CONTRACT.read_text(encoding="utf-8"))


def test_ids_and_categories_follow_one_pattern(nodes_of_pack: dict[str, Any]) -> None:
    for node_id, node in nodes_of_pack.items():
        schema = node.GET_SCHEMA()
        assert node_id.startswith("Lego") and node.__name__ == node_id
        assert schema.category.startswith("LEGO/") and schema.display_name.startswith("LEGO ")
        assert schema.description.endswith(".")


def test_every_input_and_output_has_a_tooltip(nodes_of_pack: dict[str, Any]) -> None:
    for node_id, node in nodes_of_pack.items():
        for item in (*node.GET_SCHEMA().inputs, *node.GET_SCHEMA().outputs):
            assert item.tooltip and item.tooltip.endswith("."), (node_id, item)
