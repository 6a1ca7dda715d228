"""The pack in a real ComfyUI server on the CPU, through HTTP: a whole graph, errors on nodes, cancel, free."""

import json
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

pytestmark = pytest.mark.slow


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


def test_cancel_ends_a_run(server: Any) -> None:
    prompt_id = server.start(graph(steps=900, noise={"noise_seed": 5}))
    time.sleep(3)
    server.post("/interrupt", {"prompt_id": prompt_id})
    status = server.finish(prompt_id)["status"]
    assert any(name == "execution_interrupted" for name, _ in status["messages"]), status


def test_free_unloads_and_the_next_run_works(server: Any) -> None:
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    assert server.run(graph())["status"]["status_str"] == "success"
