"""Looks at a pipeline folder before it is loaded, so that a broken one is named file by file.

Loading a folder that is no checkpoint, half downloaded or cut off otherwise ends in an error about state dicts or byte
offsets. Only headers and small JSON files are read here: the header of a safetensors file says how long the file has
to be. Also what `LegoPipeline.save_pretrained` adds to a folder.
"""

import json
import os
import shutil
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

CONFIG_NAMES = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "vlm_processor": ("processor_config.json", "preprocessor_config.json"),
}
WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
WITHOUT_WEIGHTS = tuple(CONFIG_NAMES)
CLASS_NAME = "LegoPipeline"
PLAIN_DTYPE = "float32"
HUB_ARGUMENTS = ("commit_message", "private", "create_pr", "token")


def check_folder(folder: Path, variant: str | None = None, passed: Collection[str] = ()) -> None:
    """Checks that a folder holds a complete LegoPipeline.

    Args:
        folder: the folder to be loaded.
        variant: of the weight files, e.g. "fp16"; components without it fall back to the plain files, as in diffusers.
        passed: components that the caller passes as objects; their files are not looked at.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: it holds another pipeline, or a file is cut off or unreadable.
    """
    index = folder / "model_index.json"
    if not folder.is_dir() or not index.is_file():
        what = "a folder without `model_index.json`" if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"`{folder}` must be the folder of a LegoPipeline, got {what}; "
            "pass one written by `save_pretrained`, or `lego_pipeline.checkpoints.KITCHEN`."
        )
    config = _read_json(index)
    class_name = config.get("_class_name")
    if class_name != CLASS_NAME and "projector" not in passed:
        raise ValueError(
            f"`{folder}` must hold a {CLASS_NAME}, got {class_name}; load it with its own class and go on with "
            "`LegoPipeline.from_pipe(pipe, projector=...)`."
        )
    for name, value in config.items():
        is_component = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if is_component and name not in passed:
            check_component(folder / name, variant)


def check_component(folder: Path, variant: str | None = None) -> None:
    """Checks that a model's folder holds its config and its weights, whole by their headers.

    Args:
        folder: of one component; the name tells those that have no weights (tokenizer, scheduler, processor).
        variant: as for `check_folder`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut off or unreadable.
    """
    names = CONFIG_NAMES.get(folder.name, ("config.json",))
    configs = [folder / name for name in names if (folder / name).is_file()]
    if not configs:
        raise FileNotFoundError(
            f"`{folder}` must hold `{names[0]}`, found nothing; copy or download the whole checkpoint again."
        )
    _read_json(configs[0])
    if folder.name in WITHOUT_WEIGHTS:
        return
    files = _weight_files(folder, variant) or _weight_files(folder, None)
    if not files:
        others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))) or "none"
        raise FileNotFoundError(
            f"`{folder}` must hold the weights {WEIGHT_NAMES[0]} or {WEIGHT_NAMES[1]} (.safetensors), found {others}; "
            "pass the `variant` of these, or copy or download the whole checkpoint again."
        )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"`{file}` must be there, as the index beside it says; copy or download it again.")
        if file.suffix == ".safetensors":
            check_safetensors(file)


def check_safetensors(path: Path) -> None:
    """Checks that a file is as long as its header says.

    Raises:
        ValueError: it is not, or has no header.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        header_size = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if header_size + 8 > size:
            raise ValueError(f"`{path}` must be a complete safetensors file, got {size} bytes of none; {_AGAIN}")
        try:
            header = json.loads(file.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"`{path}` must have a safetensors header, got none ({error}); {_AGAIN}") from error
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        raise ValueError(f"`{path}` must have {expected} bytes by its header, got {size}; {_AGAIN}")


def is_local(path: str) -> bool:
    """Whether a path is meant as a folder of this machine and not as an id of the model hub ("owner/name")."""
    return os.path.isdir(path) or os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1


def check_dtype(dtype: Any) -> Any:
    """`torch.dtype` of a name such as "float16"; dtypes, and dicts of component name to dtype, go through.

    Raises:
        ValueError: the name is no floating point dtype.
    """
    if isinstance(dtype, dict):
        return {name: check_dtype(value) for name, value in dtype.items()}
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(
            f"`dtype` must be a floating point torch.dtype or its name, got {dtype!r}; "
            'pass "float32", "float16" or "bfloat16".'
        )
    return named


def check_device(device: Any) -> torch.device:
    """`torch.device` of a name such as "cuda:0", if torch can use it here.

    Raises:
        ValueError: the name is unknown, or the device isn't there.
    """
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'`device` must be known to torch, got {device!r}; pass "cpu", "cuda", "cuda:0", "mps" or "xpu".'
        ) from error
    counts = {
        "cuda": torch.cuda.device_count,
        "xpu": torch.xpu.device_count,
        "mps": torch.backends.mps.is_available,
    }
    count = int(counts[named.type]()) if named.type in counts else 1
    if (named.index or 0) >= count:
        raise ValueError(
            f"`device` must be usable here, got {str(device)!r} where torch sees {count} of that type; "
            'pass "cpu" or install a torch that sees the device.'
        )
    return named


def check_placement(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Checks the arguments of a pipeline's `to`; returns the keywords with a dtype's name made a dtype."""
    device = kwargs.get("device", args[0] if args else None)
    if device is not None and not isinstance(device, torch.dtype):
        check_device(device)
    dtype = kwargs.get("dtype")
    return kwargs if dtype is None else {**kwargs, "dtype": check_dtype(dtype)}


def finish_folder(folder: Path) -> None:
    """Adds to a saved folder what makes it load alike everywhere.

    `lego.py` is what `DiffusionPipeline.from_pretrained(folder, custom_pipeline="lego")` looks for. The configs of
    transformers' components are made to say float32: their loader otherwise takes the dtype that the weights were
    saved in, while diffusers' takes float32, and a half-precision text encoder would meet a float32 UNet on the CPU.
    Where the components came from on this machine is nobody's business and left out.
    """
    shutil.copyfile(Path(__file__).with_name("lego.py"), folder / "lego.py")
    for name in ("text_encoder", "vlm"):
        path = folder / name / "config.json"
        if path.is_file():
            config = _with_plain_dtype(json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        text = path.read_text(encoding="utf-8")
        if "_name_or_path" in text:
            config = _without_origin(json.loads(text))
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_bpe_files(folder / "tokenizer")


def write_bpe_files(folder: Path) -> None:
    """Writes vocab.json and merges.txt beside a saved tokenizer.json.

    transformers 5 saves the one file only; readers of the older layout, ComfyUI among them, want the two.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


def _with_plain_dtype(config: dict[str, Any]) -> dict[str, Any]:
    changed = {key: _with_plain_dtype(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: PLAIN_DTYPE if key in ("dtype", "torch_dtype") else value for key, value in changed.items()}


def _without_origin(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    return {key: _without_origin(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Weight files of a component: one file, or the shards that an index names, present or not."""
    infix = f".{variant}" if variant else ""
    for stem in WEIGHT_NAMES:
        for suffix in ("safetensors", "bin"):
            index = folder / f"{stem}.{suffix}.index{infix}.json"
            if index.is_file():
                return [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
            file = folder / f"{stem}{infix}.{suffix}"
            if file.is_file():
                return [file]
    return []


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}` must be JSON, got: {error}; {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got {type(content).__name__}; {_AGAIN}")
    return content


_AGAIN = "copy or download it again."
