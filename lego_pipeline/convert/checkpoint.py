"""Tensors out of a checkpoint file of unknown origin, without running anything that is in it.

A `.ckpt`, `.pt` or `.bin` file is a pickle, and a pickle may name any function to be called while it is read. So every
global that the file names is listed first, by a walk over its opcodes, and compared with a list of what tensors need.
Bookkeeping of PyTorch Lightning and numpy is replaced by objects that do nothing; any other name is refused. What is
left is read by `torch.load(weights_only=True)`, which has a list of its own. Files of tensors are mapped into memory
and not copied.
"""

import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from lego_pipeline.loading import check_safetensors

# What a pickled state dict names: containers, storages, dtypes and the functions that put a tensor together. Of
# `torch.storage` two classes alone: its `_load_from_bytes` reads another pickle.
TENSOR_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
    r"|torch\.(Size|Tensor|device|storage\.(Typed|Untyped)Storage|\w+Storage)"
    r"|torch\.(u?int\d+|float\d+\w*|bfloat16|double|half|float|long|int|short|bool|complex\d+)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch\.nn\.parameter\.Parameter"
)


class Inert:
    """Stands in for an object of another program; takes any arguments and any state, and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertDict:
    """Stands in for dict classes: a new dict, which is filled while a pickle is read."""

    def __new__(cls, *_: Any) -> Any:
        return {}


# Bookkeeping beside the weights in checkpoints of PyTorch Lightning, by full name.
STAND_INS: dict[str, Any] = {
    name: Inert
    for name in (
        "argparse.Namespace",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "pathlib.PosixPath",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "typing.Any",
        "builtins.dict",
        "builtins.list",
        "builtins.int",
        "builtins.float",
        "builtins.str",
    )
} | {name: InertDict for name in ("collections.defaultdict", "pytorch_lightning.utilities.parsing.AttributeDict")}


def read_tensors(path: Path, *, ignore_foreign: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, mapped into memory where the format allows.

    Args:
        path: a .safetensors file, or one that torch saved. A dict with a `state_dict` or a `model` is entered.
        ignore_foreign: put an object that does nothing in the place of every global that isn't allowed, instead of
            refusing the file; nothing of theirs is imported or run either way.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names a global that isn't allowed, is cut off, or holds no state dict.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"`checkpoint` must be a file, found {found} at {path}; check the path.")
    if path.suffix == ".safetensors":
        check_safetensors(path)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"`{path}` must be a safetensors file, got: {error}; download it again.") from error
    content = _read_pickled(path, ignore_foreign)
    state = content
    if isinstance(content, dict):
        inner = (content.get(name) for name in ("state_dict", "model"))
        state = next((value for value in inner if isinstance(value, dict)), content)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"`{path}` must hold a dict of tensors, got {type(state).__name__}; pass a checkpoint.")
    wrong = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise ValueError(
            f"`{path}` must hold tensors by name, got {len(wrong)} entries of another kind: {', '.join(wrong[:8])}; "
            "pass a checkpoint whose `state_dict`, or whose whole content, is tensors."
        )
    return {str(name): value.detach() for name, value in state.items()}


def _read_pickled(path: Path, ignore_foreign: bool) -> Any:
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as torch decides; `zipfile` would also take a zip behind a pickle
    names: set[str] = set()
    broken: Exception | None = None
    try:
        for name in _zip_globals(path) if is_zip else _legacy_globals(path):
            names.add(name)
    except Exception as error:  # a broken or hostile file can raise anything, a MemoryError as well
        broken = error
    foreign = sorted(name for name in names if name not in STAND_INS and not TENSOR_GLOBALS.fullmatch(name))
    # Torch's reader has a list of its own, on which none of the others stand: names of torch are never ignored.
    refused = [name for name in foreign if not ignore_foreign or name.startswith("torch.")]
    if refused:
        raise ValueError(
            f"`{path}` must hold nothing but tensors, but reading it would use {', '.join(refused)}; it was refused "
            "and nothing of it was run. Ask whoever made it for a .safetensors file."
        )
    if broken is not None:
        raise ValueError(
            f"`{path}` must be a whole file that torch saved, got: {_reason(broken)}; download it again."
        ) from broken
    known: dict[str, Any] = {**dict.fromkeys(foreign, Inert), **STAND_INS}
    stand_ins: list[Any] = [(known[name], name) for name in sorted(names & known.keys())]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        raise ValueError(
            f"`{path}` must be a state dict that torch saved, got: {_reason(error)}; it was refused. Download it "
            "again, or ask whoever made it for a .safetensors file."
        ) from error


def _reason(error: Exception) -> str:
    """One line of an error; of torch's long text on unsafe files, what it says about this one."""
    unpickler = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return (unpickler[1] if unpickler else str(error).strip() or type(error).__name__).splitlines()[0].strip()


def _zip_globals(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        # In any case of letters: torch's reader takes DATA.PKL for data.pkl.
        pickles = [name for name in archive.namelist() if name.lower().endswith((".pkl", ".pickle"))]
        if len(pickles) != 1 or Path(pickles[0]).name != "data.pkl":
            raise ValueError(f"a zip must hold one pickle, data.pkl, and this one has {', '.join(pickles) or 'none'}")
        with archive.open(pickles[0]) as file:
            yield from globals_of(file)


def _legacy_globals(path: Path) -> Iterator[str]:
    """Of the layout before torch 1.6: magic number, version, system, content, storage names, then raw bytes."""
    if tarfile.is_tarfile(path):
        raise ValueError("a tar file, which torch wrote before version 0.1.10 and which can't be read safely")
    with open(path, "rb") as file:
        for _ in range(5):
            yield from globals_of(file)


def globals_of(file: IO[bytes]) -> Iterator[str]:
    """Full names of the globals in one pickle, read as opcodes; the file is left behind its end.

    A name that STACK_GLOBAL puts together from strings is the likeliest one, to tell the user: torch's unpickler
    doesn't know that opcode and refuses the file whatever the name is.
    """
    memo: dict[Any, Any] = {}  # by number
    strings: list[str] = []
    last: Any = None
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "GLOBAL" | "INST":
                yield re.sub(r"^__builtin__\.", "builtins.", str(argument).replace(" ", "."))  # Python 2's name
            case "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            case "EXT1" | "EXT2" | "EXT4":
                yield f"copyreg extension {argument}"
            case "MEMOIZE":
                memo[len(memo)] = last
                continue
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = last
                continue
            case "GET" | "BINGET" | "LONG_BINGET":
                argument = memo.get(argument)
        last = argument if isinstance(argument, str) and opcode.name not in ("GLOBAL", "INST") else None
        if last is not None:
            strings.append(last)
