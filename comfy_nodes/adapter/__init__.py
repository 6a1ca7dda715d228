"""Everything that reaches into ComfyUI: its own model, text encoder and VAE objects, memory, folders, progress.

The nodes use ComfyUI's public node API and this folder, and nothing else of the pack knows an inner name, so that a
change in ComfyUI is repaired here. Tried with ComfyUI 0.16.3 and 0.30.0 (`tests/comfy`).

ComfyUI's own loaders don't load a LEGO checkpoint: they know one 4-channel latent, one vocabulary and a fixed list of
UNet sizes, and where something doesn't fit they leave weights uninitialised and log a line. Here every weight has to
find its place, or the load ends with a message.
"""

from .checkpoint import (
    DTYPES,
    PipelineHandle,
    VlmHandle,
    add_lora,
    encode_condition,
    enhance_then_return,
    load_pipeline,
    load_vlm,
    without_models,
)
from .folders import (
    EMBEDDED,
    annotation_files,
    cache_folders,
    cache_to_write,
    folder_of,
    lora_folders,
    metrics_folder,
    pairs_to_write,
    pipeline_folders,
    register_folder,
    state_of,
    video_folders,
    vlm_folders,
)
from .model import two_scale_guider
from .runtime import progress, step_callback, stop_if_asked, watched
from .vae import encode, pixels_per_cell

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "PipelineHandle",
    "VlmHandle",
    "add_lora",
    "annotation_files",
    "cache_folders",
    "cache_to_write",
    "encode",
    "encode_condition",
    "enhance_then_return",
    "folder_of",
    "load_pipeline",
    "load_vlm",
    "lora_folders",
    "metrics_folder",
    "pairs_to_write",
    "pipeline_folders",
    "pixels_per_cell",
    "progress",
    "register_folder",
    "state_of",
    "step_callback",
    "stop_if_asked",
    "two_scale_guider",
    "video_folders",
    "vlm_folders",
    "watched",
    "without_models",
]
