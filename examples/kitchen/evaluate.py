"""How good a kitchen checkpoint is on held-out pairs: a contact sheet to look at and PSNR to compare.

    python -m examples.kitchen.render --pairs 124 --size 128 --split test --out runs/test --workers 2
    python -m examples.kitchen.evaluate --data runs/test --output-dir docs/kitchen

The first 100 pairs of the test split (kitchens that training never saw, and verb-noun combinations of which it saw
only the parts) are scored inside the boxes of hands and active objects and over the whole frame: input copied (floor),
target through the autoencoder (ceiling), and what the pipeline generates. The sheet shows 24 of them, drawn by seed.
Every sample has a generator of its own, so its picture doesn't depend on the batch.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from examples.kitchen.claims import claims_of
from examples.kitchen.frames import load_frames, load_masks, psnr, to_unit
from lego_pipeline import LegoPipeline, images
from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.config import parse_config
from lego_pipeline.contact_sheet import Card, draw_contact_sheet
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.evaluation.statistics import bootstrap_interval


@dataclass(kw_only=True)
class EvaluateConfig:
    data: Path  # manifest of held-out pairs
    model: Path = KITCHEN  # LegoPipeline folder
    output_dir: Path = Path("docs/kitchen")
    split: str = "test"
    pairs: int = 100
    sheet: int = 24  # cases on the contact sheet, 0 for none
    batch_size: int = 20
    steps: int | None = None  # default: the checkpoint's
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    device: str | None = None  # default: cuda if there is one, else cpu
    seed: int = 0


@torch.no_grad()
def generate(pipeline: LegoPipeline, rows: Dataset, config: EvaluateConfig) -> tuple[torch.Tensor, list[str]]:
    """(N, 3, H, W) float generated frames in [-1, 1], and the N descriptions."""
    pictures: list[torch.Tensor] = []
    descriptions: list[str] = []
    for start in tqdm(range(0, len(rows), config.batch_size), desc="generate"):
        batch = [rows[i] for i in range(start, min(start + config.batch_size, len(rows)))]
        result = pipeline(
            [row["image_0"] for row in batch],
            action=[row["action"] for row in batch],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance_scale,
            image_guidance_scale=config.image_guidance_scale,
            generator=[torch.Generator().manual_seed(config.seed + start + i) for i in range(len(batch))],
            output_type="pt",
        )
        pictures.append(torch.as_tensor(result.images).cpu() * 2 - 1)
        descriptions += result.descriptions or []
    return torch.cat(pictures), descriptions


def description_report(descriptions: list[str], rows: Dataset) -> dict[str, float | int]:
    """Share of descriptions that equal the true one, name its hand, and name its colour where it has one."""
    pairs = list(zip(descriptions, rows["description"][:], strict=True))
    claims = [(claims_of(written), claims_of(truth)) for written, truth in pairs]
    coloured = [said.colour == true.colour for said, true in claims if true.colour]
    return {
        "equal": round(sum(written == truth for written, truth in pairs) / len(pairs), 3),
        "hand": round(sum(said.hand == true.hand for said, true in claims) / len(pairs), 3),
        "colour": round(sum(coloured) / max(1, len(coloured)), 3),
        "with_colour": len(coloured),
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Values to a thousandth, as they are written."""
    return {name: round(value, 3) for name, value in values.items()}


def main(config: EvaluateConfig) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    rows = read_manifest(config.data, config.split)
    if len(rows) < config.pairs:
        raise SystemExit(f"error: `--data` must hold {config.pairs} pairs of split {config.split}, got {len(rows)}.")
    rows = rows.select(range(config.pairs))
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = LegoPipeline.from_pretrained(config.model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    frames, masks = load_frames(rows), load_masks(rows, *rows[0]["image_0"].size[::-1])
    before, target, inside = to_unit(frames[:, 0]), to_unit(frames[:, 1]), masks.any(1)
    with torch.no_grad():
        batches = target.split(config.batch_size)
        round_trip = torch.cat([pipeline.vae(batch.to(device)).sample.cpu() for batch in batches])
    generated, descriptions = generate(pipeline, rows, config)
    systems = {"input copied": before, "target through the autoencoder": round_trip, "LEGO": generated}
    outside = ~inside
    regions = {"inside boxes": inside, "outside boxes": outside, "whole frame": torch.ones_like(inside)}
    table = {
        name: {
            region: rounded(asdict(bootstrap_interval(psnr(pictures, target, mask).tolist())))
            for region, mask in regions.items()
        }
        for name, pictures in systems.items()
    }
    better = psnr(generated, target, inside) > psnr(before, target, inside)
    results = {
        "pairs": len(rows),
        "split": config.split,
        "settings": {
            name: getattr(config, name) for name in ("steps", "guidance_scale", "image_guidance_scale", "seed")
        },
        "psnr_db": table,
        "descriptions": description_report(descriptions, rows),
        "nearer_to_the_target_than_the_input_inside_boxes": round(better.float().mean().item(), 3),
    }
    (config.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print("| PSNR in dB (95 % interval) |", " | ".join(regions), "|")
    print("|---|" + "---|" * len(regions))
    for name, values in table.items():
        print(
            f"| {name} |", " | ".join("{mean:.2f} ({low:.2f} to {high:.2f})".format(**v) for v in values.values()), "|"
        )
    print("descriptions:", json.dumps(results["descriptions"]))
    if config.sheet:
        chosen = sorted(random.Random(config.seed).sample(range(len(rows)), min(config.sheet, len(rows))))
        shown = [images.to_pil((picture / 2 + 0.5).clamp(0, 1)) for picture in generated[chosen]]
        cards = [
            Card(
                title=rows[i]["action"],
                frames=[("input", rows[i]["image_0"]), ("generated", picture), ("truth", rows[i]["image_1"])],
                text=descriptions[i],
            )
            for i, picture in zip(chosen, shown, strict=True)
        ]
        title = f"{len(cards)} held-out cases, drawn by seed {config.seed}"
        sheet = draw_contact_sheet(cards, title=title, columns=4, frame_size=128)
        sheet.save(config.output_dir / "contact_sheet.jpg", quality=90)


if __name__ == "__main__":
    main(parse_config(EvaluateConfig, __doc__))
