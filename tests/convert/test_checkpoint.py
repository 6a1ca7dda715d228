"""Files of unknown origin: tensors come out, and nothing in them runs."""

import collections
import contextlib
import io
import os
import pickle
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lego_pipeline.convert.checkpoint import globals_of, read_tensors

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor(3)}


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that a malicious pickle would make."""
    return tmp_path / "was_run"


def zip_with(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name.replace('_pkl', '.pkl')}", data)
        archive.writestr("archive/version", "3\n")
    return path


def system(mark: Path) -> Calls:
    return Calls(os.system, f"touch {mark}")


def attack_os_system(path: Path, mark: Path) -> str:
    torch.save({"state_dict": {"x": system(mark)}}, path)
    return "posix.system" if os.name == "posix" else "nt.system"


def attack_by_a_nested_reduce(path: Path, mark: Path) -> str:
    inner = Calls(eval, f"open({str(mark)!r}, 'w').close()")
    torch.save({"state_dict": collections.OrderedDict(x=[(Calls(print, inner),)])}, path)
    return "builtins.eval, builtins.print"


def attack_through_getattr(path: Path, mark: Path) -> str:
    # getattr(__import__("os"), "system")("touch ..."): only two harmless looking globals are named
    code = b"\x80\x02c__builtin__\ngetattr\n(c__builtin__\n__import__\n(X\x02\x00\x00\x00ostRX\x06\x00\x00\x00systemtR"
    command = f"touch {mark}".encode()
    zip_with(path, data_pkl=code + b"(X" + len(command).to_bytes(4, "little") + command + b"tR.")
    return "builtins.__import__, builtins.getattr"


def attack_by_a_later_protocol(path: Path, mark: Path) -> str:
    zip_with(path, data_pkl=pickle.dumps({"state_dict": {"x": system(mark)}}, protocol=4))
    return "posix.system" if os.name == "posix" else "nt.system"


def attack_by_a_second_pickle(path: Path, mark: Path) -> str:
    torch.save({"state_dict": TENSORS}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/other.pkl", pickle.dumps(system(mark)))
    return "one pickle, data.pkl"


def attack_in_the_old_layout(path: Path, mark: Path) -> str:
    torch.save({"state_dict": {"x": system(mark)}}, path, _use_new_zipfile_serialization=False)
    return "posix.system" if os.name == "posix" else "nt.system"


def attack_in_a_legacy_tar(path: Path, mark: Path) -> str:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(system(mark))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return "a tar file"


def attack_as_a_bare_pickle(path: Path, mark: Path) -> str:
    path.write_bytes(pickle.dumps(system(mark), protocol=0))
    return "posix.system" if os.name == "posix" else "nt.system"


def attack_by_a_class_of_its_own(path: Path, mark: Path) -> str:
    module = types.ModuleType("foreign_program")
    kind = type("Settings", (), {"__module__": "foreign_program", "__setstate__": lambda self, _: mark.touch()})
    module.Settings = kind
    sys.modules["foreign_program"] = module  # importable, as a malicious package beside the file would be
    try:
        settings = kind()
        settings.value = 1
        torch.save({"state_dict": TENSORS, "settings": settings}, path)
    finally:
        del sys.modules["foreign_program"]
    return "foreign_program.Settings"


def attack_by_a_pickle_in_a_storage(path: Path, mark: Path) -> str:
    inner = io.BytesIO()
    torch.save(system(mark), inner)
    torch.save({"state_dict": {"x": Calls(torch.storage._load_from_bytes, inner.getvalue())}}, path)
    return "torch.storage._load_from_bytes"


def attack_in_capital_letters(path: Path, mark: Path) -> str:
    harmless, harmful = (
        pickle.dumps({"state_dict": x}, protocol=2) for x in (TENSORS["a.count"].item(), system(mark))
    )
    zip_with(path, **{"DATA.PKL": harmful, "data_pkl": harmless})
    return "one pickle, data.pkl"


def attack_before_a_harmless_zip(path: Path, mark: Path) -> str:
    torch.save({"state_dict": TENSORS}, path)
    harmless = path.read_bytes()
    name = attack_in_the_old_layout(path, mark)
    path.write_bytes(path.read_bytes() + harmless)
    return name


def attack_under_a_harmless_name(path: Path, mark: Path) -> str:
    # "posix", "system" on the stack, and above them "torch", "Size", which are taken off again before they are used
    strings = [b"X" + len(s).to_bytes(4, "little") + s for s in (b"posix", b"system", b"torch", b"Size")]
    command = f"touch {mark}".encode()
    code = b"\x80\x04" + strings[0] + strings[1] + strings[2] + b"0" + strings[3] + b"0\x93("
    zip_with(path, data_pkl=code + b"X" + len(command).to_bytes(4, "little") + command + b"tR.")
    return "it was refused"


@pytest.mark.parametrize("opcode", [b"c%b\n%b\n(%btR", b"(%b\x69%b\n%b\n"])
def test_dotted_names_and_old_opcodes_are_seen(tmp_path: Path, mark: Path, opcode: bytes) -> None:
    argument = b"S'touch " + str(mark).encode() + b"'\n"
    parts = (b"torch", b"os.system", argument) if opcode.startswith(b"c") else (argument, b"torch", b"os.system")
    zip_with(tmp_path / "model.ckpt", data_pkl=opcode % parts + b".")
    with pytest.raises(ValueError, match=r"reading it would use torch\.os\.system"):
        read_tensors(tmp_path / "model.ckpt")
    assert not mark.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little"),  # bytes of 4 EiB
        b"\x80\x02\x86.",  # a pair of nothing
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04K\x05K\x06tR.",  # a tensor of a number
        b"\x80\x02cargparse\nNamespace\n)\x81X\x01\x00\x00\x00aK\x01s.",  # an item of a stand-in
    ],
)
@pytest.mark.parametrize("in_a_zip", [True, False])
def test_nonsense_is_refused_in_one_line(tmp_path: Path, code: bytes, in_a_zip: bool) -> None:
    path = tmp_path / "model.ckpt"
    if in_a_zip:
        zip_with(path, data_pkl=code)
    else:
        path.write_bytes(code)
    with pytest.raises(ValueError, match="must be") as raised:
        read_tensors(path)
    assert "\n" not in str(raised.value)


ATTACKS = [value for name, value in globals().items() if name.startswith("attack_")]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_in_a_malicious_file_runs(attack: Callable[[Path, Path], str], tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "model.ckpt"
    named = attack(path, mark)
    with pytest.raises(ValueError, match="must") as raised:
        read_tensors(path)
    assert not mark.exists()
    assert named in str(raised.value)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_runs_where_foreign_objects_are_ignored(
    attack: Callable[[Path, Path], str], tmp_path: Path, mark: Path
) -> None:
    attack(tmp_path / "model.ckpt", mark)
    with contextlib.suppress(ValueError):
        tensors = read_tensors(tmp_path / "model.ckpt", ignore_foreign=True)
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    assert not mark.exists()


def test_foreign_objects_beside_the_weights_are_ignored_if_asked(tmp_path: Path, mark: Path) -> None:
    attack_by_a_class_of_its_own(tmp_path / "model.ckpt", mark)
    assert read_tensors(tmp_path / "model.ckpt", ignore_foreign=True).keys() == TENSORS.keys()


def test_weights_below_model_are_found(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "epoch": 3}, tmp_path / "model.pth")
    assert read_tensors(tmp_path / "model.pth").keys() == TENSORS.keys()


def test_the_attacks_would_work(tmp_path: Path, mark: Path) -> None:
    attack_through_getattr(tmp_path / "model.ckpt", mark)
    with zipfile.ZipFile(tmp_path / "model.ckpt") as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert mark.exists()


@pytest.mark.parametrize("new_layout", [True, False])
def test_a_state_dict_is_found_and_read(tmp_path: Path, new_layout: bool) -> None:
    path = tmp_path / "model.ckpt"
    half = torch.ones(2, dtype=torch.bfloat16)
    state = collections.OrderedDict(**TENSORS, half=half, p=torch.nn.Parameter(torch.ones(1)))
    torch.save({"epoch": 3, "state_dict": state}, path, _use_new_zipfile_serialization=new_layout)
    found = read_tensors(path)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)
    assert not found["p"].requires_grad


def test_bare_tensors_and_safetensors_are_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.bin")
    save_file(TENSORS, tmp_path / "model.safetensors")
    for name in ("model.bin", "model.safetensors"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)


def test_bookkeeping_of_lightning_is_replaced_by_objects_that_do_nothing(tmp_path: Path) -> None:
    names = "pytorch_lightning.callbacks.model_checkpoint"
    made = []
    for part in range(1, 4):
        module = types.ModuleType(".".join(names.split(".")[:part]))
        sys.modules[module.__name__] = module
        made.append(module.__name__)
    kind = type("ModelCheckpoint", (), {"__module__": names, "__setstate__": lambda *_: pytest.fail("was run")})
    sys.modules[names].ModelCheckpoint = kind
    try:
        best = collections.defaultdict(dict, score=torch.tensor(0.5))
        callbacks = {kind: {"best": best}, "instance": kind()}
        torch.save({"state_dict": TENSORS, "callbacks": callbacks}, tmp_path / "last.ckpt")
        assert read_tensors(tmp_path / "last.ckpt").keys() == TENSORS.keys()
    finally:
        for name in made:
            del sys.modules[name]


def test_dicts_of_other_programs_are_read_as_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "pytorch_lightning.utilities.parsing"
    for part in range(1, 4):
        name = ".".join(names.split(".")[:part])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("AttributeDict", (dict,), {"__module__": names})
    sys.modules[names].AttributeDict = kind
    content = {"hyper_parameters": kind(lr=0.1), "milestones": collections.Counter([3]), "kept": {1, 2}}
    torch.save({"state_dict": TENSORS, **content}, tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, names)
    assert read_tensors(tmp_path / "last.ckpt").keys() == TENSORS.keys()


def test_the_global_list_of_safe_names_is_left_alone(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": TENSORS, "x": collections.defaultdict(dict)}, tmp_path / "last.ckpt")
    read_tensors(tmp_path / "last.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_names_put_together_from_strings_are_found() -> None:
    data = pickle.dumps([system(Path("x")), system(Path("y"))], protocol=4)
    assert set(globals_of(io.BytesIO(data))) == {"posix.system" if os.name == "posix" else "nt.system"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.ones(1), "b": 3}}, "1 entries of another kind: b"),
        ({}, "must hold a dict of tensors"),
        ([torch.ones(1)], "must hold a dict of tensors, got list"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "model.ckpt")


@pytest.mark.parametrize("size", [0, 10, 0.5, 0.95])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, size: float) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(size if size > 1 else size * len(data))])
    with pytest.raises(ValueError, match="download it again"):
        read_tensors(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, found in ((tmp_path / "none.ckpt", "nothing"), (tmp_path, "a folder")):
        with pytest.raises(FileNotFoundError, match=f"`checkpoint` must be a file, found {found}"):
            read_tensors(path)
