"""The pack in a real ComfyUI server on the CPU, through HTTP: a whole graph, errors on nodes, cancel, free."""

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from transformers import AutoConfig, LlavaForConditionalGeneration

from lego_pipeline.checkpoints import KITCHEN

pytestmark = pytest.mark.slow

VLM_WIDTH = 64 * 512  # of the feed-forward layers, 64 times the embedded VLM's: some 300 MB


def error_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The message that the node shows."""
    assert entry["status"]["status_str"] == "error", entry["status"]
    return next(content for name, content in entry["status"]["messages"] if name == "execution_error")


def graph(action: str = "open drawer", steps: Any = None, **changes: Any) -> dict[str, Any]:
    """One action frame with the stock sampling nodes, in API form."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}

    nodes = {
        "image": node("LoadImage", image="frame.png"),
        "load": node("LegoLoadPipeline", model="kitchen (embedded)", dtype="auto"),
        "vlm": node("LegoLoadVlm", model="kitchen (embedded)", dtype="auto"),
        "enhance": node("LegoEnhancePrompt", lego_vlm=["vlm", 0], image=["image", 0], action=action, seed=0),
        "frame": node("LegoEncodeFrame", lego_pipeline=["load", 3], vae=["load", 2], image=["image", 0], resolution=0),
        "condition": node(
            "LegoEncodeCondition",
            lego_pipeline=["load", 3],
            clip=["load", 1],
            image_latent=["frame", 1],
            lego_enhancement=["enhance", 0],
        ),
        "guider": node(
            "LegoGuidance",
            model=["load", 0],
            condition=["condition", 0],
            image_only=["condition", 1],
            null=["condition", 2],
            guidance_scale=["load", 5],
            image_guidance_scale=["load", 6],
        ),
        "noise": node("RandomNoise", noise_seed=0),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node(
            "BasicScheduler",
            model=["load", 0],
            scheduler="normal",
            steps=["load", 4] if steps is None else steps,
            denoise=1.0,
        ),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["condition", 3],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "restore": node("LegoRestoreSize", image=["decode", 0], lego_size=["frame", 2]),
        "save": node("SaveImage", images=["restore", 0], filename_prefix="action"),
    }
    for name, inputs in changes.items():
        nodes[name]["inputs"] |= inputs
    return nodes


def test_the_pack_is_loaded_with_all_its_nodes(server: Any) -> None:
    known = server.get("/object_info")
    contract = json.loads((Path(__file__).parent / "contract.json").read_text(encoding="utf-8"))
    assert {name for name in known if name.startswith("Lego")} == set(contract)
    assert known["LegoLoadPipeline"]["python_module"] == "custom_nodes.lego-pipeline"
    lines = [line for line in server.log.read_text().splitlines() if "lego-pipeline" in line]
    assert not [line for line in lines if "IMPORT FAILED" in line], lines


def test_a_graph_gives_a_picture_of_the_frames_size(server: Any) -> None:
    entry = server.run(graph())
    assert entry["status"]["status_str"] == "success", entry["status"]
    with PIL.Image.open(server.base / "input" / "frame.png") as frame:
        assert server.picture(entry).size == frame.size
    assert entry["outputs"]["enhance"]["text"][0]


def test_bad_input_is_an_error_on_the_node_and_the_server_goes_on(server: Any) -> None:
    error = error_of(server.run(graph(action=" ")))
    assert error["node_id"] == "enhance" and "`action` must have a text" in error["exception_message"]
    answer = server.post("/prompt", {"prompt": graph(load={"model": "../../etc"})})
    assert "load" in answer["node_errors"]
    PIL.Image.new("RGB", (1, 1)).save(server.base / "input" / "pixel.png")
    error = error_of(server.run(graph(image={"image": "pixel.png"})))
    assert "must be at least 8 pixels" in error["exception_message"]
    assert server.run(graph())["status"]["status_str"] == "success"


def test_large_pictures_and_pictures_with_alpha_run(server: Any) -> None:
    PIL.Image.new("RGBA", (8000, 5000), (90, 120, 40, 128)).save(server.base / "input" / "large.png")
    entry = server.run(graph(image={"image": "large.png"}, save={"images": ["decode", 0]}))
    assert entry["status"]["status_str"] == "success", entry["status"]


async def cancelled(server: Any, content: dict[str, Any], after: int) -> int:
    """Steps that a run has done when it ends, which is cancelled when it has done some."""
    import aiohttp

    done = 0
    async with (
        asyncio.timeout(240),
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{server.url.replace('http', 'ws')}/ws?clientId=cancel", max_msg_size=0) as socket,
    ):
        prompt_id = server.start(content, "cancel")
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:  # a preview
                continue
            said = json.loads(message.data)
            assert said["type"] not in ("execution_success", "execution_error"), said
            if said["type"] == "execution_interrupted":
                break
            if said["type"] == "progress" and said["data"]["node"] == "sample":
                done = said["data"]["value"]
                if done == after:
                    server.post("/interrupt", {"prompt_id": prompt_id})
    return done


def test_cancel_ends_a_run_within_one_step(server: Any) -> None:
    """At four times the checkpoint's side, so that a step takes longer than a message."""
    slow = graph(steps=900, noise={"noise_seed": 5}, frame={"resolution": 512})
    assert asyncio.run(cancelled(server, slow, after=2)) in (2, 3)
    assert server.run(graph())["status"]["status_str"] == "success"


def test_free_gives_the_vlms_memory_back(server: Any) -> None:
    """With a VLM large enough to be seen in the memory of the server's process."""
    psutil = pytest.importorskip("psutil")
    config = AutoConfig.from_pretrained(KITCHEN / "vlm")
    config.text_config.intermediate_size = VLM_WIDTH
    folder = server.base / "models" / "lego" / "large"
    vlm = LlavaForConditionalGeneration(config)
    size = sum(weight.numel() * weight.element_size() for weight in vlm.parameters())
    vlm.save_pretrained(folder)
    for path in (KITCHEN / "vlm_processor").iterdir():
        shutil.copy(path, folder)
    asked = graph(vlm={"model": "large"}) | {
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["enhance", 1]}, "_meta": {"title": "show"}}
    }
    asked = {name: asked[name] for name in ("image", "vlm", "enhance", "show")}
    process = psutil.Process(server.process.pid)
    assert server.run(asked)["status"]["status_str"] == "success"
    loaded = process.memory_info().rss
    for _ in range(10):  # ComfyUI overlooks what comes while it tidies up after a run
        server.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1)
    assert loaded - process.memory_info().rss >= 0.9 * size, (loaded, process.memory_info().rss, size)
    assert server.run(asked)["status"]["status_str"] == "success"
    shutil.rmtree(folder)
