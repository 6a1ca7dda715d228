"""Fill the embedding cache of a manifest: the tuned VLM's description of each pair, and its embeddings.

    accelerate launch train/cache_embeddings.py --data DATA --vlm runs/vlm/vlm --cache runs/cache

Every row has a seed of its own, so its description depends neither on the batch nor on the number of processes, which
share the rows. What the cache has is skipped: a second run makes no VLM call. `pairs-SPLIT-*.pairs` (parquet) in the
cache says which entries belong to which row; `train_ldm.py` reads it.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from lego_pipeline.config import parse_config
from lego_pipeline.data.embedding_cache import EmbeddingCache, frame_key, text_key, vlm_key
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.vlm import family_of
from lego_pipeline.vlm.base import DEFAULT_QUESTION, ask, check_question

logger = logging.getLogger("cache_embeddings")


@dataclass(kw_only=True)
class CacheEmbeddingsConfig:
    data: Path  # manifest with image_0 and action
    vlm: str  # folder or hub name of the tuned VLM
    cache: Path  # folder of the cache
    split: str = "train"
    question_template: str = DEFAULT_QUESTION
    batch_size: int = 32  # rows of one process and call
    max_new_tokens: int = 64
    temperature: float = 0.2  # 0 takes the likeliest token
    top_k: int = 50
    seed: int = 0
    dtype: str = "float32"  # of the VLM: float32, float16 or bfloat16

    def __post_init__(self):
        check_question(self.question_template)
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"`dtype` must be float32, float16 or bfloat16, got {self.dtype!r}.")


def row_seed(row_id: str, seed: int) -> int:
    """Seed of a row's description: of its id, not of its place."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:7])


def main(config: CacheEmbeddingsConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    accelerator = Accelerator()
    rows = read_manifest(config.data, config.split).select_columns(["id", "image_0", "action"])
    processor = AutoProcessor.from_pretrained(config.vlm)
    vlm = AutoModelForImageTextToText.from_pretrained(config.vlm, dtype=getattr(torch, config.dtype))
    vlm.eval().to(accelerator.device)
    family, model = family_of(vlm), vlm_key(vlm)
    cache = EmbeddingCache(config.cache, prefix=str(accelerator.process_index))
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    ids, frames, texts, computed = [], [], [], 0
    starts = range(0, len(mine), config.batch_size)
    for start in tqdm(starts, desc="describe", disable=not accelerator.is_main_process, mininterval=5):
        batch = [rows[i] for i in mine[start : start + config.batch_size]]
        questions = [ask(config.question_template, row["action"]) for row in batch]
        seeds = [row_seed(row["id"], config.seed) for row in batch]
        settings = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature, "top_k": config.top_k}
        frame_keys = [frame_key(row["image_0"], model) for row in batch]
        text_keys = [
            text_key(frame, question, seed=seed, **settings)
            for frame, question, seed in zip(frame_keys, questions, seeds, strict=True)
        ]
        new = [
            i for i, keys in enumerate(zip(frame_keys, text_keys, strict=True)) if not all(k in cache for k in keys)
        ]
        if new:
            images, asked = [batch[i]["image_0"] for i in new], [questions[i] for i in new]
            generators = [torch.Generator().manual_seed(seeds[i]) for i in new]
            answers = family.generate(vlm, processor, images, asked, generators=generators, **settings)
            with torch.no_grad():
                enhancements = family.embed(vlm, processor, images, asked, answers)
            for i, enhancement in zip(new, enhancements, strict=True):
                cache.add(frame_keys[i], text_keys[i], enhancement)
            computed += len(new)
        ids += [row["id"] for row in batch]
        frames += frame_keys
        texts += text_keys
    cache.write()
    table = pa.table({"id": ids, "frame_key": frames, "text_key": texts})
    name = f"pairs-{config.split}-{accelerator.process_index:03d}-of-{accelerator.num_processes:03d}"
    for old in config.cache.glob(f"pairs-{config.split}-*.pairs") if accelerator.is_main_process else ():
        if not old.stem.endswith(f"of-{accelerator.num_processes:03d}"):
            old.unlink()
    unfinished = config.cache / f".{name}.tmp"
    pq.write_table(table, unfinished)
    unfinished.replace(config.cache / f"{name}.pairs")
    accelerator.wait_for_everyone()
    logger.info("process %d: %d rows, %d computed now", accelerator.process_index, len(ids), computed)


if __name__ == "__main__":
    main(parse_config(CacheEmbeddingsConfig, __doc__))
