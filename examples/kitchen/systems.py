"""The rows of the kitchen's table that are LegoPipeline folders: how they are named, and the frames they generate.

A system is written `NAME=FOLDER` or `NAME=FOLDER:PARTS`. PARTS says what of the condition is used, the rest is zero,
as in training with that part left out:

    label                       the bare label through the text tower, no VLM
    description                 the VLM's description through the text tower
    description+image           and the projected embeddings of the frame
    description+text            and the projected text states
    description+image+text      all, LEGO
    truth, truth+image+text     likewise with the manifest's true description in place of the VLM's

Without PARTS a folder with a VLM gets all, one without gets the label. A last `:decoded` shows the decoder's pixels
everywhere; otherwise a checkpoint that keeps the scene (`lego_pipeline.scene`) does so.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from examples.kitchen.frames import to_unit
from lego_pipeline import LegoPipeline, images
from lego_pipeline.baselines.parts import PARTS as LEGO_PARTS
from lego_pipeline.baselines.parts import condition_of_enhancements
from lego_pipeline.cli.records import append_record, read_png_record, write_png
from lego_pipeline.guidance import needed_passes
from lego_pipeline.training import seed_of
from lego_pipeline.vlm import Enhancement

LEGO = "description+image+text"
PARTS = (*LEGO_PARTS, "truth", "truth+image+text")
WEIGHTS = ("unet", "projector", "vae", "text_encoder", "vlm")  # folders that decide what is generated


@dataclass(frozen=True)
class System:
    """One generating row of the table; `parts` is one of PARTS, `decoded` is without the scene's own pixels."""

    name: str
    folder: Path
    parts: str
    decoded: bool = False


@dataclass(frozen=True)
class Scales:
    """Guidance scales of text and image, and the number of steps."""

    guidance_scale: float
    image_guidance_scale: float
    steps: int

    def __str__(self) -> str:
        """Name of the folder of frames drawn with them."""
        return f"{self.guidance_scale:g}-{self.image_guidance_scale:g}-{self.steps}"


def frames_folder(folder: Path, name: str) -> Path:
    """Where a system of this name keeps its frames."""
    return folder / "".join(letter if letter.isalnum() else "_" for letter in name)


def parse_system(text: str) -> System:
    """Reads `NAME=FOLDER[:PARTS][:decoded]`.

    Raises:
        ValueError: another form, unknown parts, or a folder that is no pipeline.
    """
    name, _, rest = text.partition("=")
    decoded = rest.endswith(":decoded")
    rest = rest.removesuffix(":decoded")
    found = re.fullmatch(r"(.+?)(?::([a-z+]*))?", rest)
    if not name.strip() or found is None:
        raise ValueError(f"`systems` must be written NAME=FOLDER or NAME=FOLDER:PARTS, got {text!r}.")
    folder, parts = Path(found.group(1)), found.group(2)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`systems` must name LegoPipeline folders, got {folder} for {name!r}; train one first.")
    if parts is None:
        parts = LEGO if (folder / "vlm").is_dir() else "label"
    if parts not in PARTS:
        raise ValueError(f"the parts of {name!r} must be one of {', '.join(PARTS)}, got {parts!r}.")
    return System(name.strip(), folder, parts, decoded)


def weights_key(folder: Path) -> str:
    """Short hash of all weights of a pipeline folder and its settings."""
    digest = hashlib.sha256((folder / "model_index.json").read_bytes())
    for file in sorted(file for name in WEIGHTS for file in (folder / name).glob("*.safetensors")):
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:12]


class Generator:
    """Generates frames with one system and keeps them in a folder, so that none is made twice.

    Args:
        system: the row.
        folder: of the kept frames.
        device: of the pipeline.
        batch_size: pairs at a time; a frame doesn't depend on it.
        seed: of descriptions and noise, which each pair draws for itself.
    """

    def __init__(self, system: System, folder: Path, *, device: str = "cpu", batch_size: int = 20, seed: int = 0):
        self.system, self.folder = system, folder
        self.device, self.batch_size, self.seed = device, batch_size, seed
        self.key = weights_key(system.folder)
        self.pipeline: LegoPipeline | None = None
        self.enhancements: dict[str, Enhancement] = {}  # by pair, of this run

    def load(self) -> LegoPipeline:
        """The pipeline, loaded when the first frame is missing."""
        if self.pipeline is None:
            without = {"vlm": None, "vlm_processor": None} if self.system.parts == "label" else {}
            self.pipeline = LegoPipeline.from_pretrained(self.system.folder, **without).to(self.device)
            self.pipeline.set_progress_bar_config(disable=True)
            if self.system.parts != "label" and self.pipeline.vlm is None:
                raise ValueError(
                    f"{self.system.folder} must have a VLM for the parts {self.system.parts!r}, got none; "
                    "write `:label` behind the folder."
                )
        return self.pipeline

    def default_scales(self) -> Scales:
        """Those of the checkpoint."""
        config = self.load().config
        return Scales(config["guidance_scale"], config["image_guidance_scale"], config["num_inference_steps"])

    def frames(self, rows: Dataset, scales: Scales) -> torch.Tensor:
        """(N, 3, H, W) float in [-1, 1]: the generated frame of every row, those that are kept read back."""
        ids = rows["id"][:]
        folder = self.folder / str(scales)
        record = {"weights": self.key, "parts": self.system.parts, "seed": self.seed, "decoded": self.system.decoded}
        paths = [folder / f"{name}.png" for name in ids]
        missing = [i for i, path in enumerate(paths) if not _is_kept(path, record)]
        label = f"{self.system.name} {scales.guidance_scale:g}/{scales.image_guidance_scale:g}"
        for start in tqdm(range(0, len(missing), self.batch_size), desc=label, disable=not missing):
            batch = missing[start : start + self.batch_size]
            for i, (picture, description) in zip(batch, self._generate([rows[i] for i in batch], scales), strict=True):
                made = {**record, "id": ids[i], "description": description}
                write_png(paths[i], picture, made)
                append_record(folder / "generation.jsonl", made)
        return to_unit(torch.stack([_pixels(Image.open(path)) for path in paths]))

    def descriptions(self, ids: Sequence[str], scales: Scales) -> list[str]:
        """The texts that the frames were generated from."""
        folder = self.folder / str(scales)
        records = [read_png_record(folder / f"{name}.png") or {} for name in ids]
        return [str(record.get("description", "")) for record in records]

    @torch.no_grad()
    def _generate(self, rows: list[dict], scales: Scales) -> list[tuple[Image.Image, str]]:
        pipeline = self.load()
        condition, null_condition, texts = self._condition(rows)
        factors = (scales.guidance_scale, scales.image_guidance_scale)
        generators = [torch.Generator().manual_seed(seed_of("noise", self.seed, row["id"])) for row in rows]
        result = pipeline(
            [row["image_0"] for row in rows],
            prompt_embeds=condition,
            negative_prompt_embeds=null_condition if needed_passes(*factors) != ("C",) else None,
            num_inference_steps=scales.steps,
            guidance_scale=factors[0],
            image_guidance_scale=factors[1],
            generator=generators,
            keep_scene=False if self.system.decoded else None,
        )
        return list(zip(result.images, texts, strict=True))

    def _condition(self, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Condition (B, L, C) with the system's parts, null condition (1, L, C), and the B texts."""
        pipeline = self.load()
        null_condition = pipeline.encode_null_condition()
        if self.system.parts == "label":
            texts = [row["action"] for row in rows]
            return pipeline.encode_condition(description=texts)[0], null_condition, texts
        new = [row for row in rows if row["id"] not in self.enhancements]
        if new:
            made = pipeline.enhance(
                [row["image_0"] for row in new],
                [row["action"] for row in new],
                [row["description"] for row in new] if self.system.parts.startswith("truth") else None,
                generator=[torch.Generator().manual_seed(seed_of("description", self.seed, row["id"])) for row in new],
            )
            self.enhancements.update({row["id"]: item for row, item in zip(new, made, strict=True)})
        known = [self.enhancements[row["id"]] for row in rows]
        parts = self.system.parts.replace("truth", "description")
        condition, texts = condition_of_enhancements(pipeline, parts, known)
        return condition, null_condition, texts


def _is_kept(path: Path, record: dict) -> bool:
    there = read_png_record(path)
    return there is not None and all(there.get(name) == value for name, value in record.items())


def _pixels(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8."""
    return ((images.to_model_input(picture.convert("RGB"), picture.height, picture.width) + 1) * 127.5).round().byte()
