"""Train LEGO's latent diffusion model: UNet and projector on pairs, descriptions and embeddings (paper section 3.3).

    python train/train_ldm.py --data DATA --cache runs/cache --pipeline START --output-dir runs/ldm

`--pipeline` is a LegoPipeline folder, an InstructPix2Pix or a Stable Diffusion 1.x folder in diffusers' layout (the
UNet of the last is widened). VAE, text encoder and VLM stay frozen. Running the same command again goes on where the
last run ended or was killed, to the bit. `output_dir/last` is a usable LegoPipeline after every run, `output_dir/best`
the one of the lowest validation loss; with `--lora-rank` there is `output_dir/lora` too.

All three projection modules are trained and averaged with the UNet, unlike in the released code, where they are not in
the optimiser; `--freeze-projections` reproduces the publication, with the text mixer's dropout active as there. Noise,
timesteps and dropped conditions of a sample come from (seed, step, sample), so more processes with the same global
batch see the same; only the text mixer's own dropout comes from (seed, step, process).

Launch lines, `...` standing for the flags above:

    CPU, two processes   ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 train/train_ldm.py ...
    one GPU              accelerate launch --config_file train/configs/accelerate_one_gpu.yaml train/train_ldm.py ...
    eight GPUs           the same with accelerate_eight_gpus.yaml
    two machines         the same with accelerate_two_nodes.yaml, `--machine_rank 0` and `--machine_rank 1`
    ZeRO-2, ZeRO-3       the same with accelerate_zero2.yaml or accelerate_zero3.yaml
    FSDP                 the same with accelerate_fsdp2.yaml

DeepSpeed and FSDP were parsed and never run here. ZeRO-3 and FSDP split the weights, so `--ema-decay 0` is needed.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from lego_pipeline import LegoPipeline
from lego_pipeline.config import plain_values, run
from lego_pipeline.data.embedding_cache import EmbeddingCache, Recipe
from lego_pipeline.data.facts import common_size, read_facts
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.data.pairs import Draws, PairDataset, load_batches
from lego_pipeline.data.precomputed import fill_latents, fill_prompts, open_precomputed
from lego_pipeline.diffusion_step import Denoiser, Inputs, losses_of, timestep_weights
from lego_pipeline.enhance import vlm_id
from lego_pipeline.export import VlmFiles, model_card, save_trained, whole_folder
from lego_pipeline.lora import add_lora, export_lora, merge_lora
from lego_pipeline.start import load_start
from lego_pipeline.training import (
    ResumableEma,
    ResumableSteps,
    SampleOrder,
    check_number,
    check_settings,
    cut_log,
    resume_settings,
    start_accelerator,
    write_run_files,
)
from lego_pipeline.validation import averaged, draw_pictures, validate

logger = get_logger("train_ldm")  # of the main process

PLACES = ("data", "pipeline", "cache", "output_dir", "vlm")  # settings that say where something lies


@dataclass(kw_only=True)
class TrainLdmConfig:
    data: tuple[Path, ...]  # manifests with image_0, image_1 and action
    pipeline: Path  # folder to start from: LegoPipeline, InstructPix2Pix or Stable Diffusion 1.x
    cache: Path | None = None  # embedding cache made by cache_embeddings.py
    output_dir: Path = Path("runs/ldm")
    embeddings: Literal["cache", "on_the_fly", "none"] = "cache"  # of the VLM; none: labels only, no VLM parts
    recipe: str | None = None  # of the cache's entries; None: its only one
    vlm: Path | None = None  # folder of a tuned VLM, instead of the pipeline's own
    data_weights: tuple[float, ...] = ()  # shares of the data sets; empty: in proportion to their pairs
    split: str = "train"
    validation_split: str | None = "val"
    validation_pairs: int = 128  # the first of the split, at most
    batch_size: int = 32  # pairs of one process and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of a step
    max_steps: int = 20_000
    max_minutes: float = 0.0  # end this run earlier, saved; 0 = run to max_steps
    save_every_minutes: float = 10.0
    save_every_steps: int = 0  # at multiples too; 0 = by time only
    log_every_steps: int = 50
    validate_every_steps: int = 500
    pictures_every_steps: int = 0  # generate from the first validation pairs; 0 = never
    pictures: int = 4  # how many
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant_with_warmup"  # any but piecewise_constant of get_scheduler in diffusers
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999  # of the averaged weights, which are validated and saved; 0 = no average
    condition_dropout: float = 0.05  # of text only, both, image only, each
    vlm_dropout: float = 0.0  # share of samples with zeros for both VLM parts, half of them with the bare label
    vlm_parts: Literal["both", "image", "text", "none"] = "both"  # that are used; others are zeros, for ablations
    freeze_projections: bool = False  # as in the released code
    lora_rank: int = 0  # train adapters of the UNet instead of its weights; 0 = all weights
    lora_alpha: int | None = None  # None = the rank
    timestep_sampling: Literal["uniform", "log_normal"] = "uniform"  # the latter: log sigma ~ N(log_sigma_mean, 1)
    log_sigma_mean: float = 0.8
    box_weight: float = 1.0  # of the loss inside hand and object boxes against 1 elsewhere
    min_snr_gamma: float = 0.0  # weight of the timesteps by min(SNR, gamma), usually 5; 0 = none
    noise_offset: float = 0.0  # share of noise that is constant over each channel, usually 0.1
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None  # None = the start's
    flips: bool = False  # mirrored pairs too, with left and right exchanged; the cache must have been filled with them
    resolution: int | None = None  # side in pixels of the square whose area is trained at; None = the start's, or 256
    aspect_buckets: bool = False  # batches of one aspect; otherwise all frames are cropped to the most common one
    precompute: bool = True  # latents and text encodings once, to output_dir/precomputed; False = in every step
    gradient_checkpointing: bool = False  # of the UNet: less memory, about a third slower
    num_workers: int = 0  # processes that load ahead
    mixed_precision: str = "no"  # no, fp16 or bf16
    report_to: str = "tensorboard"  # or wandb, all, none
    expect_processes: int = 0  # refuse another number; 0 = any
    seed: int = 0

    def __post_init__(self):
        check_settings(self)
        for name in ("validate_every_steps", "validation_pairs", "pictures", "resolution", "lora_alpha"):
            check_number(self, name, 1)
        for name in ("pictures_every_steps", "lora_rank", "min_snr_gamma", "noise_offset"):
            check_number(self, name, 0)
        check_number(self, "log_sigma_mean")
        check_number(self, "box_weight", above=0)
        check_number(self, "condition_dropout", 0, 1 / 3)
        check_number(self, "vlm_dropout", 0, 1)
        if self.lora_alpha is not None and not self.lora_rank:
            raise ValueError("`lora_alpha` has no effect without `lora_rank`; pass both or none.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}.")
        if self.embeddings == "cache" and self.cache is None:
            raise ValueError("`cache` must be given, got none; pass --cache, or --embeddings on_the_fly or none.")
        if self.embeddings != "cache" and self.cache is not None:
            raise ValueError(f"`cache` has no effect with `embeddings` {self.embeddings}; leave it out.")
        if self.vlm_parts != "both" and self.embeddings == "none":
            raise ValueError(f"`vlm_parts` {self.vlm_parts} has no effect with `embeddings` none; leave it out.")
        if self.pictures_every_steps and self.validation_split is None:
            raise ValueError("`pictures_every_steps` needs a `validation_split`, got none; name one, or pass 0.")
        if self.aspect_buckets and len(self.data_weights) > 1:
            raise ValueError("`data_weights` must be left out with `aspect_buckets`; drop one of them.")

    @property
    def trains_projector(self) -> bool:
        return self.embeddings != "none" and not self.freeze_projections

    @property
    def alpha(self) -> int:
        """Of LoRA, by default the rank."""
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def report(self) -> str:
        """Memory of a step, for `--dry-run`."""
        from lego_pipeline.memory import ldm_memory

        try:
            memory = ldm_memory(
                self.pipeline,
                batch_size=self.batch_size,
                resolution=self.resolution,
                trains_projector=self.trains_projector,
                lora_rank=self.lora_rank,
                gradient_checkpointing=self.gradient_checkpointing,
                mixed_precision=self.mixed_precision,
                average=self.ema_decay > 0,
                precompute=self.precompute,
            )
        except OSError as error:
            return f"memory is unknown, `pipeline` can't be read: {error}"
        except ImportError as error:
            return f"memory is unknown: {error}"
        return memory.table()


def check_sharding(accelerator: Accelerator, config: TrainLdmConfig) -> None:
    """Refuses what needs whole weights on every process where they are split over the processes."""
    kind, plugin = accelerator.distributed_type, accelerator.state.deepspeed_plugin
    is_zero_3 = kind == DistributedType.DEEPSPEED and plugin is not None and plugin.zero_stage == 3
    if not is_zero_3 and kind != DistributedType.FSDP:
        return
    name = "ZeRO-3" if is_zero_3 else "FSDP"
    for setting in ("ema_decay", "pictures_every_steps"):
        if getattr(config, setting):
            raise ValueError(
                f"`{setting}` must be 0 with {name}, which splits the weights over the processes, got "
                f"{getattr(config, setting)}; pass 0, or use ZeRO-2 or plain data parallelism."
            )


def read_rows(config: TrainLdmConfig) -> tuple[list[Dataset], list[Dataset]]:
    """Rows of each data set to train on, and to validate with (none without a split for it)."""
    rows = [read_manifest(path, config.split) for path in config.data]
    if not config.validation_split:
        return rows, []
    held_out = [read_manifest(path, config.validation_split) for path in config.data]
    each = math.ceil(config.validation_pairs / len(held_out))
    return rows, [part.select(range(min(len(part), each))) for part in held_out]


def make_datasets(
    config: TrainLdmConfig,
    rows: list[Dataset],
    held_out: list[Dataset],
    pipeline: LegoPipeline,
    recipe: Recipe | None,
) -> tuple[PairDataset, PairDataset | None]:
    """Training and validation samples, with all that is computed once on disk."""
    folder = config.output_dir / "precomputed"
    facts = [read_facts(part, folder / "frames", flips=config.flips) for part in rows]
    factor, resolution = pipeline.vae_scale_factor, pipeline.config.resolution
    size, others = common_size(facts, resolution, factor)
    if config.aspect_buckets:
        size = None
    elif others:
        logger.warning("%d pairs are centre-cropped to the most common aspect, %dx%d pixels", others, *size[::-1])
    draws: dict[str, Any] = {"alphas_cumprod": pipeline.scheduler.alphas_cumprod.float(), "seed": config.seed}
    draws |= {"timestep_sampling": config.timestep_sampling, "log_sigma_mean": config.log_sigma_mean}
    models = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    options: dict[str, Any] = {
        "resolution": resolution,
        "factor": factor,
        "latent_channels": pipeline.vae.config.latent_channels,
        "size": size,
        "box_weight": config.box_weight,
        "precomputed": open_precomputed(folder / "encoded", *models) if config.precompute else None,
        "cache": EmbeddingCache(config.cache) if config.cache is not None else None,
        "recipe": recipe,
        "num_text_tokens": pipeline.projector.config["num_text_tokens"],
        "gives_frames": config.embeddings == "on_the_fly",
    }
    train = PairDataset(rows, facts, Draws(**draws, vlm_dropout=config.vlm_dropout), flips=config.flips, **options)
    validation = None
    if held_out:
        facts = [read_facts(part, folder / "frames") for part in held_out]
        validation = PairDataset(held_out, facts, Draws(**draws, has_dropout=False), **options)
    if config.precompute:
        both = [train, *([validation] if validation else [])]
        fill_latents(both, pipeline.vae)
        if config.embeddings != "on_the_fly":
            fill_prompts(both, pipeline.encode_prompt)
    return train, validation


@dataclass(kw_only=True)
class Run:
    """What is validated, drawn and saved in the course of a run; all processes call its methods together."""

    config: TrainLdmConfig
    accelerator: Accelerator
    steps: ResumableSteps
    pipeline: LegoPipeline
    model: nn.Module
    trained: list[nn.Parameter]  # of the model
    ema: EMAModel | None
    inputs: Inputs
    validation: PairDataset | None
    vlm_files: VlmFiles | None

    def evaluate(self, step: int) -> None:
        """Where they are due: loss and pictures of the averaged weights; exports `best` if the loss is the lowest.

        Done before the state of the step is saved, so that a state knows of its own validation.
        """
        config, progress = self.config, self.steps.progress
        validates = step % config.validate_every_steps == 0 or step == config.max_steps
        draws = config.pictures_every_steps > 0 and step % config.pictures_every_steps == 0
        if self.validation is None or not (validates or draws):
            return
        with averaged(self.ema, self.trained, self.model):
            if validates:
                loss = validate(self.accelerator, self.model, self.inputs, self.validation)
                if self.accelerator.is_main_process:
                    with open(config.output_dir / "validation.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps({"step": step, "loss": loss}) + "\n")
                self.accelerator.log({"validation_loss": loss}, step=step)
                if step > 0 and loss < progress.get("best_loss", math.inf):
                    progress |= {"best_loss": loss, "best_step": step}
                    self.export("best", step)
            if draws and self.accelerator.is_main_process:
                self.draw(step, self.validation)
        self.accelerator.wait_for_everyone()

    def draw(self, step: int, validation: PairDataset) -> None:
        """Pictures to `output_dir/validation` and to the trackers."""
        with self.accelerator.autocast():
            sheet = draw_pictures(self.pipeline, self.inputs, validation, self.config.pictures, self.config.seed)
        path = self.config.output_dir / "validation" / f"step-{step}.png"
        path.parent.mkdir(exist_ok=True)
        sheet.save(path)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, **layout)

    def finish(self) -> None:
        """Exports the weights that the run ends with, as `last` and, of adapters, as `lora`."""
        with averaged(self.ema, self.trained, self.model):
            self.export("last", self.steps.step)

    def export(self, name: str, step: int) -> None:
        """Writes the present weights as the folder `name`."""
        state = self.accelerator.get_state_dict(self.model)
        if not self.accelerator.is_main_process:
            return
        unet, projector = (
            {key.removeprefix(part): tensor for key, tensor in state.items() if key.startswith(part)}
            for part in ("unet.", "projector.")
        )
        folder, card = self.config.output_dir / name, self.card(step)
        alpha = self.config.alpha
        save_trained(folder, self.pipeline, merge_lora(unet, alpha), projector, vlm=self.vlm_files, card=card)
        if self.config.lora_rank and name == "last":
            with whole_folder(self.config.output_dir / "lora") as unfinished:
                export_lora(unet, alpha, unfinished)
                self.pipeline.projector.save_pretrained(unfinished / "projector")
        logger.info("step %d, LegoPipeline in %s", step, folder)

    def card(self, step: int) -> str:
        """Model card of a folder that is exported at a step."""
        config, progress = self.config, self.steps.progress
        log = config.output_dir / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        facts = {
            "started from": config.pipeline.name,
            "data": f"{', '.join(path.name for path in config.data)}, split {config.split}",
            "pairs": f"{sum(self.steps.order.sizes):,}{', half of them mirrored' if config.flips else ''}",
            "steps": f"{step:,} of {config.max_steps:,}",
            "samples seen": f"{step * self.steps.global_batch:,}",
            "training loss": f"{json.loads(lines[-1])['loss']:.4f}" if lines else "not logged",
            "lowest validation loss": "none"
            if "best_loss" not in progress
            else f"{progress['best_loss']:.4f} at step {progress['best_step']:,}",
        }
        kept = {name: value for name, value in plain_values(config).items() if name not in PLACES}
        settings = yaml.safe_dump(kept, sort_keys=False)
        return model_card("LegoPipeline", base_model=config.pipeline.name, facts=facts, settings=settings)


def main(config: TrainLdmConfig) -> None:
    accelerator = start_accelerator(config)
    check_sharding(accelerator, config)
    rows, held_out = read_rows(config)
    recipe = EmbeddingCache(config.cache).recipe(config.recipe) if config.cache is not None else None
    start = load_start(
        config.pipeline,
        recipe=recipe,
        vlm_folder=config.vlm,
        runs_vlm=config.embeddings == "on_the_fly",
        vlm_dtype={"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision],
        resolution=config.resolution,
        prediction_type=config.prediction_type,
        seed=config.seed,
    )
    pipeline, vlm, device = start.pipeline, start.vlm, accelerator.device
    pipeline.register_to_config(vlm_dropout=config.embeddings == "none" or config.vlm_dropout > 0)
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.projector, *([vlm] if vlm is not None else [])):
        module.requires_grad_(False).eval().to(device)
    train, validation = make_datasets(config, rows, held_out, pipeline, recipe)
    connector = train.cache.connector(recipe).to(device) if train.cache is not None and recipe is not None else None
    processor = start.vlm_files.processor if start.vlm_files is not None else None
    asked = (vlm, processor) if vlm is not None else None
    known_id = recipe.vlm_id if recipe is not None else None  # None as well if no VLM takes part
    pipeline.projector.register_to_config(vlm_id=known_id if asked is None else vlm_id(*asked))
    inputs = Inputs(pipeline, vlm=asked, connector=connector, noise_offset=config.noise_offset, seed=config.seed)

    # Before adapters rename the weights. Of what is trained whole, a state holds the weights themselves.
    whole = ([] if config.lora_rank else ["unet"]) + (["projector"] if config.trains_projector else [])
    sources: dict[str, Any] = {"rows": train.digest(), **start.frozen_keys(whole)}
    if config.lora_rank:
        add_lora(pipeline.unet, config.lora_rank, config.alpha, config.seed)
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    pipeline.projector.requires_grad_(config.trains_projector)
    denoiser = Denoiser(pipeline.unet, pipeline.projector, config.condition_dropout, config.vlm_parts)
    denoiser.train().to(device)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    is_fused = device.type == "cuda"  # otherwise a GPU's step needs temporaries of all weights' size
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay, fused=is_fused)
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    ema = None
    if config.ema_decay:
        ema = ResumableEma(trained, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        accelerator.register_for_checkpointing(ema)
    accelerator.register_for_checkpointing(schedule)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = timestep_weights(inputs.prediction_type, inputs.alphas, config.min_snr_gamma)
    free = {"validation_split", "validation_pairs", "validate_every_steps", "pictures_every_steps", "pictures"}
    free |= {"cache", "gradient_checkpointing"}
    steps = ResumableSteps(
        accelerator,
        config.output_dir,
        order=SampleOrder(
            train.sizes, config.data_weights, config.seed, train.groups() if config.aspect_buckets else None
        ),
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        settings={**resume_settings(config, free), **sources, "recipe": recipe.name if recipe is not None else None},
        max_minutes=config.max_minutes,
        save_every_minutes=config.save_every_minutes,
        save_every_steps=config.save_every_steps,
        log_every_steps=config.log_every_steps,
        seed=config.seed,
        name="LDM",
    )
    course = Run(
        config=config,
        accelerator=accelerator,
        steps=steps,
        pipeline=pipeline,
        model=model,
        trained=trained,
        ema=ema,
        inputs=inputs,
        validation=validation,
        vlm_files=start.vlm_files,
    )
    logger.info(
        "start from the %s %s; %d samples, %s pixels; embeddings %s; %.1f M parameters trained, %s prediction",
        *(start.kind, config.pipeline, len(train), f"{train.size[1]}x{train.size[0]}" if train.size else "mixed"),
        *(config.embeddings, sum(parameter.numel() for parameter in trained) / 1e6, inputs.prediction_type),
    )

    steps.restore()
    write_run_files(config, accelerator)  # not before: a run that is refused leaves those of the run before
    if accelerator.is_main_process:
        # A state knows of its own validation, but the first one is done before there is any state.
        cut_log(config.output_dir / "validation.jsonl", steps.step if steps.step > 0 else -1)

    def plan() -> Iterator[list[tuple[int, int]]]:
        for step in range(steps.step, config.max_steps):
            for samples in steps.micro_batches(steps.indices(step)):
                yield [(step, sample) for sample in samples]

    batches = load_batches(train, plan(), num_workers=config.num_workers, pin_memory=device.type == "cuda")
    if steps.step == 0:
        course.evaluate(0)
    before = time.perf_counter()
    for step, indices in steps:
        waited = 0.0
        for _ in steps.micro_batches(indices):
            asked = time.perf_counter()
            loaded = next(batches)
            waited += time.perf_counter() - asked
            with steps.accumulate(model):
                batch = inputs(loaded)
                loss = (losses_of(model, batch) * weights[batch["timestep"]]).mean()
                steps.update(loss, trained, optimizer, schedule, config.max_grad_norm)
            steps.log(loss=loss.detach())
        if ema is not None:
            ema.step(trained)
        now = time.perf_counter()
        steps.log(waiting_for_data=waited / (now - before))  # share of the time
        course.evaluate(step + 1)
        before = time.perf_counter()
    course.finish()
    if config.embeddings == "cache" and start.vlm_files is None:
        logger.warning(
            "%s has no VLM: to have it describe frames, pass the folder of the cache's VLM by `--vlm`",
            config.output_dir / "last",
        )
    if accelerator.is_main_process:
        state = {"step": steps.step, "finished": steps.finished}
        (config.output_dir / "report.json").write_text(json.dumps(state, indent=1))
    accelerator.end_training()


if __name__ == "__main__":
    run(main, TrainLdmConfig, __doc__)
