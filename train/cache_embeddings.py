"""Fill the embedding cache of a manifest: the tuned VLM's description of each pair, and its embeddings.

    python train/cache_embeddings.py --data DATA --vlm runs/vlm/vlm --cache runs/cache --split train val

The cache is what `train/train_ldm.py`, `LegoPipeline` and `lego generate --cache` read. Everything in it is found by
content, so the command may be killed and started again at any time: what is there is skipped, a kill costs the
unwritten shard alone (512 entries), and a run over a complete cache calls no VLM. A description is sampled with a
generator of its own, seeded by what it answers; the result depends neither on batches nor on the number of processes.

`--descriptions manifest` embeds the manifest's descriptions instead of sampled ones. `--flips` also describes every
frame as in a mirror, with left and right exchanged in the words. At the released sizes a pair takes 1.3 MB in float16,
a further action on its frame 0.8; `--cache-dtype int8` halves that (`benchmarks/cache.py` says at what error).

One GPU or CPU as above; more processes share the rows, all rows of a frame going to one of them:

    accelerate launch --num_processes 8 train/cache_embeddings.py --expect-processes 8 ...     eight GPUs
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank R --main_process_ip HOST \\
        --main_process_port 29500 train/cache_embeddings.py ...        two machines; the cache on a disk that both see
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 train/cache_embeddings.py ...          two processes on a CPU

The VLM is whole in every process. There is nothing to shard by FSDP or DeepSpeed: no weights are trained.
"""

import logging
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from datasets import Dataset, Image
from tqdm.auto import tqdm

from lego_pipeline.config import run
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.data.mirror import mirror_image, mirror_text
from lego_pipeline.enhance import fill_cache, make_recipe
from lego_pipeline.images import to_rgb
from lego_pipeline.training import check_number, check_processes, long_waits
from lego_pipeline.vlm.base import DEFAULT_QUESTION, check_question
from lego_pipeline.vlm.load import load_adapter, load_processor, load_vlm

logger = logging.getLogger("cache_embeddings")


@dataclass(kw_only=True)
class CacheEmbeddingsConfig:
    data: tuple[Path, ...]  # manifests with image_0 and action
    vlm: str  # folder or hub name of the tuned VLM
    cache: Path  # folder of the cache
    adapter: Path | None = None  # folder of a peft adapter of the VLM that was not merged into it
    split: tuple[str, ...] = ("train",)  # every manifest must have all of them
    descriptions: Literal["generate", "manifest"] = "generate"  # sample them, or take the manifest's
    flips: bool = False  # mirrored frames too
    question_template: str = DEFAULT_QUESTION
    batch_size: int = 32  # rows of one process and call
    max_new_tokens: int = 64
    temperature: float = 0.2  # 0 takes the likeliest token
    top_k: int = 50
    seed: int = 0  # the pipeline uses the entries of seed 0
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the VLM
    cache_dtype: Literal["float16", "float32", "int8"] = "float16"  # of the entries on disk
    shard_size: int = 512  # entries of a file, and what a kill loses at most
    expect_processes: int = 0  # refuse another number of processes; 0 = any

    def __post_init__(self):
        check_question(self.question_template)
        if not self.data or not self.split:
            raise ValueError("`data` and `split` must each name at least one, got none.")
        for name in ("batch_size", "shard_size", "max_new_tokens"):
            check_number(self, name, 1)
        for name in ("temperature", "top_k", "expect_processes"):
            check_number(self, name, 0)


def load_describer(config: CacheEmbeddingsConfig, device: torch.device) -> tuple[Any, Any]:
    """The VLM on its device, with its adapter if there is one, and its processor."""
    processor = load_processor(config.vlm)
    vlm = load_vlm(config.vlm, dtype=getattr(torch, config.dtype))
    if config.adapter is not None:
        vlm = load_adapter(vlm, config.adapter)
    return vlm.eval().requires_grad_(False).to(device), processor


def own_rows(rows: Dataset, rank: int, processes: int) -> list[int]:
    """Numbers of the rows of one process: rows of equal frames belong to the same, by the bytes of the image file."""
    if processes == 1:
        return list(range(len(rows)))
    files = rows.select_columns(["image_0"]).cast_column("image_0", Image(decode=False))
    return [i for i, row in enumerate(files) if zlib.crc32(_content(row["image_0"])) % processes == rank]


def _content(file: dict[str, Any]) -> bytes:
    return Path(file["path"]).read_bytes() if file["bytes"] is None else file["bytes"]


def read_rows(config: CacheEmbeddingsConfig) -> list[tuple[str, Dataset]]:
    """The rows of each manifest and split, with a name for the progress bar.

    Raises:
        ValueError: the manifest's descriptions are asked for and a row has none.
    """
    named = []
    for path in config.data:
        for split in config.split:
            rows = read_manifest(path, split).select_columns(["id", "image_0", "action", "description"])
            without = [row_id for row_id, text in zip(rows["id"][:], rows["description"][:], strict=True) if not text]
            if config.descriptions == "manifest" and without:
                raise ValueError(
                    f"`descriptions` must be generate where rows have none, got manifest and {len(without)} of "
                    f"{len(rows)} rows in the split {split!r} of {path} lack it, the first is {without[0]!r}."
                )
            named.append((f"{path.name} {split}", rows))
    return named


def main(config: CacheEmbeddingsConfig) -> None:
    accelerator = Accelerator(kwargs_handlers=[long_waits()])  # the others' rows may take longer
    check_processes(config.expect_processes, accelerator.num_processes)
    named = read_rows(config)
    vlm, processor = load_describer(config, accelerator.device)
    recipe = make_recipe(
        vlm,
        processor,
        question_template=config.question_template,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
        descriptions=config.descriptions,
    )
    if accelerator.is_main_process:
        logger.info(
            "recipe %s: %s in %s on %s, %d process(es), %d x %d image tokens and states, entries in %s",
            *(recipe.name, recipe.family, config.dtype, accelerator.device, accelerator.num_processes),
            *(recipe.num_image_tokens, recipe.vlm_dim, config.cache_dtype),
        )
    cache = EmbeddingCache(config.cache, str(accelerator.process_index), config.shard_size, config.cache_dtype)
    cache.add_recipe(recipe, vlm)
    counts: Counter[str] = Counter()
    for name, rows in named:
        mine = own_rows(rows, accelerator.process_index, accelerator.num_processes)
        starts = range(0, len(mine), config.batch_size)
        for start in tqdm(starts, desc=name, disable=not accelerator.is_main_process, mininterval=5):
            batch = [rows[i] for i in mine[start : start + config.batch_size]]
            frames = [to_rgb(row["image_0"]) for row in batch]
            actions = [row["action"] for row in batch]
            texts = [row["description"] for row in batch] if config.descriptions == "manifest" else None
            counts["rows"] += len(batch)
            before = len(cache)
            fill_cache(vlm, processor, cache, recipe, frames, actions, texts)
            if config.flips:
                frames, actions = [mirror_image(frame) for frame in frames], [mirror_text(text) for text in actions]
                texts = None if texts is None else [mirror_text(text) for text in texts]
                fill_cache(vlm, processor, cache, recipe, frames, actions, texts)
            counts["added"] += len(cache) - before
    cache.write()
    accelerator.wait_for_everyone()
    logger.info("process %d: %d rows, %d entries added", accelerator.process_index, counts["rows"], counts["added"])
    accelerator.end_training()


if __name__ == "__main__":
    run(main, CacheEmbeddingsConfig, __doc__)
