"""The example workflows: their files, and each of them run by the real server through HTTP and websocket.

`make comfy-pictures` writes the thumbnails anew from what the runs give, for a new embedded checkpoint.
"""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
CONTRACT = json.loads((ROOT / "tests" / "comfy" / "contract.json").read_text(encoding="utf-8"))
WRITE_THUMBNAILS = bool(os.environ.get("LEGO_WRITE_PICTURES"))
NOTES = ("MarkdownNote", "Note")
RUN_SECONDS = 240
ToApi = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem.replace(" ", "_"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def set_seeds(graph: dict[str, Any], seed: int) -> None:
    for node in graph.values():
        for name in node["inputs"].keys() & {"noise_seed", "seed"}:
            node["inputs"][name] = seed


async def watch(server: Any, graph: dict[str, Any]) -> tuple[str, list[dict[str, Any]], int]:
    """Queues a graph and listens until it has ended: its id, the server's messages, and the number of previews."""
    import aiohttp

    address = server.url.replace("http", "ws") + "/ws?clientId=watch"
    messages, previews = [], 0
    async with (
        asyncio.timeout(RUN_SECONDS),
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
    ):
        prompt_id = server.start(graph, "watch")
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                previews += 1
                continue
            messages.append(json.loads(message.data))
            data = messages[-1]["data"]
            if messages[-1]["type"] == "executing" and data["node"] is None and data["prompt_id"] == prompt_id:
                break
    return prompt_id, messages, previews


def test_there_is_a_workflow_for_each_use() -> None:
    used = {path.stem: {node["type"] for node in read(path)["nodes"]} for path in WORKFLOWS}
    assert len(used) == 6
    # These need files or true frames that aren't there for everybody.
    assert set().union(*used.values()) >= set(CONTRACT) - {"LegoLoadLora", "LegoCuratePairs", "LegoScore"}
    assert any("DualCFGGuider" in types for types in used.values())


@each_workflow
def test_a_workflow_file_is_whole(path: Path) -> None:
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert nodes.keys() == {*range(1, len(nodes) + 1)} and any(node["type"] in NOTES for node in nodes.values())
    for number, source, out, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert nodes[source]["outputs"][out]["type"] == kind
    for node in nodes.values():
        if node["type"] in CONTRACT:
            contract = CONTRACT[node["type"]]
            assert sorted(socket["name"] for socket in node["inputs"]) == sorted(i[0] for i in contract["inputs"])
            assert [socket["name"] for socket in node["outputs"]] == [out[0] for out in contract["outputs"]]
        if node["type"] in ("LegoLoadPipeline", "LegoLoadVlm"):
            assert node["widgets_values"][0] == "kitchen (embedded)"


@each_workflow
def test_a_workflow_has_a_thumbnail(path: Path) -> None:
    file = path.with_suffix(".jpg")
    with PIL.Image.open(file) as thumbnail:
        assert thumbnail.format == "JPEG" and min(thumbnail.size) >= 256
    assert file.stat().st_size < 150_000


def test_comfyui_finds_no_workflow_elsewhere() -> None:
    """These folders are searched for templates too."""
    assert not [
        file for name in ("example", "examples", "workflow", "workflows") for file in ROOT.glob(f"{name}/*.json")
    ]


@pytest.mark.slow
@each_workflow
def test_a_workflow_runs(path: Path, server: Any, to_api: ToApi) -> None:
    known = server.get("/object_info")
    graph = to_api(read(path), known)
    assert not [node["class_type"] for node in graph.values() if known[node["class_type"]].get("deprecated")]
    if not WRITE_THUMBNAILS:
        set_seeds(graph, 1)  # the frontend's test may have left results of the seeds in the file
    prompt_id, messages, previews = asyncio.run(watch(server, graph))
    entry = server.finish(prompt_id)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert previews, "no live preview came"
    progressing = {m["data"]["node"] for m in messages if m["type"] == "progress" and m["data"]["max"] > 1}
    painting = {
        key for key, node in graph.items() if node["class_type"] in ("SamplerCustomAdvanced", "LegoPaintStoryboard")
    }
    assert painting <= progressing
    picture = server.picture(entry)
    assert min(picture.size) >= 128 and picture.convert("L").getextrema() != (0, 0)
    if WRITE_THUMBNAILS:
        draw_thumbnail(picture).save(path.with_suffix(".jpg"), quality=88, optimize=True)


def draw_thumbnail(picture: PIL.Image.Image, side: int = 512) -> PIL.Image.Image:
    """The picture on a square, as cards of the template browser are."""
    scale = side / max(picture.size)
    resized = picture.resize([round(length * scale) for length in picture.size], PIL.Image.Resampling.LANCZOS)
    square = PIL.Image.new("RGB", (side, side), picture.getpixel((0, 0)))
    square.paste(resized, ((side - resized.width) // 2, (side - resized.height) // 2))
    return square


@pytest.mark.slow
def test_memory_stays_the_same_over_twenty_runs(server: Any, to_api: ToApi) -> None:
    psutil = pytest.importorskip("psutil")
    path = next(path for path in WORKFLOWS if "action frame" in path.stem)
    graph, sizes = to_api(read(path), server.get("/object_info")), []
    process = psutil.Process(server.process.pid)
    for run in range(20):
        set_seeds(graph, run)
        assert server.run(graph)["status"]["status_str"] == "success"
        sizes.append(process.memory_info().rss)
    assert sizes[19] <= 1.02 * sizes[4], [round(size / 2**20) for size in sizes]
