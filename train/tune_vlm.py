"""Visual instruction tuning of the VLM: (frame, question about the action) -> description (paper section 3.1).

    accelerate launch train/tune_vlm.py --data DATA --vlm VLM_FOLDER --output-dir runs/vlm

One CPU, one GPU or several GPUs take the same line (`accelerate config` decides). Several CPU processes:
`ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node 2 SCRIPT ...`, since accelerate's own
launcher needs MPI for that. The vision tower stays frozen, projector and language model are trained. The loss counts
the answer's tokens with the end token (`BolinLai/LEGO: vllm/llava/train/train.py`). Running the same command again
goes on where the last one stopped.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from transformers import AutoModelForImageTextToText, AutoProcessor

from lego_pipeline.config import parse_config, to_yaml
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.training import ResumableSteps
from lego_pipeline.vlm import family_of
from lego_pipeline.vlm.base import DEFAULT_QUESTION, ask, check_question

logger = logging.getLogger("tune_vlm")


@dataclass(kw_only=True)
class TuneVlmConfig:
    data: Path  # manifest with image_0, action and description
    vlm: str  # folder or hub name of the VLM with its processor
    output_dir: Path = Path("runs/vlm")
    split: str = "train"
    question_template: str = DEFAULT_QUESTION
    batch_size: int = 16  # samples of one process and step
    max_steps: int = 1000
    max_minutes: float = 0.0  # end this slice earlier, saved; 0 = run to max_steps
    save_every_minutes: float = 10.0
    learning_rate: float = 2e-5
    lr_scheduler: str = "cosine"  # any name of diffusers.optimization.get_scheduler
    warmup_steps: int = 30
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"  # no, fp16 or bf16
    seed: int = 0

    def __post_init__(self):
        check_question(self.question_template)
        for name in ("batch_size", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def main(config: TuneVlmConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    rows = read_manifest(config.data, config.split)
    rows = rows.select_columns(["image_0", "action", "description"])
    lacking = sum(not description for description in rows["description"][:])
    if lacking:
        raise ValueError(
            f"`data` must have a description in every row, {config.data} lacks {lacking}; write them first."
        )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(config.vlm)
    vlm = AutoModelForImageTextToText.from_pretrained(config.vlm, dtype=torch.float32)
    family = family_of(vlm)
    vlm.requires_grad_(False)
    for module in family.language_modules(vlm):
        module.requires_grad_(True)
    trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    if accelerator.is_main_process:
        (config.output_dir / "config.yaml").write_text(to_yaml(config))
        count = sum(parameter.numel() for parameter in trained)
        logger.info(
            "%d samples, %.1f M trained parameters, %d process(es) on %s, %s",
            *(len(rows), count / 1e6, accelerator.num_processes, accelerator.device, config.mixed_precision),
        )
    vlm, optimizer = accelerator.prepare(vlm, optimizer)
    accelerator.register_for_checkpointing(schedule)
    vlm.train()
    steps = ResumableSteps(
        accelerator,
        config.output_dir,
        num_samples=len(rows),
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
        save_every_minutes=config.save_every_minutes,
        seed=config.seed,
        name="VLM",
    )
    for _, indices in steps:
        batch = [rows[i] for i in indices]
        questions = [ask(config.question_template, row["action"]) for row in batch]
        inputs = family.training_batch(
            processor, [row["image_0"] for row in batch], questions, [row["description"] for row in batch]
        )
        loss = vlm(**{name: tensor.to(accelerator.device) for name, tensor in inputs.items()}).loss
        steps.update(loss, trained, optimizer, schedule, config.max_grad_norm)
        steps.log(loss=loss.detach())
    if accelerator.is_main_process:
        accelerator.unwrap_model(vlm).eval().save_pretrained(config.output_dir / "vlm")
        processor.save_pretrained(config.output_dir / "vlm")
        state = {"step": steps.step, "finished": steps.finished}
        (config.output_dir / "report.json").write_text(json.dumps(state, indent=1))
        logger.info("step %d, weights in %s", steps.step, config.output_dir / "vlm")


if __name__ == "__main__":
    main(parse_config(TuneVlmConfig, __doc__))
