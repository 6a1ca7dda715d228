"""Distil a trained LegoPipeline into few steps of one pass each: consistency distillation of its UNet, as a LoRA.

    python train/distill_ldm.py --data DATA --cache runs/cache --pipeline runs/ldm/last --output-dir runs/fast

The teacher draws in `--teacher-steps` steps with guidance, two or three passes each; the student does it in
`--student-steps` steps of one pass, with both guidance scales in its weights (`lego_pipeline.distillation`). Only
adapters of the UNet are trained; projector, VAE, text encoder and VLM stay as they are. The result, in half precision:

    output_dir/lora    adapters, LCMScheduler and settings: copy it to PIPELINE/fast for `lego generate --fast`, or
                       `pipe.load_fast(output_dir / "lora")`; `comfyui.safetensors` in it is for ComfyUI's LoRA loader
                       alone and need not be copied

Validation draws held-out pairs: `validation.jsonl` has the squared error of the latents against the true ones for the
student, for the teacher and for the input copied, and the share of the teacher's gain over copying that is kept. A
squared error favours blurred frames: `python -m examples.kitchen.few_steps` looks at frames with a judge as well.

Running the same command again goes on where the last run ended or was killed, to the bit. Launched as train_ldm.py is,
on one or several processes; weights that are split over processes (FSDP, DeepSpeed) are refused.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch.func import functional_call

from lego_pipeline import LegoPipeline
from lego_pipeline.atomic import write_text
from lego_pipeline.checkpoints import FAST
from lego_pipeline.config import plain_values, run
from lego_pipeline.data.embedding_cache import EmbeddingCache, Recipe
from lego_pipeline.data.facts import common_size, read_facts
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.data.pairs import VALIDATION_STEP, Draws, PairDataset, collate, load_batches
from lego_pipeline.data.precomputed import fill_latents, fill_prompts, open_precomputed
from lego_pipeline.diffusion_step import Denoiser, Inputs
from lego_pipeline.distillation import (
    ADAPTED,
    ConsistencyPath,
    Student,
    Teacher,
    consistency_losses,
    drawing_errors,
    kept_share,
    student_scheduler,
)
from lego_pipeline.export import whole_folder, with_weights
from lego_pipeline.fast import save_fast
from lego_pipeline.lora import add_lora
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
from lego_pipeline.validation import averaged

logger = get_logger("distill_ldm")  # of the main process

PLACES = ("data", "pipeline", "cache", "output_dir", "vlm")  # settings that say where something lies
ONE_PASS = {"guidance_scale": 1.0, "image_guidance_scale": 1.0, "guidance_interval": [0.0, 1.0]}


@dataclass(kw_only=True)
class DistillLdmConfig:
    data: tuple[Path, ...]  # manifests with image_0, image_1 and action
    pipeline: Path  # LegoPipeline folder of the teacher
    cache: Path | None = None  # embedding cache made by cache_embeddings.py
    output_dir: Path = Path("runs/fast")
    embeddings: Literal["cache", "none"] = "cache"  # of the VLM; none: labels only, no VLM parts
    recipe: str | None = None  # of the cache's entries; None: its only one
    vlm: Path | None = None  # folder of the VLM that filled the cache, where the pipeline has none
    split: str = "train"
    validation_split: str | None = "val"
    validation_pairs: int = 64  # the first of the split, at most
    teacher_steps: int = 50  # of the solver whose path is learnt; the student's steps are taken from its grid
    student_steps: int = 4  # that the student draws in by default; up to teacher_steps can be asked of it
    guidance_scale: float | None = None  # of the action, that goes into the student; None = the pipeline's
    image_guidance_scale: float | None = None  # of the frame, likewise
    batch_size: int = 32  # pairs of one process and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of a step
    max_steps: int = 2000
    max_minutes: float = 0.0  # end this run earlier, saved; 0 = run to max_steps
    save_every_minutes: float = 10.0
    save_every_steps: int = 0  # at multiples too; 0 = by time only
    log_every_steps: int = 50
    validate_every_steps: int = 500
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant_with_warmup"  # any but piecewise_constant of get_scheduler in diffusers
    warmup_steps: int = 50
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.95  # of the average that the student follows, and that is saved; 0 = the student itself
    lora_rank: int = 64
    lora_alpha: int | None = None  # None = the rank
    vlm_dropout: float = 0.0  # share of samples with zeros for both VLM parts, half of them with the bare label
    box_weight: float = 1.0  # of the loss inside hand and object boxes against 1 elsewhere
    resolution: int | None = None  # side in pixels of the square whose area is trained at; None = the pipeline's
    gradient_checkpointing: bool = False  # of the student: less memory, about a third slower
    num_workers: int = 0  # processes that load ahead
    mixed_precision: str = "no"  # no, fp16 or bf16
    report_to: str = "tensorboard"  # or wandb, all, none
    expect_processes: int = 0  # refuse another number; 0 = any
    seed: int = 0

    def __post_init__(self):
        check_settings(self)
        for name in ("validate_every_steps", "validation_pairs", "resolution", "lora_rank", "lora_alpha"):
            check_number(self, name, 1)
        for name in ("guidance_scale", "image_guidance_scale"):
            check_number(self, name, 0)
        check_number(self, "teacher_steps", 1, 1000)
        check_number(self, "student_steps", 1, self.teacher_steps)
        check_number(self, "vlm_dropout", 0, 1)
        check_number(self, "box_weight", above=0)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}.")
        if (self.embeddings == "cache") != (self.cache is not None):
            raise ValueError("`cache` must be given with `embeddings` cache and left out with none; pass one of them.")

    @property
    def alpha(self) -> int:
        """Of LoRA, by default the rank."""
        return self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def report(self) -> str:
        """Memory of a step, for `--dry-run`."""
        from lego_pipeline.memory import distillation_memory

        try:
            memory = distillation_memory(
                self.pipeline,
                batch_size=self.batch_size,
                resolution=self.resolution,
                lora_rank=self.lora_rank,
                gradient_checkpointing=self.gradient_checkpointing,
                mixed_precision=self.mixed_precision,
                average=self.ema_decay > 0,
            )
        except OSError as error:
            return f"memory is unknown, `pipeline` can't be read: {error}"
        except ImportError as error:
            return f"memory is unknown: {error}"
        return memory.table()


def check_sharding(accelerator: Accelerator) -> None:
    """Refuses to split weights over the processes: teacher and student share them."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "the launch configuration must be one of plain data parallelism, got "
            f"{accelerator.distributed_type.value}; adapters are small, use accelerate_eight_gpus.yaml."
        )


def make_datasets(
    config: DistillLdmConfig, pipeline: LegoPipeline, recipe: Recipe | None
) -> tuple[PairDataset, PairDataset | None]:
    """Training and validation samples, with latents and text encodings on disk."""
    folder = config.output_dir / "precomputed"
    models = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    rows = [read_manifest(path, config.split) for path in config.data]
    facts = [read_facts(part, folder / "frames") for part in rows]
    size, others = common_size(facts, pipeline.config.resolution, pipeline.vae_scale_factor)
    if others:
        logger.warning("%d pairs are centre-cropped to the most common aspect, %dx%d pixels", others, *size[::-1])
    draws: dict[str, Any] = {"alphas_cumprod": pipeline.scheduler.alphas_cumprod.float(), "seed": config.seed}
    options: dict[str, Any] = {
        "resolution": pipeline.config.resolution,
        "factor": pipeline.vae_scale_factor,
        "latent_channels": pipeline.vae.config.latent_channels,
        "size": size,
        "box_weight": config.box_weight,
        "precomputed": open_precomputed(folder / "encoded", *models),
        "cache": EmbeddingCache(config.cache) if config.cache is not None else None,
        "recipe": recipe,
        "num_text_tokens": pipeline.projector.config["num_text_tokens"],
    }
    train = PairDataset(rows, facts, Draws(**draws, vlm_dropout=config.vlm_dropout), **options)
    validation = None
    if config.validation_split:
        each = -(-config.validation_pairs // len(config.data))
        held_out = [read_manifest(path, config.validation_split) for path in config.data]
        held_out = [part.select(range(min(len(part), each))) for part in held_out]
        facts = [read_facts(part, folder / "frames") for part in held_out]
        validation = PairDataset(held_out, facts, Draws(**draws, has_dropout=False), **options)
    both = [train, *([validation] if validation else [])]
    fill_latents(both, pipeline.vae)
    fill_prompts(both, pipeline.encode_prompt)
    return train, validation


def variant(pipeline: LegoPipeline, **changes: Any) -> LegoPipeline:
    """A pipeline of the same components with others among them, or with other settings."""
    settings = {name: pipeline.config[name] for name in LegoPipeline._get_signature_keys(LegoPipeline)[1]}
    made = LegoPipeline(**{**pipeline.components, **settings, **changes})
    made.set_progress_bar_config(disable=True)
    return made


@dataclass(kw_only=True)
class Run:
    """What is validated and saved in the course of a run; all processes call its methods together."""

    config: DistillLdmConfig
    accelerator: Accelerator
    steps: ResumableSteps
    teacher: LegoPipeline  # with the steps and scales that are distilled
    student: LegoPipeline  # with the trained UNet and its scheduler
    denoiser: Denoiser
    model: torch.nn.Module
    trained: list[torch.nn.Parameter]
    ema: ResumableEma | None
    inputs: Inputs
    validation: PairDataset | None

    def evaluate(self, step: int) -> None:
        """Where it is due: errors of frames drawn from held-out pairs; the teacher's once, at the beginning."""
        config, errors = self.config, self.steps.progress
        if self.validation is None or (step % config.validate_every_steps and step != config.max_steps):
            return
        if "teacher" not in errors:
            drawn = self.errors(self.teacher)
            errors |= {"teacher": drawn["drawn"], "copied": drawn["copied"]}
        with averaged(self.ema, self.trained, self.model):
            errors["student"] = self.errors(self.student)["drawn"]
        line = {"step": step, **errors, "kept": kept_share(**errors)}
        if self.accelerator.is_main_process:
            with open(config.output_dir / "validation.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({name: line[name] for name in ("student", "kept") if line[name] is not None}, step=step)
        if line["kept"] is not None:
            logger.info("step %d: %.1f %% of the teacher's gain over copying is kept", step, 100 * line["kept"])

    def errors(self, pipeline: LegoPipeline) -> dict[str, float]:
        """Means over the validation pairs, which are shared out to the processes."""
        assert self.validation is not None
        totals: dict[str, torch.Tensor] = {}
        numbers = range(self.accelerator.process_index, len(self.validation), self.accelerator.num_processes)
        for start in range(0, len(numbers), self.config.batch_size):
            samples = [self.validation[VALIDATION_STEP, i] for i in numbers[start : start + self.config.batch_size]]
            with self.accelerator.autocast():
                found = drawing_errors(pipeline, self.denoiser, self.inputs, collate(samples), self.config.seed)
            totals = {name: totals.get(name, 0) + error.sum() for name, error in found.items()}
        zero = torch.zeros((), device=self.accelerator.device)
        both = torch.stack([totals.get(name, zero) for name in ("drawn", "copied")])
        drawn, copied = (self.accelerator.reduce(both, "sum") / len(self.validation)).tolist()
        return {"drawn": drawn, "copied": copied}

    def finish(self) -> None:
        """Writes the averaged adapters as `output_dir/lora`."""
        with averaged(self.ema, self.trained, self.model):
            if self.accelerator.is_main_process:
                self.export(self.config.output_dir / "lora")
        self.accelerator.wait_for_everyone()

    def export(self, folder: Path) -> None:
        """Writes the present adapters with all that belongs to them."""
        config, student, teacher = self.config, self.student.config, self.teacher.config
        names = ("num_inference_steps", *ONE_PASS)
        facts = {
            "settings": {name: student[name] for name in names},
            "teacher": {name: teacher[name] for name in names},
            "steps": self.steps.step,
            "samples": self.steps.step * self.steps.global_batch,
            "validation": self.steps.progress,
            "distill_ldm": {name: value for name, value in plain_values(config).items() if name not in PLACES},
        }
        with whole_folder(folder) as unfinished:
            state, scheduler = self.student.unet.state_dict(), self.student.scheduler
            save_fast(unfinished, state, config.alpha, scheduler, facts)
        size = sum(file.stat().st_size for file in folder.glob("pytorch_*.safetensors")) / 2**20
        logger.info(
            "step %d, few-step model of %.1f MiB in %s; copied to %s (ComfyUI's file may stay out) it is found by "
            "`lego generate --fast`",
            *(self.steps.step, size, folder, config.pipeline / FAST),
        )


def average_of(model: torch.nn.Module, ema: ResumableEma | None) -> Callable[..., torch.Tensor]:
    """The model called with its averaged weights, or the model itself where there are none."""
    if ema is None:
        return model
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return lambda *inputs: functional_call(model, dict(zip(names, ema.shadow_params, strict=True)), inputs)


def main(config: DistillLdmConfig) -> None:
    accelerator = start_accelerator(config)
    check_sharding(accelerator)
    recipe = EmbeddingCache(config.cache).recipe(config.recipe) if config.cache is not None else None
    start = load_start(
        config.pipeline, recipe=recipe, vlm_folder=config.vlm, resolution=config.resolution, seed=config.seed
    )
    if start.kind != LegoPipeline.__name__:
        raise ValueError(f"`pipeline` must be a trained LegoPipeline, got a {start.kind}; run train_ldm.py first.")
    pipeline, device = start.pipeline, accelerator.device
    if config.embeddings == "none" and not pipeline.config.vlm_dropout:
        logger.warning(
            "`embeddings` none leaves the VLM's parts zero, and this teacher was never trained so (`vlm_dropout` in "
            "its config): the student learns from worse frames than with a cache, and for use without a VLM only"
        )
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.projector, pipeline.unet):
        module.requires_grad_(False).eval().to(device)
    train, validation = make_datasets(config, pipeline, recipe)
    connector = train.cache.connector(recipe).to(device) if train.cache is not None and recipe is not None else None
    inputs = Inputs(pipeline, connector=connector, seed=config.seed)
    sources: dict[str, Any] = {"rows": train.digest(), **start.frozen_keys(())}

    asked = {name: getattr(config, name) for name in ("guidance_scale", "image_guidance_scale")}
    scales = {name: pipeline.config[name] if value is None else value for name, value in asked.items()}
    frozen = with_weights(pipeline.unet, pipeline.unet.state_dict()).eval().requires_grad_(False)  # the same memory
    teacher_pipeline = variant(pipeline, unet=frozen, num_inference_steps=config.teacher_steps, **scales)
    scheduler = student_scheduler(pipeline.scheduler, config.teacher_steps)
    student_pipeline = variant(pipeline, scheduler=scheduler, num_inference_steps=config.student_steps, **ONE_PASS)
    denoiser = Denoiser(frozen, pipeline.projector, dropout=0.0).eval()
    interval = pipeline.config.guidance_interval
    teacher = Teacher(denoiser, ConsistencyPath(scheduler, device), **scales, guidance_interval=interval)

    add_lora(pipeline.unet, config.lora_rank, config.alpha, config.seed, ADAPTED)
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    student = Student(pipeline.unet).train().to(device)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
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
    model, optimizer = accelerator.prepare(student, optimizer)
    average = average_of(accelerator.unwrap_model(model), ema)
    free = {"validate_every_steps", "student_steps", "cache", "gradient_checkpointing"}
    steps = ResumableSteps(
        accelerator,
        config.output_dir,
        order=SampleOrder(train.sizes, seed=config.seed),
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        settings={
            **resume_settings(config, free),
            **sources,
            **scales,
            "recipe": recipe.name if recipe is not None else None,
        },
        max_minutes=config.max_minutes,
        save_every_minutes=config.save_every_minutes,
        save_every_steps=config.save_every_steps,
        log_every_steps=config.log_every_steps,
        seed=config.seed,
        name="distil",
    )
    course = Run(
        config=config,
        accelerator=accelerator,
        steps=steps,
        teacher=teacher_pipeline,
        student=student_pipeline,
        denoiser=denoiser,
        model=model,
        trained=trained,
        ema=ema,
        inputs=inputs,
        validation=validation,
    )
    logger.info(
        "teacher %s, %d steps with scales %g (action) and %g (frame); %d samples; %.2f M parameters trained",
        *(config.pipeline, config.teacher_steps, *scales.values(), len(train)),
        sum(parameter.numel() for parameter in trained) / 1e6,
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
    for step, indices in steps:
        for _ in steps.micro_batches(indices):
            loaded = next(batches)
            loaded["timestep"] = teacher.path.on_grid(loaded["timestep"])
            with steps.accumulate(model):
                batch = inputs(loaded)
                with accelerator.autocast():
                    loss = consistency_losses(model, average, teacher, batch).mean()
                steps.update(loss, trained, optimizer, schedule, config.max_grad_norm)
            steps.log(loss=loss.detach())
        if ema is not None:
            ema.step(trained)
        course.evaluate(step + 1)
    course.finish()
    if accelerator.is_main_process:
        state = {"step": steps.step, "finished": steps.finished}
        write_text(config.output_dir / "report.json", json.dumps(state, indent=1))
    accelerator.end_training()


if __name__ == "__main__":
    run(main, DistillLdmConfig, __doc__)
