"""`lego demo`: a contact sheet of what the embedded checkpoint makes of a few frames that it has never seen."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lego_pipeline.cli.model import DrawOptions, draw
from lego_pipeline.cli.records import check_output, write_png
from lego_pipeline.cli.samples import check_seed, derive_seed


@dataclass(kw_only=True)
class Demo(DrawOptions):
    """Draw a contact sheet: input frame, action, the VLM's description, generated frame, true frame."""

    output: Path = Path("demo.png")
    """Where the sheet goes, a .png."""
    frames: int = 8
    """How many of the embedded frames, of different actions as far as there are."""
    seed: int = 0
    """Chooses the frames and the noise."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Draw the sheet; 0 when it is written."""
        start = time.perf_counter()
        check_output(self.output, ".png")
        check_seed(self.seed, "--seed")
        if self.frames < 1:
            raise ValueError(f"`--frames` must be at least 1, got {self.frames}.")

        import torch

        from lego_pipeline import __version__
        from lego_pipeline.checkpoints import FRAMES
        from lego_pipeline.contact_sheet import Card, draw_contact_sheet
        from lego_pipeline.data.manifest import read_manifest

        manifest = read_manifest(FRAMES)
        if self.frames > len(manifest):
            raise ValueError(
                f"`--frames` must be at most {len(manifest)}, as many as are embedded, got {self.frames}."
            )
        pipeline = self.load()
        rows = [manifest[i] for i in choose(manifest["action"], self.frames, self.seed)]
        pictures, descriptions = draw(
            pipeline,
            image=[row["image_0"] for row in rows],
            action=[row["action"] for row in rows],
            generator=[torch.Generator().manual_seed(derive_seed(self.seed, row["id"])) for row in rows],
        )
        cards = [
            Card(
                title=row["action"],
                frames=[("input", row["image_0"]), ("generated", picture), ("rendered truth", row["image_1"])],
                text=description,
            )
            for row, picture, description in zip(rows, pictures, descriptions, strict=True)
        ]
        own = pipeline.config
        sheet = draw_contact_sheet(
            cards,
            title="LEGO: an egocentric frame and an action in, the action frame out",
            footer="Inputs and truths are rendered kitchens kept out of training; the descriptions are the VLM's. "
            f"lego-pipeline {__version__}, model {self.model or 'kitchen'}{' --fast' if self.fast else ''}, "
            f"seed {self.seed}, "
            f"{own['num_inference_steps']} steps, guidance scales {own['guidance_scale']} (action) and "
            f"{own['image_guidance_scale']} (frame).",
        )
        facts = [
            {"id": row["id"], "action": row["action"], "description": description}
            for row, description in zip(rows, descriptions, strict=True)
        ]
        write_png(self.output, sheet, {"seed": self.seed, "version": __version__, "samples": facts})
        seconds = time.perf_counter() - start
        if self.json:
            print(json.dumps({"ok": True, "path": str(self.output), "seconds": round(seconds, 1), "samples": facts}))
        else:
            for fact in facts:
                print(f"{fact['action']}: {fact['description']}")
            print(f"{self.output}: {len(facts)} frames in {seconds:.0f} s")
        return 0


def choose(actions: Sequence[str], count: int, seed: int) -> list[int]:
    """Positions of `count` rows in random order, each action once before any comes a second time.

    Args:
        actions: label of every row.
        count: at most as many as there are rows.
        seed: of the order.
    """
    order = list(range(len(actions)))
    random.Random(seed).shuffle(order)
    rounds: dict[str, int] = {}
    keys = {}
    for position, row in enumerate(order):
        rounds[actions[row]] = rounds.get(actions[row], 0) + 1
        keys[row] = (rounds[actions[row]], position)
    return sorted(order, key=keys.__getitem__)[:count]
