"""VLM and pipeline in ComfyUI's memory management: loaded for use, freed when asked, never held on to."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

KITCHEN = "kitchen (embedded)"

pytestmark = pytest.mark.slow


def held(management: Any) -> set[int]:
    """Patchers that ComfyUI counts as loaded."""
    return {id(loaded.model) for loaded in management.current_loaded_models if loaded.model is not None}


def test_the_vlm_is_loaded_for_use_and_freed_with_the_others(run_node: Callable[..., Any], comfyui: Path) -> None:
    import comfy.model_management as management

    (vlm,) = run_node("LegoLoadVlm", model=KITCHEN, dtype="auto")
    assert id(vlm.patcher) not in held(management)
    run_node("LegoEnhancePrompt", lego_vlm=vlm, image=torch.rand(1, 128, 128, 3), action="open drawer", seed=0)
    assert id(vlm.patcher) in held(management)
    management.unload_all_models()  # what POST /free does
    assert id(vlm.patcher) not in held(management)


@pytest.mark.parametrize("node_id", ["LegoLoadVlm", "LegoLoadPipeline"])
def test_nothing_holds_a_model_whose_node_output_is_gone(
    node_id: str, run_node: Callable[..., Any], comfyui: Path
) -> None:
    import comfy.model_management as management

    outputs = run_node(node_id, model=KITCHEN, dtype="auto")
    if node_id == "LegoLoadVlm":
        run_node("LegoEnhancePrompt", lego_vlm=outputs[0], image=torch.rand(1, 128, 128, 3), action="wave", seed=0)
        models = [weakref.ref(outputs[0].pipe.vlm)]
    else:
        models = [weakref.ref(outputs[0].model), weakref.ref(outputs[3].pipeline().unet)]
    management.unload_all_models()
    del outputs
    gc.collect()
    assert [model() for model in models] == [None] * len(models)
