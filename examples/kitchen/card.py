"""Write the model card of the kitchen checkpoint from what the run left behind: losses, samples and PSNR are read.

    python -m examples.kitchen.card --run-dir runs/kitchen --results docs/kitchen/results.json

Puts README.md into the checkpoint and the loss curves, drawn from the scripts' logs, into `docs/kitchen/`.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.config import parse_config

STAGES = {
    "vae": "autoencoder (decoder)",
    "clip": "CLIP",
    "vlm": "VLM (instruction tuning)",
    "ldm": "UNet and projector",
}


@dataclass(kw_only=True)
class CardConfig:
    run_dir: Path = Path("runs/kitchen")
    model: Path = KITCHEN
    results: Path = Path("docs/kitchen/results.json")
    pictures: Path = Path("docs/kitchen")


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; of steps that were repeated after a kill, the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])


def draw_curves(curves: dict[str, list[tuple[float, float]]], size: tuple[int, int] = (460, 260)) -> Image.Image:
    """Curves of (samples, loss), each in a panel of its own with its smallest and largest value written beside it."""
    width, height = size
    sheet = Image.new("RGB", (width * 2, height * max(1, -(-len(curves) // 2))), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for number, (name, points) in enumerate(curves.items()):
        left, top = number % 2 * width + 60, number // 2 * height + 36
        right, bottom = left + width - 90, top + height - 80
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high, far = min(ys), max(ys), max(xs)
        draw.text((left, top - 26), name, "black", font)
        draw.rectangle((left, top, right, bottom), outline="#bbbbbb")
        places = [
            (left + (right - left) * x / far, bottom - (bottom - top) * (y - low) / max(high - low, 1e-9))
            for x, y in points
        ]
        draw.line(places, "#1f5fa8", 2)
        draw.text((left - 55, top - 6), f"{high:.3g}", "#555555", font)
        draw.text((left - 55, bottom - 10), f"{low:.3g}", "#555555", font)
        draw.text((right - 110, bottom + 6), f"{far:,.0f} samples", "#555555", font)
    return sheet


def results_table(results: dict) -> str:
    """Markdown table of PSNR with intervals."""
    regions = list(next(iter(results["psnr_db"].values())))
    lines = [
        f"| PSNR in dB, {results['pairs']} held-out pairs | {' | '.join(regions)} |",
        "|---|" + "---|" * len(regions),
    ]
    for name, values in results["psnr_db"].items():
        cells = [f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})" for value in values.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stage_table(run: Path) -> str:
    """Markdown table of what each stage has seen, from its log and report."""
    lines = ["| stage | steps | samples seen | loss at the end | report |", "|---|---|---|---|---|"]
    for folder, name in STAGES.items():
        log = read_log(run / folder / "log.jsonl")
        report = json.loads((run / folder / "report.json").read_text())
        step = report.pop("step")
        report.pop("finished")
        facts = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in report.items())
        seen, loss = (f"{log[-1]['samples']:,}", f"{log[-1]['loss']:.4f}") if log else ("", "")
        lines.append(f"| {name} | {step:,} | {seen} | {loss} | {facts} |")
    return "\n".join(lines)


def main(config: CardConfig) -> None:
    run, results = config.run_dir, json.loads(config.results.read_text())
    pipeline = LegoPipeline.from_pretrained(config.model)
    modules = {name: part for name, part in pipeline.components.items() if hasattr(part, "parameters")}
    sizes = {name: sum(weight.numel() for weight in part.parameters()) / 1e6 for name, part in modules.items()}
    curves = {
        name: [(line["samples"], line["loss"]) for line in read_log(run / folder / "log.jsonl")]
        for folder, name in STAGES.items()
    }
    config.pictures.mkdir(parents=True, exist_ok=True)
    draw_curves({name: points for name, points in curves.items() if points}).quantize(16).save(
        config.pictures / "loss_curves.png", optimize=True
    )
    for folder in STAGES:
        for name in ("log.jsonl", "validation.jsonl"):
            if (run / folder / name).exists():
                shutil.copyfile(run / folder / name, config.pictures / f"{folder}_{name}")
    settings = (run / "ldm" / "config.yaml").read_text()
    kept = [line for line in settings.splitlines() if not line.startswith(("data", "pipeline", "cache", "output_dir"))]
    card = CARD.format(
        parameters=", ".join(f"{name} {count:.1f} M" for name, count in sizes.items()),
        total=sum(sizes.values()),
        steps=pipeline.config.num_inference_steps,
        guidance_scale=pipeline.config.guidance_scale,
        image_guidance_scale=pipeline.config.image_guidance_scale,
        stages=stage_table(run),
        results=results_table(results),
        nearer=100 * results["nearer_to_the_target_than_the_input_inside_boxes"],
        settings="\n".join(kept),
        **{name: 100 * results["descriptions"][name] for name in ("equal", "hand", "colour")},
    )
    (config.model / "README.md").write_text(card)


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
tags: [lego, egocentric, instruct-pix2pix, llava]
---

# LEGO, embedded kitchen

**This checkpoint knows a rendered kitchen and nothing else.** It has never seen a photograph; a frame far from the
kitchen draws a warning, and its result there means nothing. It serves the demo, the tests and as the proof that the
training scripts work. The world and the recipe are in `examples/kitchen/`; hand meshes: WebXR generic-hand, MIT.

```python
from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import KITCHEN

pipeline = LegoPipeline.from_pretrained(KITCHEN)
```

A complete LegoPipeline of {total:.1f} M parameters ({parameters}): frames of 128 px, an autoencoder of factor 16 with
48 latent channels, a UNet that predicts the clean latent, a CLIP text tower with a vocabulary of its own and a LLaVA,
all made from rendered frames alone. Defaults: {steps} steps, guidance scale {guidance_scale}, image guidance scale
{image_guidance_scale}.

## Trained by

`make kitchen` (`python -m examples.kitchen.train`), seed 0 in every stage, on rendered pairs only.

{stages}

Loss curves: `docs/kitchen/loss_curves.png`; the logs they are drawn from: `docs/kitchen/*_log.jsonl`. Trained in about
two hours on two shared CPU cores, stages side by side. This run differs from a fresh `make kitchen` in three things:
the lengths of the cosine schedules of autoencoder (3000, 4600, 4300 steps) and UNet (4800, 3300, 2550, 2350) were
changed while they ran, to fit the time; the first 307 steps of the UNet saw targets with noise from the untrained
log-variance of the encoder, since zeroed; and the UNet had latents of 9000 pairs, the CLIP 9000, the autoencoder 4000.

Settings of the UNet's training:

```yaml
{settings}
```

## Results

Held-out pairs in kitchens that training never saw; six of the thirty verb-noun combinations occur only there.
Reproduce with `python -m examples.kitchen.evaluate` (its docstring has the whole command).

{results}

On {nearer:.0f} % of the pairs the generated frame is nearer to the target than the input is, inside the boxes. The
VLM's description is the true one to the word on {equal:.0f} %; it names the right hand on {hand:.0f} % and, of those
that have a colour, the right one on {colour:.0f} %.
`docs/kitchen/contact_sheet.jpg` shows 24 cases drawn by seed, the unlucky ones too.

## Limits

128 px; soft fingers and small tools; objects that leave or enter may be smeared; the description is written by a
4 M-parameter model and can be wrong about the hand or the place.
"""


if __name__ == "__main__":
    main(parse_config(CardConfig, __doc__))
