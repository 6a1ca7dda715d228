"""`lego enhance`: what the VLM writes about an action in a frame, and the embeddings that go with it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from lego_pipeline.cli.model import ModelOptions, open_cache
from lego_pipeline.cli.records import check_output
from lego_pipeline.cli.samples import check_seed


@dataclass(kw_only=True)
class Enhance(ModelOptions):
    """Print, and save if wanted, the VLM's description of an action in a frame and its embeddings."""

    image: Path
    """Input frame."""
    action: str | None = None
    """What the hands shall do, such as "open drawer"."""
    description: str | None = None
    """A description of your own, whose embeddings are computed instead of the VLM's."""
    output: Path | None = None
    """A .safetensors file for description, image_embeds and text_embeds."""
    seed: int = 0
    """Seed of the VLM's sampling; without effect on a description of the cache."""
    cache: Path | None = None
    """Folder of descriptions and embeddings: what it has is not computed again, what it lacks is added."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Print and save; 0 when that is done."""
        if not (self.action or "").strip() and not (self.description or "").strip():
            raise ValueError('`--action` or `--description` must be given, such as --action "open drawer".')
        check_seed(self.seed, "--seed")
        if self.output is not None:
            check_output(self.output, ".safetensors")

        import torch

        from lego_pipeline.enhance import vlm_id
        from lego_pipeline.images import read_image

        picture = read_image(self.image)
        cache = open_cache(self.cache)
        pipeline = self.load()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            [enhancement] = pipeline.enhance(picture, self.action, self.description, generator, cache)
        if self.output is not None:
            if pipeline.vlm is not None:
                enhancement.vlm_id = vlm_id(pipeline.vlm, pipeline.vlm_processor)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.output.with_name(f".{self.output.name}.{os.getpid()}.tmp")
            enhancement.save(unfinished)
            os.replace(unfinished, self.output)
        shapes = {name: list(getattr(enhancement, name).shape) for name in ("image_embeds", "text_embeds")}
        if self.json:
            path = str(self.output) if self.output else None
            print(json.dumps({"ok": True, "description": enhancement.description, **shapes, "path": path}))
        else:
            print(enhancement.description)
            if self.output is not None:
                print(f"{self.output}: image_embeds {shapes['image_embeds']}, text_embeds {shapes['text_embeds']}")
        return 0
