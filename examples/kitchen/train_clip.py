"""Train the kitchen's small CLIP on frames and their texts; its towers are frozen in everything that follows.

    python -m examples.kitchen.train_clip --data DATA --output-dir runs/clip

The text tower becomes the pipeline's text encoder, the vision tower the VLM's eye. Target frames go with their label
or description; input frames, which the VLM will see, with their description. Equal texts in a batch are all positives.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPVisionModel

from examples.kitchen.components import build_clip, build_clip_tokenizer, build_image_processor, save_clip_tokenizer
from examples.kitchen.frames import load_frames, read_split
from lego_pipeline.config import run
from lego_pipeline.training import ResumableSteps, SampleOrder, resume_settings


@dataclass(kw_only=True)
class TrainClipConfig:
    data: Path  # folder of the rendered kitchen, with train/ and val/
    output_dir: Path = Path("runs/kitchen/clip")
    batch_size: int = 64  # frames
    max_steps: int = 1000
    max_minutes: float = 0.0  # end this slice earlier, saved; 0 = run to max_steps
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    input_frame_share: float = 0.4  # of samples that show the input frame instead of the target
    label_share: float = 0.5  # of target frames that go with the label instead of the description
    seed: int = 0


def contrastive_loss(similarity: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """CLIP's symmetric cross-entropy where every equal text counts as right; similarity (B, B) image by text."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    ids = torch.tensor([numbers[text] for text in texts], device=similarity.device)
    same = (ids[:, None] == ids[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(similarity, target) + cross_entropy(similarity.T, target)) / 2


def main(config: TrainClipConfig) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    train = read_split(config.data, "train")
    frames = load_frames(train)
    labels, descriptions = train["action"][:], train["description"][:]
    tokenizer = build_clip_tokenizer([*labels, *descriptions])
    torch.manual_seed(config.seed)
    clip = build_clip(tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), config.learning_rate, weight_decay=0.05)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    clip, optimizer = accelerator.prepare(clip, optimizer)
    accelerator.register_for_checkpointing(schedule)
    processor = build_image_processor()
    mean = torch.tensor(processor.image_mean, device=accelerator.device)[:, None, None]
    std = torch.tensor(processor.image_std, device=accelerator.device)[:, None, None]

    def pixels(indices: list[int], moments: list[int]) -> torch.Tensor:
        pictures = torch.stack([frames[i, k] for i, k in zip(indices, moments, strict=True)])
        return (pictures.to(accelerator.device).float() / 255 - mean) / std

    def similarity(indices: list[int], moments: list[int], texts: list[str]) -> torch.Tensor:
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return clip(input_ids=ids.to(accelerator.device), pixel_values=pixels(indices, moments)).logits_per_image

    steps = ResumableSteps(
        accelerator,
        config.output_dir,
        order=SampleOrder([len(frames)], seed=config.seed),
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        settings=resume_settings(config),
        max_minutes=config.max_minutes,
        seed=config.seed,
        name="CLIP",
    )
    for _, indices in steps:
        draws = torch.rand(len(indices), 2)
        moments = (draws[:, 0] >= config.input_frame_share).long().tolist()
        texts = [
            labels[i] if moment == 1 and draw < config.label_share else descriptions[i]
            for i, moment, draw in zip(indices, moments, draws[:, 1].tolist(), strict=True)
        ]
        loss = contrastive_loss(similarity(indices, moments, texts), texts)
        steps.update(loss, clip.parameters(), optimizer, schedule)
        steps.log(loss=loss.detach())
    if accelerator.is_main_process:
        clip = accelerator.unwrap_model(clip).eval()
        for part, tower in (("text_encoder", CLIPTextModel), ("vision_tower", CLIPVisionModel)):
            trained = clip.text_model if part == "text_encoder" else clip.vision_model
            copy = tower(trained.config)
            copy.load_state_dict(trained.state_dict())
            copy.save_pretrained(config.output_dir / part)
        save_clip_tokenizer(tokenizer, config.output_dir / "tokenizer")
        held_out = read_split(config.data, "val")
        held_out = held_out.select(range(min(len(held_out), 300)))
        frames = load_frames(held_out)
        asked = held_out["action"][:]
        names = sorted(set(labels) & set(asked))
        known = [i for i, action in enumerate(asked) if action in names]
        report: dict[str, int | bool | float] = {"step": steps.step, "finished": steps.finished}
        if known:
            with torch.no_grad():
                scores = similarity(known, [1] * len(known), names)
            right = [names[k] == asked[i] for i, k in zip(known, scores.argmax(1).tolist(), strict=True)]
            report["target_frame_names_its_action"] = sum(right) / len(right)
        (config.output_dir / "report.json").write_text(json.dumps(report, indent=1))
        print(json.dumps(report))


if __name__ == "__main__":
    run(main, TrainClipConfig, __doc__)
