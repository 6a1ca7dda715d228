"""`lego doctor`: what is installed, what the machine has, whether the checkpoint is whole, what to do about gaps."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "lego-pipeline"
GIB = 1 << 30
AGAIN = "install the package again, or make it with `make kitchen ARGS=--export`"


@dataclass(kw_only=True)
class Doctor:
    """Report versions, device, attention, memory, checkpoint and extras, and what is missing."""

    json: bool = False
    """Print the report as one JSON object."""

    def run(self) -> int:
        """Print the report; 0 if everything that `lego demo` needs is there, else 1."""
        report: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
        extras = _requirements()
        report["packages"] = {name: _version(name) for name in extras.pop("", {})} | {PACKAGE: _version(PACKAGE)}
        problems = [
            f"{name} is not installed: {_pip_line()}" for name, found in report["packages"].items() if not found
        ]
        is_importable = not problems
        if is_importable:
            report |= _device()
        report["memory_gib"] = _memory()
        report["checkpoint"], checkpoint_problems = _checkpoint()
        if is_importable and not checkpoint_problems:
            checkpoint_problems = _weights()
        problems += checkpoint_problems
        report["extras"] = {
            extra: {name: _version(name) for name in names} for extra, names in sorted(extras.items()) if names
        }
        if self.json:
            print(json.dumps({"ok": not problems, "problems": problems, **report}))
        else:
            _print(report, problems)
        return 1 if problems else 0


def _requirements() -> dict[str, list[str]]:
    """Names of the required packages by extra; the core's under "". Empty where the package is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(PACKAGE) or []
        names = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return {"": []}
    found: dict[str, list[str]] = {extra: [] for extra in ("", *names)}
    for requirement in map(Requirement, lines):
        for extra in found:
            marker = requirement.marker
            if (marker is None and not extra) or (extra and marker is not None and marker.evaluate({"extra": extra})):
                found[extra].append(requirement.name)
    return found


def _version(name: str) -> str | None:
    """Installed version of a distribution; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip_line(extra: str = "") -> str:
    return f'pip install "{PACKAGE}{f"[{extra}]" if extra else ""}"'


def _device() -> dict[str, Any]:
    """Accelerators with their memory in GiB, the CPU's threads and the attention implementations that can be used."""
    import torch

    devices = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        devices.append({"device": f"cuda:{number}", "name": name, "free": free / GIB, "total": total / GIB})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": platform.machine()})
    attention = ["torch sdpa (math)"]
    if torch.cuda.is_available():
        attention += [
            f"torch sdpa ({name})"
            for name, on in (
                ("flash", torch.backends.cuda.flash_sdp_enabled()),
                ("memory efficient", torch.backends.cuda.mem_efficient_sdp_enabled()),
                ("cudnn", torch.backends.cuda.cudnn_sdp_enabled()),
            )
            if on
        ]
        if _version("xformers"):
            attention.append("xformers")
    else:
        attention.append("torch sdpa (flash, CPU)")
    return {"devices": devices, "cpu_threads": torch.get_num_threads(), "cpus": os.cpu_count(), "attention": attention}


def _memory() -> float | None:
    """Physical memory of the machine in GiB, where the system tells it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


def _checkpoint() -> tuple[dict[str, Any], list[str]]:
    """Facts about the embedded checkpoint and frames, and what is missing of them."""
    from lego_pipeline.checkpoints import FRAMES, KITCHEN

    facts: dict[str, Any] = {"path": str(KITCHEN), "frames": str(FRAMES), "mib": 0.0, "components": []}
    problems = []
    try:
        index = json.loads((KITCHEN / "model_index.json").read_text(encoding="utf-8"))
        facts["components"] = [
            name for name, value in index.items() if isinstance(value, list) and isinstance(value[0], str)
        ]
    except (OSError, ValueError) as error:
        problems.append(f"the embedded checkpoint cannot be read ({error}): {AGAIN}")
    for name in facts["components"]:
        if not (KITCHEN / name).is_dir():
            problems.append(f"the embedded checkpoint lacks its {name}: {AGAIN}")
    facts["mib"] = sum(file.stat().st_size for file in _files(KITCHEN)) / (1 << 20)
    if not _files(FRAMES):
        problems.append(f"the embedded frames are not at {FRAMES}: install the package again")
    return facts, problems


def _weights() -> list[str]:
    """What is wrong with the embedded checkpoint's files, one that is missing or cut off for instance."""
    from lego_pipeline.checkpoints import KITCHEN
    from lego_pipeline.loading import check_folder

    try:
        check_folder(KITCHEN)
    except (OSError, ValueError) as error:
        return [f"the embedded checkpoint is not whole ({error}): {AGAIN}"]
    return []


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _print(report: dict[str, Any], problems: list[str]) -> None:
    """The report for people."""

    def line(label: str, text: object) -> None:
        print(f"{label:<12} {text}")

    line("python", f"{report['python']} ({sys.executable})")
    line("platform", report["platform"])
    line("packages", ", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items()))
    if "devices" in report:
        for device in report["devices"]:
            free = f", {device['free']:.1f} of {device['total']:.1f} GiB free" if "free" in device else ""
            line("device", f"{device['device']}: {device['name']}{free}")
        line("device", f"cpu: {report['cpu_threads']} threads of torch, {report['cpus']} CPUs")
        line("attention", ", ".join(report["attention"]))
    if report["memory_gib"]:
        line("memory", f"{report['memory_gib']:.1f} GiB")
    checkpoint = report["checkpoint"]
    line("checkpoint", f"{checkpoint['path']}: {checkpoint['mib']:.1f} MiB, {', '.join(checkpoint['components'])}")
    for extra, packages in report["extras"].items():
        missing = [name for name, version in packages.items() if not version]
        line(f"[{extra}]", f"no {', '.join(missing)}; {_pip_line(extra)}" if missing else "complete")
    for problem in problems:
        line("PROBLEM", problem)
    if not problems:
        line("result", "`lego demo` has all it needs")
