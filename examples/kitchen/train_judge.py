"""Train the judge of the kitchen: a small network that reads (before, after) and says which action was carried out.

    python -m examples.kitchen.other_action --out runs/judge_data
    python -m examples.kitchen.train_judge --data runs/kitchen/data/train runs/judge_data \
        --validation-data runs/kitchen/data/val --output-dir runs/judge

It learns from rendered pairs of training kitchens alone; `other_action` renders what `render --split train` lacks: the
held-out combinations, and second actions in a scene. A share of the samples is copied frames, to be read as "nothing".
In another share the frame before comes from another pair at the same station, so that the answer is looked for in the
frame after. Frames after are blurred and made noisy at random: the judge must read soft pictures too.
Running the same command again goes on where the last one stopped. `output_dir/judge.safetensors` is usable after every
slice; copied to `lego_pipeline/evaluation/` it is the one that `load_judge()` loads. About 25 minutes on one core.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from diffusers.optimization import get_scheduler
from torch import nn

from examples.kitchen.actions import ACTIONS, HELD_OUT_ACTIONS, TRAIN_ACTIONS
from examples.kitchen.frames import load_frames, to_unit
from lego_pipeline.config import run
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.evaluation.judge import BOXES, HANDS, NOTHING, Judge, box_corners, box_overlap, save_judge
from lego_pipeline.training import ResumableSteps, SampleOrder, resume_settings

PLACES = ("left", "middle", "right", "knob 1", "knob 2", "knob 3", "knob 4")
# Actions whose frame after says it all; the others are told apart by the frame before (open or close).
READ_FROM_AFTER = ("take", "put", "pour", "stir", "wash", "wipe", "cut")
OWN_VIEW = ("drawer", "cupboard", "fridge")  # nouns that are looked at from elsewhere than the counter
SHIFT, RELATIVE_SHIFT = 6, 1  # pixels


@dataclass(kw_only=True)
class TrainJudgeConfig:
    data: tuple[Path, ...]  # manifests of rendered pairs in training kitchens
    validation_data: Path  # manifest of the val split
    output_dir: Path = Path("runs/judge")
    batch_size: int = 64  # pairs
    max_steps: int = 3000
    max_minutes: float = 0.0  # end this slice earlier, saved; 0 = run to max_steps
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    copied: float = 0.12  # share of samples whose frame after is the frame before
    other_before: float = 0.15  # share whose frame before is another pair's
    max_pairs: int = 25_000  # that are held in memory, 100 kB each
    seed: int = 0

    def __post_init__(self):
        if not (self.copied >= 0 and self.other_before >= 0 and self.copied + self.other_before <= 1):
            raise ValueError(
                "`copied` and `other_before` must be shares that sum to at most 1, got "
                f"{self.copied} and {self.other_before}."
            )


def build_judge() -> Judge:
    """An untrained judge of all actions of the kitchen's data sets."""
    names = (*TRAIN_ACTIONS, *HELD_OUT_ACTIONS)
    return Judge([(ACTIONS[name].verb, ACTIONS[name].noun) for name in names], PLACES)


class JudgePairs:
    """Rendered pairs as tensors in memory, with what the judge shall read from them.

    Args:
        rows: N manifest rows of the kitchen.
        judge: names the answers.
    """

    def __init__(self, rows: Dataset, judge: Judge):
        self.frames = load_frames(rows)  # (N, 2, 3, S, S) uint8
        columns = rows.select_columns(["action", "verb", "noun", "slots", "boxes_0", "boxes_1"])[:]
        slots = [json.loads(text) for text in columns["slots"]]
        answers = {
            "action": [judge.actions.index(name) for name in columns["action"]],
            "verb": [judge.verbs.index(name) for name in columns["verb"]],
            "noun": [judge.nouns.index(name) for name in columns["noun"]],
            "place": [judge.places.index(slot["place"]) for slot in slots],
        }
        self.answers = {name: torch.tensor(values) for name, values in answers.items()}
        both = [[box_corners(pair) for pair in columns[f"boxes_{k}"]] for k in (0, 1)]
        self.boxes = torch.stack([torch.stack(pairs) for pairs in both], 1)  # (N, 2, 3, 4), NaN where there is none
        self.swappable = torch.tensor([verb in READ_FROM_AFTER for verb in columns["verb"]])
        stations = [
            "" if noun in OWN_VIEW else slot["station"] for noun, slot in zip(columns["noun"], slots, strict=True)
        ]
        self.neighbours = {
            name: torch.tensor([i for i, other in enumerate(stations) if other == name]) for name in set(stations)
        }
        self.stations = stations

    def batch(
        self, indices: list[int], judge: Judge, copied: float = 0.0, other_before: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Frames before and after (B, 3, S, S) in [-1, 1] and the answers, among them `boxes` (B, 3, 4).

        Args:
            indices: of the B pairs.
            copied, other_before: shares of the samples, drawn by torch's global generator.
        """
        draws = torch.rand(len(indices))
        frames, boxes = self.frames[indices], self.boxes[indices, 1].clone()
        answers = {name: values[indices].clone() for name, values in self.answers.items()}
        for i in torch.nonzero(draws < copied)[:, 0].tolist():
            frames[i, 1] = frames[i, 0]
            boxes[i] = self.boxes[indices[i], 0]
            boxes[i, BOXES.index("object")] = torch.nan  # nothing is acted on
            for name, names in (("action", judge.actions), ("verb", judge.verbs), ("noun", judge.nouns)):
                answers[name][i] = names.index(NOTHING)
            answers["place"][i] = -100
        for i in torch.nonzero((draws >= copied) & (draws < copied + other_before))[:, 0].tolist():
            if self.swappable[indices[i]]:
                neighbours = self.neighbours[self.stations[indices[i]]]
                frames[i, 0] = self.frames[neighbours[torch.randint(len(neighbours), ())], 0]
        return to_unit(frames[:, 0]), to_unit(frames[:, 1]), {**answers, "boxes": boxes}


def augment(before: torch.Tensor, after: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Shifts both frames, and changes colours of both and sharpness and noise of the second, at random.

    Args:
        before, after: (B, 3, S, S) in [-1, 1].
        boxes: (B, 3, 4).
    """
    count, size = len(before), before.shape[-1]
    margin = SHIFT + RELATIVE_SHIFT
    offsets = torch.randint(-SHIFT, SHIFT + 1, (count, 2))
    relative = torch.randint(-RELATIVE_SHIFT, RELATIVE_SHIFT + 1, (count, 2))
    padded = [nn.functional.pad(frames, (margin,) * 4, mode="replicate") for frames in (before, after)]

    def crop(frame: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        y, x = (margin + offset).tolist()
        return frame[:, y : y + size, x : x + size]

    before = torch.stack([crop(frame, offset) for frame, offset in zip(padded[0], offsets, strict=True)])
    after = torch.stack([crop(frame, offset) for frame, offset in zip(padded[1], offsets + relative, strict=True)])
    shift = (offsets + relative).flip(1).repeat(1, 2)[:, None] / size  # x, y, x, y
    boxes = (boxes - shift).clamp(0, 1)
    for factor, share in ((2, 0.35), (4, 0.15)):
        soft = nn.functional.interpolate(nn.functional.avg_pool2d(after, factor), (size, size), mode="bilinear")
        amount = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < share)
        after = torch.lerp(after, soft, amount)
    after = after + torch.randn_like(after) * 0.06 * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.4)
    gain, lift = 1 + 0.1 * torch.randn(count, 3, 1, 1), 0.05 * torch.randn(count, 3, 1, 1)
    own_gain = gain * (1 + 0.03 * torch.randn(count, 3, 1, 1))
    return before * gain + lift, after * own_gain + lift, boxes


def judge_loss(output: dict[str, torch.Tensor], answers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of the loss by name; their sum is what is minimised."""
    cross_entropy = nn.functional.cross_entropy
    truth = answers["boxes"]
    is_there = ~truth[..., 0].isnan()  # (B, 3)
    found, wanted = output["boxes"][is_there], truth[is_there]
    hands = is_there[:, : len(HANDS)].float()
    parts = {name: cross_entropy(output[name], answers[name]) * weight
             for name, weight in (("action", 1.0), ("verb", 0.3), ("noun", 0.3), ("place", 0.5))}  # fmt: skip
    # Of a copied frame no action is likelier than another, so none is guessed from the frame before.
    is_copied = answers["action"] == output["action"].shape[1] - 1
    guesses = -output["action"][:, :-1].log_softmax(1).mean(1)
    parts["guess"] = 0.3 * (guesses * is_copied).sum() / max(1, len(guesses))
    parts["hands"] = nn.functional.binary_cross_entropy_with_logits(output["hands"], hands)
    parts["boxes"] = 2 * (found - wanted).abs().sum(-1).mean() + (1 - box_overlap(found, wanted)).mean()
    return parts


@torch.no_grad()
def validate(judge: Judge, pairs: JudgePairs) -> dict[str, float]:
    """Shares of right answers on whole pairs, share of copied frames read as the pair's action, mean overlap."""
    judge.eval()
    right: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(pairs.frames), 100):
        indices = list(range(start, min(start + 100, len(pairs.frames))))
        before, after, answers = pairs.batch(indices, judge)
        output, copy = judge(before, after), judge(before, before)
        is_there = ~answers["boxes"][..., 0].isnan()
        seen = {name: output[name].argmax(1) == answers[name] for name in ("action", "verb", "noun", "place")}
        seen["hands"] = ((output["hands"] > 0) == is_there[:, : len(HANDS)]).all(1)
        seen["action_on_copies"] = copy["action"].argmax(1) == answers["action"]
        seen["best_action_on_copies"] = copy["action"][:, :-1].argmax(1) == answers["action"]
        iou = box_overlap(output["boxes"], answers["boxes"])
        seen["overlap_of_hands"] = iou[:, : len(HANDS)][is_there[:, : len(HANDS)]]
        seen["overlap_of_objects"] = iou[:, -1][is_there[:, -1]]
        for name, values in seen.items():
            right.setdefault(name, []).append(values.float())
    judge.train()
    return {name: round(torch.cat(values).mean().item(), 4) for name, values in right.items()}


def main(config: TrainJudgeConfig) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    rows = concatenate_datasets([
        read_manifest(folder, "train").select_columns(
            ["image_0", "image_1", "action", "verb", "noun", "slots", "boxes_0", "boxes_1"]
        )
        for folder in config.data
    ])  # fmt: skip
    rows = rows.select(range(min(len(rows), config.max_pairs)))
    torch.manual_seed(config.seed)
    judge = build_judge()
    pairs = JudgePairs(rows, judge)
    validation = JudgePairs(read_manifest(config.validation_data, "val"), judge)
    optimizer = torch.optim.AdamW(judge.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    network, optimizer = accelerator.prepare(judge, optimizer)
    accelerator.register_for_checkpointing(schedule)
    steps = ResumableSteps(
        accelerator,
        config.output_dir,
        order=SampleOrder([len(rows)], seed=config.seed),
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        settings=resume_settings(config),
        max_minutes=config.max_minutes,
        seed=config.seed,
        name="judge",
    )
    for _, indices in steps:
        before, after, answers = pairs.batch(indices, judge, config.copied, config.other_before)
        before, after, answers["boxes"] = augment(before, after, answers["boxes"])
        answers = {name: values.to(accelerator.device) for name, values in answers.items()}
        # In this layout a CPU is a quarter faster.
        frames = [picture.to(accelerator.device, memory_format=torch.channels_last) for picture in (before, after)]
        parts = judge_loss(network(*frames), answers)
        steps.update(torch.stack(list(parts.values())).sum(), judge.parameters(), optimizer, schedule)
        steps.log(**{name: loss.detach() for name, loss in parts.items()})
    if accelerator.is_main_process:
        judge = accelerator.unwrap_model(network).cpu()
        save_judge(judge, config.output_dir / "judge.safetensors")
        report = {"step": steps.step, "finished": steps.finished, "pairs": len(rows), **validate(judge, validation)}
        (config.output_dir / "report.json").write_text(json.dumps(report, indent=1))
        print(json.dumps(report))


if __name__ == "__main__":
    run(main, TrainJudgeConfig, __doc__)
