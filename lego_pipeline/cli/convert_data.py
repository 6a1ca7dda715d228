"""`lego convert data`: the released JSON files, frames and VLM features to a manifest and an embedding cache.

Everything is looked for before anything is written. What is missing is counted and named, all of it in
`missing.txt` in the output folder, and refuses the request, unless `--skip-missing` leaves these pairs out.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lego_pipeline.data.released.pairs import Pairs

Oddity = Literal["cut", "case", "full-stop"]
MISSING = "missing.txt"  # in the manifest's folder


@dataclass(kw_only=True)
class ConvertData:
    """Make a manifest, and a cache of VLM features, of the released data files."""

    pairs: Path | None = None
    """Released split, such as ego4d_val.json."""
    tuning: Path | None = None
    """Instead of --pairs: conversations that the VLM was tuned on, such as ego4d_for_tuning_forecasting.json."""
    frames: Path
    """Folder that the paths in the file start from, such as EgoGen/ego4d.fho/val."""
    output: Path
    """Folder of the manifest."""
    dataset: Literal["ego4d", "epic_kitchens"] = "ego4d"
    """Whose labels these are."""
    split: str = "val"
    """Name of the split in the manifest."""
    metadata: Path | None = None
    """Sizes of the clips, such as ego4d_metadata.json; `lego generate --parity paper` needs them."""
    text_key: str = "llava_forecast_finetune"
    """Key of the enriched descriptions in the file; "" leaves them out."""
    image_features: Path | None = None
    """Folder of the VLM's image features, with the split: vllm_image_feature/MODEL/val."""
    text_features: Path | None = None
    """Folder of the VLM's text features, likewise."""
    cache: Path | None = None
    """Folder of the embedding cache that the features are put into."""
    cache_dtype: Literal["float16", "float32", "int8"] = "float16"
    """In which the features are kept; the released ones are float16."""
    features_of: str | None = None
    """Name of the VLM that made the features; without it that of their folder."""
    label_oddities: tuple[Oddity, ...] = ()
    """What the release does to labels of Ego4D: cut blindly, lower-case the verb only, leave the full stop."""
    parity: Literal["paper"] | None = None
    """Labels with all of the release's oddities."""
    question_template: str | None = None
    """How the questions of --tuning are put, with {} for the action; without it the release's."""
    skip_missing: bool = False
    """Leave out pairs that lack a file or a usable label."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> int:
        """Make what is asked; 0 if all of it is there in the end."""
        self._check()
        from lego_pipeline.data.released.pairs import write_manifest

        pairs = self._read()
        if pairs.missing:
            self._report(pairs)
        else:
            (self.output / MISSING).unlink(missing_ok=True)  # of a run that lacked something
        if not pairs.complete:
            raise ValueError(f"{self.pairs or self.tuning} must hold at least one complete pair, got none.")
        facts = {"file": (self.pairs or self.tuning or Path()).name, "dataset": self.dataset, "split": self.split}
        shards = write_manifest(pairs.complete, self.output, facts)
        entries = self._import(pairs)
        left_out = {kind: len(names) for kind, names in pairs.missing.items()}
        if self.json:
            numbers = {"pairs": len(pairs.complete), "shards_written": shards, "entries_added": entries}
            print(json.dumps({"ok": True, **numbers, "left_out": left_out}))
        else:
            print(f"{self.output}: {len(pairs.complete)} pairs, {shards} shards written")
            if self.cache is not None:
                print(f"{self.cache}: {entries} entries added")
        return 0

    def _check(self) -> None:
        """Refuse what no files could serve."""
        if (self.pairs is None) == (self.tuning is None):
            raise ValueError("`--pairs` or `--tuning` must be given, and only one of them: a released JSON file.")
        given = (self.image_features, self.text_features, self.cache)
        if any(given) and not all(given):
            raise ValueError(
                "`--image-features`, `--text-features` and `--cache` must be given together: both kinds of features "
                "go into the cache."
            )
        if self.tuning is not None:
            of_pairs = {"--image-features": self.image_features, "--metadata": self.metadata, "--parity": self.parity}
            for flag, value in {**of_pairs, "--label-oddities": self.label_oddities}.items():
                if value:
                    raise ValueError(f"`{flag}` must be left out with `--tuning`; it is for `--pairs`.")
        if self.question_template is not None and self.tuning is None:
            raise ValueError("`--question-template` must be left out without `--tuning`; pairs hold no questions.")
        if all(given) and not self.text_key:
            raise ValueError("`--text-key` must name the descriptions that the features belong to, got none.")
        for flag, folder in (
            ("--frames", self.frames),
            ("--image-features", self.image_features),
            ("--text-features", self.text_features),
        ):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"`{flag}` must be a folder, but there is none at {folder}; check the path.")
        for flag, folder in (("--output", self.output), ("--cache", self.cache)):
            if folder is not None and folder.exists() and not folder.is_dir():
                raise NotADirectoryError(f"`{flag}` must be a folder, but {folder} is a file.")
        if self.cache is not None and self.cache.resolve().is_relative_to(self.output.resolve()):
            raise ValueError(
                f"`--cache` must be outside of `--output`, got {self.cache}: its tables would be taken for the "
                "manifest's; name another folder."
            )
        if not re.fullmatch(r"\w[\w.-]*", self.split):
            raise ValueError(f"`--split` must be a name such as train, val or test, got {self.split!r}.")

    def _read(self) -> Pairs:
        from lego_pipeline.data.released.labels import ODDITIES
        from lego_pipeline.data.released.pairs import read_split, read_tuning

        if self.tuning is not None:
            template = {} if self.question_template is None else {"question_template": self.question_template}
            return read_tuning(self.tuning, self.frames, split=self.split, dataset=self.dataset, **template)
        assert self.pairs is not None
        folders = {"image": self.image_features, "text": self.text_features}
        return read_split(
            self.pairs,
            self.frames,
            split=self.split,
            dataset=self.dataset,
            text_key=self.text_key or None,
            metadata=self.metadata,
            features={kind: folder for kind, folder in folders.items() if folder is not None},
            oddities=tuple(ODDITIES) if self.parity == "paper" else self.label_oddities,
        )

    def _report(self, pairs: Pairs) -> None:
        """Name what is missing; refuse it, or leave it out."""
        from lego_pipeline.atomic import write_text

        self.output.mkdir(parents=True, exist_ok=True)
        listing = self.output / MISSING
        write_text(listing, pairs.listing())
        text = f"missing: {pairs.report()}; {listing} names all"
        if not self.skip_missing:
            raise ValueError(f"{text}. Get them, or leave these pairs out with `--skip-missing`.")
        print(f"lego: {text}", file=sys.stderr)

    def _import(self, pairs: Pairs) -> int:
        """Number of entries that the cache was given."""
        if self.cache is None or self.image_features is None:
            return 0
        from lego_pipeline.data.embedding_cache import EmbeddingCache
        from lego_pipeline.data.released.features import SHARD_ENTRIES, find_recipe, import_features

        folder = self.image_features
        source = self.features_of or (folder.parent if folder.name == self.split else folder).name
        cache = EmbeddingCache(self.cache, prefix="imported", shard_size=SHARD_ENTRIES, dtype=self.cache_dtype)
        return import_features(pairs.complete, cache, find_recipe(pairs.complete[0], source))
