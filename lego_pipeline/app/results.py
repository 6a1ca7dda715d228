"""Pictures with their records as files: single PNGs, and everything of a run in one ZIP.

The PNGs carry their parameters as `lego generate` writes them, and the ZIP has the `generation.jsonl` of its folders.
"""

import json
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from lego_pipeline.cli import records


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A painted picture.

    Attributes:
        image: the generated frame.
        record: how it came about, see `lego_pipeline.cli.generate`.
    """

    image: PIL.Image.Image
    record: dict[str, Any]

    def write(self, folder: Path) -> Path:
        """Writes `<id>.png` with the record in its text."""
        path = folder / f"{self.record['id']}.png"
        records.write_png(path, self.image, self.record)
        return path


@dataclass
class Run:
    """The files that one press of a button made, in a folder of its own.

    Attributes:
        frame: copy of the input frame, in a folder `frame`; it has the name that the records say.
        files: PNGs in the order in which they were painted.
        drift: of a storyboard's pictures, in % (`lego_pipeline.app.drift`): {"first": from the first frame, "source":
            from the frame that it was painted from}.
    """

    frame: Path
    files: list[Path] = field(default_factory=list)
    drift: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, frame: Path, folder: Path) -> "Run":
        """A run without pictures on a copy of the frame, in a fresh folder inside `folder`."""
        own = Path(tempfile.mkdtemp(prefix="run-", dir=folder)) / "frame"
        own.mkdir()
        return cls(Path(shutil.copy(frame, own / frame.name)))

    @property
    def folder(self) -> Path:
        """Where the pictures lie."""
        return self.frame.parent.parent

    def add(self, picture: Picture) -> Path:
        """Writes a picture."""
        self.files.append(picture.write(self.folder))
        return self.files[-1]

    def record(self, number: int) -> dict[str, Any]:
        """The record of a picture, read from its file."""
        return records.read_png_record(self.files[number]) or {}

    def zip(self) -> Path:
        """Writes frame, pictures, generation.jsonl and a storyboard's drift as one ZIP file."""
        path = self.folder / "lego.zip"
        lines = "".join(json.dumps(self.record(number)) + "\n" for number in range(len(self.files)))
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(self.frame, f"frame/{self.frame.name}")
            for file in self.files:
                archive.write(file, file.name)
            archive.writestr(records.RECORDS, lines)
            if self.drift:
                archive.writestr("drift.json", json.dumps(self.drift, indent=1) + "\n")
        return path

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def file_name(action: str, seed: int | None = None) -> str:
    """A name for the picture of an action that every file system takes, with its seed if it has one."""
    words = re.sub(r"[^a-z0-9]+", "-", action.lower()).strip("-")[:60] or "action"
    return words if seed is None else f"{words}-seed-{seed}"
