"""The ComfyUI tree that COMFYUI_PATH names, on the CPU, with folders of its own: in this process and as a server.

`make test-comfy` fetches a tree, makes an environment that it runs in, and runs these tests there. Without
COMFYUI_PATH everything here that needs ComfyUI is skipped.
"""

import asyncio
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL.Image
import pytest
import torch

from lego_pipeline import images
from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.data.manifest import read_manifest

ROOT = Path(__file__).parent.parent.parent
TREE = os.environ.get("COMFYUI_PATH")
WITHOUT_TREE = "ComfyUI is not here: run `make test-comfy`, or set COMFYUI_PATH to a checkout of ComfyUI"
START_SECONDS, RUN_SECONDS = 240, 240


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ComfyUI's modules made importable; gives its base folder, where models, input and output are."""
    if not TREE:
        pytest.skip(WITHOUT_TREE)
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir()
    sys.path.insert(0, TREE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        comfy.cli_args.args.base_directory = str(base)
        import nodes  # noqa: F401
    yield base
    sys.path.remove(TREE)


@pytest.fixture(scope="session")
def pack(comfyui: Path) -> ModuleType:
    """The pack, loaded from the root `__init__.py` under a name of its own, as ComfyUI does."""
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
    asyncio.run(module.comfy_entrypoint().on_load())
    return module


@pytest.fixture(scope="session")
def adapter(pack: ModuleType) -> ModuleType:
    """`comfy_nodes.adapter`."""
    return sys.modules["pack.comfy_nodes.adapter"]


@pytest.fixture(scope="session")
def nodes_of_pack(pack: ModuleType) -> dict[str, Any]:
    """Node classes by their id."""
    classes = asyncio.run(pack.comfy_entrypoint().get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in classes}


@pytest.fixture(scope="session")
def run_node(nodes_of_pack: dict[str, Any]) -> Callable[..., tuple[Any, ...]]:
    """`run_node("LegoLoadVlm", model=...)` executes a node as ComfyUI does and gives its outputs."""

    def run(node_id: str, **inputs: Any) -> tuple[Any, ...]:
        with torch.inference_mode():
            return nodes_of_pack[node_id].execute(**inputs).result

    return run


class Server:
    """A running ComfyUI.

    Args:
        base: its base folder.
    """

    def __init__(self, base: Path):
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / "lego-pipeline").symlink_to(ROOT)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.base, self.url = base, f"http://127.0.0.1:{port}"
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
                   "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes",
                   "--disable-auto-launch", "--preview-method", "latent2rgb", "--log-stdout"]  # fmt: skip
        self.log = base / "server.log"
        environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=TREE, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self._wait(lambda: self.get("/system_stats"), START_SECONDS)

    def _wait(self, ask: Any, seconds: float) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                found = ask()
            except OSError:
                found = None
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"nothing after {seconds} s: {self.log.read_text()[-3000:]}")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, content: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else None

    def start(self, graph: dict[str, Any], client: str = "") -> str:
        answer = self.post("/prompt", {"prompt": graph, "client_id": client})
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def finish(self, prompt_id: str) -> dict[str, Any]:
        return self._wait(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), RUN_SECONDS)

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        return self.finish(self.start(graph))

    def picture(self, entry: dict[str, Any]) -> PIL.Image.Image:
        """The last picture that a run saved."""
        found = [image for output in entry["outputs"].values() for image in output.get("images", [])][-1]
        path = f"/view?filename={found['filename']}&subfolder={found['subfolder']}&type={found['type']}"
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return PIL.Image.open(io.BytesIO(answer.read())).convert("RGB")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests, with the picture frame.png in its input folder."""
    if not TREE:
        pytest.skip(WITHOUT_TREE)
    running = Server(tmp_path_factory.mktemp("server") / "base")
    row = read_manifest(FRAMES)[0]
    images.to_rgb(row["image_0"]).save(running.base / "input" / "frame.png")
    yield running
    running.process.terminate()
    running.process.wait(30)


@pytest.fixture(scope="session")
def to_api() -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    """`to_api(workflow, object_info)`: a saved workflow as it is queued."""
    return api_form


def api_form(workflow: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The form in which a workflow is queued; `test_browser.py` holds it against what the frontend sends.

    Args:
        workflow: as saved by the frontend: values of widgets stand in the order of the widgets.
        known: the server's `/object_info`.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in ("MarkdownNote", "Note"):
            continue
        described = known[node["type"]]["input"]
        specs = {**described["required"], **described.get("optional", {})}
        inputs, values = {}, list(node.get("widgets_values", []))
        for entry in node["inputs"]:
            name = entry["name"]
            if name not in specs:
                continue
            if "widget" in entry:
                inputs[name] = values.pop(0)
                if len(specs[name]) > 1 and specs[name][1].get("control_after_generate"):
                    values.pop(0)
            if entry.get("link") is not None:
                inputs[name] = sources[entry["link"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node["type"]}}
    return graph
