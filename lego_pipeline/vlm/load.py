"""A VLM, its processor and an adapter from their folders, looked at before they are loaded.

What is no VLM, half downloaded or cut off is named with the argument that it came from; transformers' own messages
speak of model types and of the hub.
"""

import warnings
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.processing_utils import ProcessorMixin

from lego_pipeline.loading import check_component, check_safetensors

NEEDS_PEFT = 'adapters need peft; run `pip install "lego-pipeline[train]"`.'


def load_processor(name: str) -> ProcessorMixin:
    """The processor of a VLM.

    Args:
        name: folder, or name on the model hub.

    Raises:
        ValueError: there is none, or only a tokenizer.
    """
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _no_vlm(name, str(error)) from error
    if not isinstance(processor, ProcessorMixin):
        raise _no_vlm(name, f"{type(processor).__name__} instead of a processor of images and text")
    return processor


def load_vlm(name: str, **options: Any) -> Any:
    """A VLM; a folder's files are checked first.

    Args:
        name: folder, or name on the model hub.
        **options: of transformers' `from_pretrained`, e.g. `dtype`.

    Raises:
        FileNotFoundError: a folder without config or weights.
        ValueError: no VLM, or weights that are cut off.
    """
    if Path(name).is_dir():
        check_component(Path(name))
    try:
        return AutoModelForImageTextToText.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise _no_vlm(name, str(error)) from error


def load_adapter(vlm: Any, folder: Path) -> Any:
    """A VLM with the adapter of a folder around it, not merged.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: its weights are cut off, or it is one of another model.
        ImportError: peft is missing.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(NEEDS_PEFT) from error
    weights = folder / "adapter_model.safetensors"
    for file in (folder / "adapter_config.json", weights):
        if not file.is_file():
            raise FileNotFoundError(
                f"`adapter` must be a folder that peft saved, found no {file.name} in {folder}; pass "
                "OUTPUT_DIR/adapter of a run of tune_vlm."
            )
    check_safetensors(weights)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # which would stay at random values
            return PeftModel.from_pretrained(vlm, str(folder))
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ValueError(
            f"`adapter` must be one of the VLM it is given for, got {folder} ({_first_line(str(error))}); pass the "
            "VLM that it was tuned from."
        ) from error


def _no_vlm(name: str, reason: str) -> ValueError:
    return ValueError(
        f"`vlm` must be a folder with a VLM and its processor, or a hub name that can be reached, got {name} "
        f"({_first_line(reason)}); pass the folder."
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"
