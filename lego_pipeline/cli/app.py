"""`lego app`: a page on this machine on which actions are described, painted, compared and chained."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lego_pipeline.cli.model import DrawOptions, ModelOptions

if TYPE_CHECKING:
    from lego_pipeline import LegoPipeline
    from lego_pipeline.app.page import Example
    from lego_pipeline.app.painter import Painter
    from lego_pipeline.data.embedding_cache import EmbeddingCache

EXAMPLES = 12
TITLE = "LEGO action frames"
KITCHEN_NOTE = (
    "A frame and an action in, the same scene with hands carrying it out. This model knows a rendered kitchen and no "
    "photographs; real use needs a model trained on real frames (`--model`)."
)
NOTE = "A frame and an action in, the same scene with hands carrying it out. Model: `{}`."


@dataclass(kw_only=True)
class App(ModelOptions):
    """Open a page on this machine: drop a frame, edit the description, compare seeds, chain a storyboard."""

    host: str = "127.0.0.1"
    """Address to listen at; with 0.0.0.0 everyone who reaches this machine can use the page."""
    port: int = 7860
    """Port to listen at; 0 takes any that is free."""
    cache: Path | None = None
    """Folder of descriptions and embeddings to keep; without it they are forgotten at the end."""
    json: bool = False
    """Print the address as one JSON object."""

    def run(self) -> int:
        """Serve until Ctrl+C; 0 then."""
        from lego_pipeline.app.server import listen, prepare_gradio, serve
        from lego_pipeline.cli.model import open_cache
        from lego_pipeline.data.embedding_cache import EmbeddingCache

        with tempfile.TemporaryDirectory(prefix="lego-app-") as name, listen(self.host, self.port) as listening:
            folder = Path(name)
            prepare_gradio(folder / "uploads")
            cache = open_cache(self.cache)
            if cache is None:
                cache = EmbeddingCache(folder / "cache", dtype="float32")
            painter = self._painter(cache)
            serve(
                painter,
                listening,
                folder,
                title=TITLE,
                note=KITCHEN_NOTE if self.model is None else NOTE.format(self.model),
                examples=write_examples(folder / "examples") if self.model is None else [],
                ready=lambda: self._say(listening.getsockname()[1]),
            )
        return 0

    def _painter(self, cache: EmbeddingCache) -> Painter:
        """The model, with its few-step adapters if it has them; these share all components but the UNet."""
        from lego_pipeline.app.painter import Painter

        few = DrawOptions(model=self.model, device=self.device, dtype=self.dtype, fast=True)

        def load_fast(pipeline: LegoPipeline) -> LegoPipeline:
            shared = {name: part for name, part in pipeline.components.items() if name not in ("unet", "scheduler")}
            return few.load(**shared)

        return Painter(
            self.load(),
            model=self.model or "kitchen",
            cache=cache,
            requests=(
                {"model": self.fingerprint(), "dtype": self.dtype},
                {"model": few.fingerprint(), "dtype": self.dtype},
            ),
            load_fast=load_fast if has_fast(few) else None,
        )

    def _say(self, port: int) -> None:
        """Print where the page is."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        url = f"http://{host}:{port}"
        print(json.dumps({"ok": True, "url": url}) if self.json else f"{url} (Ctrl+C to stop)", flush=True)


def has_fast(options: DrawOptions) -> bool:
    """Whether a model has few-step adapters."""
    try:
        return options.fast_folder().is_dir()
    except FileNotFoundError:
        return False


def write_examples(folder: Path) -> list[Example]:
    """The first embedded frame of each of some actions, as files."""
    from lego_pipeline.app.page import Example
    from lego_pipeline.checkpoints import FRAMES
    from lego_pipeline.cli.demo import choose
    from lego_pipeline.data.manifest import read_manifest

    manifest = read_manifest(FRAMES)
    folder.mkdir(parents=True)
    examples = []
    for number in choose(manifest["action"], EXAMPLES, 0):
        row = manifest[number]
        path = folder / f"{row['id']}.png"
        row["image_0"].save(path)
        examples.append(Example(path, row["action"]))
    return examples
