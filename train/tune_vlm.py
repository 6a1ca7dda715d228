"""Visual instruction tuning of the VLM: (frame, question about the action) -> description (paper section 3.1).

    python train/tune_vlm.py --data DATA --vlm VLM_FOLDER --output-dir runs/vlm

The vision tower stays frozen; projector and language model are trained, as a whole (`--tuning full`), or the language
model by low-rank adapters (`lora`), if need be on 4-bit weights (`qlora`, bitsandbytes), and the projector as a whole.
The loss counts the answer's tokens with the end token (`BolinLai/LEGO: vllm/llava/train/train.py`); it is the mean
over all tokens of a step, so two processes, or micro-batches that are accumulated, equal one large batch (apart from
the adapters' dropout, which comes from seed, step and process). Running the same command again goes on where the last
run ended or was killed, to the bit.

`output_dir/vlm` is a plain transformers folder after every run, adapters merged into weights of type `--dtype`.
`output_dir/adapter` has the adapters alone; after `qlora` there is only this, and its README.md says how to merge.
What comes next is `train/cache_embeddings.py`.

Launch lines, `...` standing for the flags above:

    CPU, two processes   ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 train/tune_vlm.py ...
    one GPU              accelerate launch --config_file train/configs/accelerate_one_gpu.yaml train/tune_vlm.py ...
    eight GPUs           the same with accelerate_eight_gpus.yaml
    two machines         the same with accelerate_two_nodes.yaml, `--machine_rank 0` and `--machine_rank 1`
    ZeRO-2, ZeRO-3       the same with accelerate_zero2.yaml or accelerate_zero3.yaml
    FSDP                 the same with accelerate_fsdp2.yaml

DeepSpeed and FSDP were parsed and never run here; give them `--dtype float32`, as they want weights of one type.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from datasets import Dataset, Image, concatenate_datasets
from diffusers.optimization import get_scheduler
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from lego_pipeline.config import run
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.data.shards import weights_key
from lego_pipeline.export import whole_folder
from lego_pipeline.training import (
    ResumableSteps,
    SampleOrder,
    check_number,
    check_settings,
    cut_log,
    resume_settings,
    start_accelerator,
    write_run_files,
)
from lego_pipeline.vlm import VLM_FAMILIES, chat, family_of
from lego_pipeline.vlm.base import DEFAULT_QUESTION, ask, base_model, check_question
from lego_pipeline.vlm.load import load_processor, load_vlm
from lego_pipeline.vlm.tuning import (
    answer_loss,
    checkpoint_activations,
    count_tokens,
    frozen_weights,
    load_in_4_bits,
    merge_adapter,
    set_training,
    train_adapters,
    train_whole,
    trained_parameters,
)

logger = logging.getLogger("tune_vlm")

MERGING = """# Adapter of {vlm}

Made by `train/tune_vlm.py`. `train/cache_embeddings.py --vlm {vlm} --adapter FOLDER` takes it as it is. To merge it
into a plain folder:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

vlm = AutoModelForImageTextToText.from_pretrained("{vlm}", dtype=torch.bfloat16)
PeftModel.from_pretrained(vlm, "FOLDER").merge_and_unload().to(torch.bfloat16).save_pretrained("MERGED")
AutoProcessor.from_pretrained("{vlm}").save_pretrained("MERGED")
```
"""


@dataclass(kw_only=True)
class TuneVlmConfig:
    data: tuple[Path, ...]  # manifests with image_0, action and description
    vlm: str  # folder or hub name of the VLM with its processor
    output_dir: Path = Path("runs/vlm")
    tuning: Literal["full", "lora", "qlora"] = "full"  # what of the language model is trained
    lora_rank: int = 16
    lora_alpha: int = 32  # adapters are scaled by alpha / rank
    lora_dropout: float = 0.05
    data_weights: tuple[float, ...] = ()  # shares of the data sets; empty: in proportion to their rows
    split: str = "train"
    validation_split: str | None = None  # whose loss is measured; None: no validation
    validation_rows: int = 256  # the first of the split, at most
    validate_every_steps: int = 200
    question_template: str = DEFAULT_QUESTION
    batch_size: int = 16  # samples of one process and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of a step
    max_steps: int = 1000
    max_minutes: float = 0.0  # end this run earlier, saved; 0 = run to max_steps
    save_every_minutes: float = 10.0
    save_every_steps: int = 0  # at multiples too; 0 = by time only
    log_every_steps: int = 50
    learning_rate: float = 2e-5  # adapters take about ten times as much
    lr_scheduler: str = "cosine"  # any name of diffusers.optimization.get_scheduler
    warmup_steps: int = 30
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"  # no, fp16 or bf16
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of weights that aren't trained; trained are float32
    gradient_checkpointing: bool = False  # of the language model: less memory, about a third slower
    num_workers: int = 0  # processes that load ahead
    report_to: str = "tensorboard"  # or wandb, all, none
    expect_processes: int = 0  # refuse another number; 0 = any
    seed: int = 0

    def __post_init__(self):
        check_settings(self)
        check_question(self.question_template)
        for name in ("lora_rank", "lora_alpha", "validation_rows", "validate_every_steps"):
            check_number(self, name, 1)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be at least 0 and below 1, got {self.lora_dropout}.")
        if self.dtype != "float32" and self.mixed_precision == "no":
            raise ValueError(
                f"`dtype` must be float32 with `mixed_precision` no, got {self.dtype}; pass --mixed-precision "
                f"{'fp16' if self.dtype == 'float16' else 'bf16'}."
            )

    def report(self) -> str:
        """Memory of one process, for --dry-run, from the VLM's config file alone."""
        from lego_pipeline.memory import vlm_memory

        try:
            architecture = AutoConfig.from_pretrained(self.vlm)
        except (OSError, ValueError) as error:
            return f"memory: unknown, `vlm` can't be read ({str(error).splitlines()[0]})"
        with torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(architecture, dtype=getattr(torch, self.dtype))
            vlm = train_parts(self, vlm)
        memory = vlm_memory(
            vlm,
            batch_size=self.batch_size,
            num_image_tokens=count_image_tokens(self.vlm, vlm),
            mixed_precision=self.mixed_precision,
            is_four_bit=self.tuning == "qlora",
        )
        return memory.table()


def count_image_tokens(folder: str, vlm: Any) -> int:
    """Image tokens of a frame, by the processor or, without one, by what its family usually takes."""
    try:
        return family_of(vlm).sizes(vlm, AutoProcessor.from_pretrained(folder))[0]
    except (OSError, ValueError):
        vision = base_model(vlm).config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 if hasattr(vision, "image_size") else 256


def read_rows(paths: Iterable[Path], split: str) -> list[Dataset]:
    """Frames, actions and descriptions of a split of each manifest.

    Raises:
        ValueError: a row has no description.
    """
    parts = []
    for path in paths:
        rows = read_manifest(path, split).select_columns(["image_0", "action", "description"])
        lacking = sum(not (description or "").strip() for description in rows["description"][:])
        if lacking:
            raise ValueError(f"`data` must have a description in every row, {path} lacks {lacking}; write them first.")
        parts.append(rows)
    return parts


def rows_key(rows: Dataset) -> str:
    """Digest of all that training reads of the rows; of a frame's file the size, which is cheap and seldom stays."""
    digest = hashlib.sha256()
    files = rows.cast_column("image_0", Image(decode=False)).with_format("arrow")
    for table in files.iter(1000):
        frames = table["image_0"].combine_chunks()
        sizes = pc.binary_length(frames.field("bytes")).to_pylist()
        paths = frames.field("path").to_pylist()
        sizes = [Path(path).stat().st_size if size is None else size for size, path in zip(sizes, paths, strict=True)]
        facts = [sizes, table["action"].to_pylist(), table["description"].to_pylist()]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Collate:
    """Rows to a batch of the VLM's family, which is named so that worker processes can be given this."""

    model_type: str
    processor: Any
    question_template: str

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        questions = [ask(self.question_template, row["action"]) for row in rows]
        frames, descriptions = [row["image_0"] for row in rows], [row["description"] for row in rows]
        return VLM_FAMILIES[self.model_type].training_batch(self.processor, frames, questions, descriptions)


def train_parts(config: TuneVlmConfig, vlm: Any) -> Any:
    """The VLM in training mode, what is trained chosen by the settings."""
    if config.tuning == "full":
        vlm = train_whole(vlm)
    else:
        adapters = {"rank": config.lora_rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        vlm = train_adapters(vlm, **adapters, seed=config.seed)
    if config.gradient_checkpointing:
        checkpoint_activations(vlm)
    set_training(vlm)
    return vlm


@torch.no_grad()
def validate(accelerator: Accelerator, vlm: nn.Module, rows: Dataset, collate: Collate, batch_size: int) -> float:
    """Mean loss of the answers' tokens in held-out rows, without dropout; batches are split over the processes."""
    vlm.eval()
    starts = range(0, len(rows), batch_size)
    totals = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    for turn in range(0, len(starts), accelerator.num_processes):
        number = turn + accelerator.process_index
        # All processes call the model equally often, as split weights need it; what is too much doesn't count.
        start = starts[min(number, len(starts) - 1)]
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        loss = answer_loss(vlm, batch, accelerator.device)
        if number < len(starts):
            totals += torch.tensor([loss.item(), count_tokens([batch])], device=totals.device)
    total, count = accelerator.reduce(totals, "sum").tolist()
    vlm.train()
    set_training(accelerator.unwrap_model(vlm))
    return total / count


def export(config: TuneVlmConfig, accelerator: Accelerator, vlm: nn.Module, processor: Any) -> None:
    """Writes the tuned VLM, and the adapters if there are any; all processes take part in collecting the weights."""
    state = accelerator.get_state_dict(vlm)
    if not accelerator.is_main_process:
        return
    tuned: Any = accelerator.unwrap_model(vlm)
    if config.tuning == "full":
        with whole_folder(config.output_dir / "vlm") as folder:
            tuned.save_pretrained(folder, state_dict=state)
            processor.save_pretrained(folder)
        return
    adapter = config.output_dir / "adapter"
    with whole_folder(adapter) as folder:
        tuned.save_pretrained(folder, state_dict=state)
        (folder / "README.md").write_text(MERGING.format(vlm=config.vlm), encoding="utf-8")
    if config.tuning == "qlora":
        return
    # Merged from the files: weights that training holds in parts, or goes on with, stay as they are.
    merged = merge_adapter(config.vlm, adapter, getattr(torch, config.dtype))
    with whole_folder(config.output_dir / "vlm") as folder:
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)


def main(config: TuneVlmConfig) -> None:
    accelerator = start_accelerator(config)
    parts = read_rows(config.data, config.split)
    rows = concatenate_datasets(parts)
    order = SampleOrder([len(part) for part in parts], config.data_weights, config.seed)
    held_out = None
    if config.validation_split is not None:
        held_out = concatenate_datasets(read_rows(config.data, config.validation_split))
        held_out = held_out.select(range(min(config.validation_rows, len(held_out))))
    processor = load_processor(config.vlm)
    chat.check_template(processor)
    dtype = getattr(torch, config.dtype)
    if config.tuning == "qlora":
        vlm = load_in_4_bits(config.vlm, dtype, accelerator.device)
    else:
        vlm = load_vlm(config.vlm, dtype=dtype)
    collate = Collate(vlm.config.model_type, processor, config.question_template)
    vlm = train_parts(config, vlm)
    trained = trained_parameters(vlm)
    optimizer = torch.optim.AdamW(
        trained,
        config.learning_rate,
        weight_decay=config.weight_decay,
        fused=accelerator.device.type == "cuda",  # otherwise it needs copies of all trained weights there
    )
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    if accelerator.is_main_process:
        logger.info(
            "%d rows of %d manifest(s); %s tuning of a %s, %.1f M trained parameters in float32, %.1f M others in %s",
            *(len(rows), len(parts), config.tuning, collate.model_type, sum(p.numel() for p in trained) / 1e6),
            *(sum(p.numel() for p in vlm.parameters() if not p.requires_grad) / 1e6, config.dtype),
        )
    settings = resume_settings(config, {"validation_split", "validation_rows", "validate_every_steps"})
    if accelerator.is_main_process:  # which alone compares them; not in the state, and not told by a path
        settings |= {"frozen weights": weights_key(frozen_weights(vlm)), "rows": rows_key(rows)}
    vlm, optimizer = accelerator.prepare(vlm, optimizer)
    accelerator.register_for_checkpointing(schedule)
    steps = ResumableSteps(
        accelerator,
        config.output_dir,
        order=order,
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        settings=settings,
        max_minutes=config.max_minutes,
        save_every_minutes=config.save_every_minutes,
        save_every_steps=config.save_every_steps,
        log_every_steps=config.log_every_steps,
        seed=config.seed,
        name="VLM",
        progress={"validation_loss": None, "best_validation_loss": None, "best_step": None},
    )
    steps.restore()
    write_run_files(config, accelerator)
    log = config.output_dir / "validation.jsonl"
    if accelerator.is_main_process:
        cut_log(log, steps.step)

    def plan() -> Iterator[list[int]]:
        for step in range(steps.step, config.max_steps):
            yield from steps.micro_batches(steps.indices(step))

    def measure(step: int) -> None:
        if held_out is None:
            return
        loss = validate(accelerator, vlm, held_out, collate, config.batch_size)
        steps.progress["validation_loss"] = loss
        best = steps.progress["best_validation_loss"]
        if best is None or loss < best:
            steps.progress |= {"best_validation_loss": loss, "best_step": step}
        accelerator.log({"validation_loss": loss}, step=step)
        if accelerator.is_main_process:
            logger.info("step %d: loss %.4f on %d held-out rows", step, loss, len(held_out))
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": loss}) + "\n")

    batches = iter(
        DataLoader(
            rows,  # ty: ignore[invalid-argument-type]
            batch_sampler=plan(),
            num_workers=config.num_workers,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    parallel = accelerator.num_processes * accelerator.gradient_accumulation_steps
    for step, _ in steps:
        micro_batches = [next(batches) for _ in range(accelerator.gradient_accumulation_steps)]
        count = torch.tensor(count_tokens(micro_batches), device=accelerator.device)
        count = accelerator.reduce(count, "sum")
        for batch in micro_batches:
            with steps.accumulate(vlm):
                # `update` takes the mean over micro-batches and processes; this makes it the sum over tokens / count.
                loss = answer_loss(vlm, batch, accelerator.device) * (parallel / count)
                steps.update(loss, trained, optimizer, schedule, config.max_grad_norm)
            steps.log(loss=loss)
        if (step + 1) % config.validate_every_steps == 0 or step + 1 == config.max_steps:
            measure(step + 1)
    export(config, accelerator, vlm, processor)
    if accelerator.is_main_process:
        report = {"step": steps.step, "finished": steps.finished, **(steps.progress if held_out is not None else {})}
        (config.output_dir / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        logger.info("step %d, weights in %s", steps.step, config.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, TuneVlmConfig, __doc__)
