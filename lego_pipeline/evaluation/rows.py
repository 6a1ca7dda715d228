"""The rows of the table: systems, and what a number is read against, floor, ceiling and doubt.

| row | says |
|---|---|
| true frame | what scores that look at one picture give the truth; scores that compare with it are left out |
| input copied | floor: what doing nothing scores |
| mean training target | floor: what the average picture of the training set scores |
| true frame through the VAE | ceiling: what the decoder can reach |
| another true frame, same video; other videos | doubt: how far two true pictures of one action are apart |

Letters: N pairs of the manifest.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from tqdm.auto import tqdm

from lego_pipeline import images
from lego_pipeline.atomic import write_atomically
from lego_pipeline.evaluation.metrics.base import Frame, Sample, Source
from lego_pipeline.evaluation.swap import Action, parts_of

TRUTH = "true frame"
COPIED = "input copied"
MEAN = "mean training target"
ROUND_TRIP = "true frame through the VAE"
SAME_VIDEO = "another true frame, same video"
OTHER_VIDEO = "another true frame, other video"
REFERENCES = (TRUTH, COPIED, MEAN, ROUND_TRIP, SAME_VIDEO, OTHER_VIDEO)

Kind = Literal["floor", "ceiling", "doubt", "system"]
Picture = Callable[[], Source] | None  # how a picture is read, None where there is none

MEAN_OF = 2000  # training targets, spread evenly over the manifest
MEAN_SIDE = 256  # pixels of the longer side at which they are averaged
READ_AT_ONCE = 16  # pictures that the VAE gets in one call


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        name: in the table.
        kind: what it is there for.
        pictures: N ways to read a picture.
        note: what has to be known to read the row.
        facts: of a system, where it comes from.
    """

    name: str
    kind: Kind
    pictures: Sequence[Picture]
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many pairs have a picture."""
        return sum(picture is not None for picture in self.pictures)


class Pairs:
    """The pairs of a manifest, their frames read when they are asked for.

    Args:
        rows: N rows of a manifest.

    Raises:
        ValueError: a row without target frame.
    """

    def __init__(self, rows: Dataset):
        for name in ("image_0", "image_1"):
            rows = rows.cast_column(name, ImageColumn(decode=False))
        self._files = {name: rows.select_columns([name]) for name in ("image_0", "image_1")}
        columns = ("id", "action", "verb", "noun", "description", "video", "time_1", "source", "boxes_0", "boxes_1")
        facts = [
            dict(zip(columns, values, strict=True)) for values in zip(*(rows[c][:] for c in columns), strict=True)
        ]
        self.facts: list[dict[str, Any]] = facts
        self.ids: list[str] = [fact["id"] for fact in facts]
        self.actions: list[Action] = [parts_of(fact["action"], fact["verb"], fact["noun"]) for fact in facts]
        lacking = [self.ids[i] for i, row in enumerate(self._files["image_1"]) if row["image_1"] is None]
        if lacking:
            raise ValueError(
                f"`--data` must have a target frame in every row, got {len(lacking)} without, such as {lacking[0]!r}; "
                "evaluate a manifest of pairs."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def content(self, column: str, number: int) -> bytes:
        """The file of a frame, undecoded."""
        return _content(self._files[column][number][column])

    def frame(self, column: str, number: int) -> Frame:
        """`image_0` or `image_1` of a pair."""
        return Frame(self.content(column, number), start=self.content("image_0", number))

    def digest(self) -> str:
        """Of all ids, actions and frames."""
        digest = hashlib.sha256()
        for number, row_id in enumerate(self.ids):
            frame = self.frame("image_1", number)
            facts = [row_id, self.actions[number].action, frame.start_digest, frame.digest]
            digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    def pictures(self, column: str) -> list[Picture]:
        """The frames of all pairs as pictures of a row."""
        return [partial(self.content, column, number) for number in range(len(self))]

    def samples(self, prompts: dict[str, str]) -> list[Sample]:
        """What the metrics are told; `prompts` are the generator's texts by id."""
        return [
            Sample(
                id=fact["id"],
                action=action.action,
                verb=action.verb,
                noun=action.noun,
                description=fact["description"],
                prompt=prompts.get(fact["id"]),
                boxes_0=fact["boxes_0"] or (),
                boxes_1=fact["boxes_1"] or (),
            )
            for fact, action in zip(self.facts, self.actions, strict=True)
        ]

    def clusters(self) -> list[str] | None:
        """The videos of the pairs; None where the manifest doesn't tell them or no two pairs share one."""
        videos = [fact["video"] for fact in self.facts]
        return videos if all(videos) and 1 < len(set(videos)) < len(videos) else None


def _content(file: dict[str, Any]) -> bytes:
    """The file of an undecoded image of a manifest."""
    return Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]


def true_frame(pairs: Pairs) -> Row:
    """The target frames themselves."""
    note = "only scores that look at one picture and do not compare it with the true frame."
    return Row(name=TRUTH, kind="ceiling", pictures=pairs.pictures("image_1"), note=note)


def copied_input(pairs: Pairs) -> Row:
    """The input frames: what is reached by doing nothing."""
    return Row(name=COPIED, kind="floor", pictures=pairs.pictures("image_0"), note="the input frame as the result.")


def mean_target(pairs: Pairs, train: Dataset, folder: Path) -> Row:
    """One picture for all pairs, the average of the targets of the training set.

    Args:
        pairs: of the table.
        train: rows of the training set; `MEAN_OF` of them are averaged.
        folder: where the picture is kept.
    """
    numbers = np.unique(np.linspace(0, len(train) - 1, min(MEAN_OF, len(train))).astype(int)).tolist()
    width, height = pairs.frame("image_1", 0).image.size
    scale = min(1.0, MEAN_SIDE / max(width, height))
    size = (round(width * scale), round(height * scale))
    chosen = train.select(numbers).select_columns(["image_1"]).cast_column("image_1", ImageColumn(decode=False))
    digest = hashlib.sha256(json.dumps(size).encode())
    for row in chosen:
        digest.update(hashlib.sha256(_content(row["image_1"])).digest())
    path = folder / f"mean-{digest.hexdigest()[:16]}.png"
    if not path.exists():
        total = np.zeros((size[1], size[0], 3))
        for row in tqdm(chosen, desc="mean training target", disable=None):
            frame = Frame(_content(row["image_1"])).image
            total += np.asarray(frame.resize(size, PIL.Image.Resampling.BICUBIC), float)
        picture = PIL.Image.fromarray((total / len(chosen)).round().astype(np.uint8))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda unfinished: picture.save(unfinished, "PNG"))
    note = f"one picture, the average of {len(numbers)} targets of the training set."
    return Row(name=MEAN, kind="floor", pictures=[partial(Path, path)] * len(pairs), note=note)


def round_trip(pairs: Pairs, model: Path, folder: Path, device: str = "cpu") -> Row:
    """The target frames through the encoder and decoder of a model, at the model's own area.

    Args:
        pairs: of the table.
        model: pipeline folder in diffusers' layout; only its VAE is loaded.
        folder: where the pictures are kept.
        device: of the VAE.

    Raises:
        ValueError: the folder has no VAE.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    weights = sorted((model / "vae").glob("*.safetensors"))
    if not weights:
        raise ValueError(f"`--pipeline` must be a pipeline folder with vae/*.safetensors, got {model}.")
    digest = hashlib.sha256()
    for file in weights:
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    own = folder / f"round-trip-{digest.hexdigest()[:16]}"
    paths = [own / f"{pairs.frame('image_1', i).digest}.png" for i in range(len(pairs))]
    wanted = [i for i, path in enumerate(paths) if not path.exists()]
    if wanted:
        own.mkdir(parents=True, exist_ok=True)
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device).eval()
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        settings = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
        resolution = settings.get("resolution") or vae.config["sample_size"]
        with tqdm(total=len(wanted), desc=ROUND_TRIP, disable=None) as bar:
            for first in range(0, len(wanted), READ_AT_ONCE):
                numbers = wanted[first : first + READ_AT_ONCE]
                frames = [pairs.frame("image_1", i).image for i in numbers]
                for i, picture in zip(numbers, _through(vae, frames, resolution, factor), strict=True):
                    write_atomically(paths[i], partial(picture.save, format="PNG"))
                bar.update(len(numbers))
    note = f"what the decoder of {model.name} can reach."
    return Row(name=ROUND_TRIP, kind="ceiling", pictures=[partial(Path, path) for path in paths], note=note)


@torch.no_grad()
def _through(vae: Any, frames: list[PIL.Image.Image], resolution: int, factor: int) -> list[PIL.Image.Image]:
    """Frames encoded (the mode of the posterior) and decoded, of their own size again."""
    sizes = [images.frame_size(frame) for frame in frames]
    result: dict[int, PIL.Image.Image] = {}
    for size in dict.fromkeys(sizes):
        numbers = [i for i, other in enumerate(sizes) if other == size]
        batch = torch.stack(
            [images.to_model_input(frames[i], *images.model_size(*size, resolution, factor)) for i in numbers]
        )
        decoded = vae(batch.to(vae.device)).sample
        for i, picture in zip(numbers, images.from_model_output(decoded, [size] * len(numbers)), strict=True):
            result[i] = images.to_pil(picture)
    return [result[i] for i in range(len(frames))]


def other_true_frames(pairs: Pairs) -> list[Row]:
    """Two rows: the target of another pair with the same action, from the same video, and from another one.

    Within a video it is the nearest in time, elsewhere the next in the manifest. A pair that shares its target's file
    is no other. Pairs without such a partner have no picture; a row without any is left out. Where the manifest
    doesn't tell a video, pairs count as of another one.
    """
    members: dict[str, list[int]] = {}
    for i, action in enumerate(pairs.actions):
        members.setdefault(action.action, []).append(i)
    digests = [pairs.frame("image_1", i).digest for i in range(len(pairs))]
    chosen: dict[str, list[Picture]] = {SAME_VIDEO: [], OTHER_VIDEO: []}
    for i, fact in enumerate(pairs.facts):
        others = [j for j in members[pairs.actions[i].action] if digests[j] != digests[i]]
        videos = {
            name: [j for j in others if _is_same(fact, pairs.facts[j]) == (name == SAME_VIDEO)] for name in chosen
        }
        for name, numbers in videos.items():
            if name == SAME_VIDEO:
                numbers = sorted(numbers, key=lambda j: abs((pairs.facts[j]["time_1"] or 0) - (fact["time_1"] or 0)))
            else:
                numbers = sorted(numbers, key=lambda j: (j - i) % len(pairs))
            chosen[name].append(partial(pairs.content, "image_1", numbers[0]) if numbers else None)
    notes = {
        SAME_VIDEO: "the true frame of another pair with the same action in the same video, the nearest in time.",
        OTHER_VIDEO: "the true frame of a pair with the same action in another video"
        + (", or in one that the manifest doesn't tell." if any(f["video"] is None for f in pairs.facts) else "."),
    }
    rows = [Row(name=name, kind="doubt", pictures=found, note=notes[name]) for name, found in chosen.items()]
    return [row for row in rows if row.count]


def _is_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two rows are known to come from one video."""
    return first["video"] is not None and first["video"] == second["video"]
