"""`lego swap`: a manifest of the same frames with another verb or noun, for the swap test of `lego evaluate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class Swap:
    """Write a manifest of the same frames with swapped actions, for `lego generate` and `lego evaluate --swapped`."""

    data: Path
    """Manifest with the asked actions."""
    output: Path
    """Folder of the manifest with swapped ones."""
    split: str | None = None
    """Split of the manifest; without it all rows."""
    pairs: int | None = None
    """The first rows only, as many as this."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Write it; 0."""
        from datasets import Image

        from lego_pipeline.data.manifest import read_manifest
        from lego_pipeline.evaluation.swap import NAMES, write_swapped

        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"`--pairs` must be at least 1, got {self.pairs}.")
        if self.output.is_file():
            raise NotADirectoryError(f"`--output` must be a folder, but {self.output} is a file.")
        is_data = self.output.resolve() == self.data.resolve()
        if is_data or any(self.output.glob("*.parquet")) and not any(self.output.glob(NAMES)):
            raise ValueError(f"`--output` must be a folder of its own, got {self.output}, which holds other shards.")
        rows = read_manifest(self.data, self.split).cast_column("image_0", Image(decode=False))
        rows = rows.select(range(min(len(rows), self.pairs or len(rows))))
        counts = write_swapped(rows, self.output)
        if self.json:
            print(json.dumps({"ok": True, "rows": len(rows), **counts, "output": str(self.output)}))
        else:
            verbs, nouns = f"{counts['verb']} with another verb", f"{counts['noun']} with another noun"
            print(f"{self.output}: of {len(rows)} rows {verbs}, {nouns}")
        return 0
