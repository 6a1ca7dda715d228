"""All tables and pictures of the kitchen checkpoint, and its model card; `make kitchen-report` runs it.

    python -m examples.kitchen.report --run-dir runs/kitchen

The test and validation pairs are rendered if they aren't there. Rows of `examples.kitchen.ablations` that are trained
to their end take part in the table; those that aren't are named. A real hand detector gives its opinion where
`examples.kitchen.hand_detector` has put it into the run directory as `hand_detector`. `lego evaluate` scores the
frames of LEGO and label only as it would anybody's, with the swap test, into `evaluation` of the output folder. The
card also reads the logs of the training there, and is written only where they are. What was generated before is kept,
so a command that was stopped goes on.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from examples.kitchen.ablations import SMALL, folder_of
from examples.kitchen.components import FRAME_SIZE
from examples.kitchen.systems import Scales, frames_folder
from examples.kitchen.train import Chain
from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.config import run
from lego_pipeline.data.manifest import read_manifest


@dataclass(kw_only=True)
class ReportConfig:
    run_dir: Path = Path("runs/kitchen")
    model: Path = KITCHEN
    output_dir: Path = Path("docs/kitchen")
    pairs: int = 400
    tuning_pairs: int = 100
    few_steps_pairs: int = 100


def systems_of(run_dir: Path, model: Path) -> tuple[list[str], list[str]]:
    """Rows of the table as `examples.kitchen.systems` reads them, and names of rows that aren't trained to the end."""
    rows = {"label only": "label"} | {name: parts for name, (_, parts) in SMALL.items()}
    systems, missing = [], []
    for name, parts in rows.items():
        folder = run_dir / folder_of(name)
        report = folder / "report.json"
        if report.exists() and json.loads(report.read_text())["finished"]:
            label = name if name == "label only" else f"{name}, small budget"
            systems.append(f"{label}={folder / 'last'}:{parts}")
        else:
            missing.append(name)
    return [
        *systems,
        f"LEGO with the true description={model}:truth+image+text",
        f"LEGO, all pixels decoded={model}:decoded",
        f"LEGO={model}",
    ], missing


def evaluate(chain: Chain, config: ReportConfig) -> None:
    """`lego evaluate` on the frames of the table; for the swap test LEGO also draws other verbs and nouns."""
    lego, test = ("-m", "lego_pipeline.cli"), chain.data / "test"
    work, pairs = chain.run / "evaluation", ("--pairs", str(config.pairs))
    systems = json.loads((config.output_dir / "table.json").read_text())["systems"]
    scales = {name: Scales(*(facts[field.name] for field in fields(Scales))) for name, facts in systems.items()}
    chosen = scales["LEGO"]
    rows = read_manifest(test).select(range(config.pairs))
    actions, verbs, nouns = (len(set(rows[name][:])) for name in ("action", "verb", "noun"))
    swapped: tuple[str | Path, ...] = ()
    if min(verbs, nouns) < actions:  # some share a verb or a noun
        chain.call(*lego, "swap", "--data", test, *pairs, "--output", work / "swapped_data")
        chain.call(
            *(*lego, "generate", "--model", config.model, "--data", work / "swapped_data"),
            *("--guidance-scale", str(chosen.guidance_scale)),
            *("--image-guidance-scale", str(chosen.image_guidance_scale)),
            *("--steps", str(chosen.steps), "--batch-size", "20", "--output", work / "swapped"),
        )
        swapped = ("--swapped", f"LEGO={work / 'swapped'}")
    compared = [name for name in ("LEGO", "label only") if name in scales]
    frames = [f"{name}={frames_folder(chain.run / 'table', name) / str(scales[name])}" for name in compared]
    train = ("--train-data", chain.data / "train") if (chain.data / "train").exists() else ()
    chain.call(
        *(*lego, "evaluate", *(word for entry in frames for word in ("--generated", entry)), "--data", test, *pairs),
        *(*swapped, *train),
        *("--output", config.output_dir / "evaluation", "--cache", work / "cache"),
    )


def main(config: ReportConfig) -> None:
    chain = Chain(config.run_dir)
    data, output = chain.data, ("--output-dir", config.output_dir)
    for split, pairs in (("val", config.tuning_pairs), ("test", max(config.pairs, config.few_steps_pairs))):
        chain.call(
            *("-m", "examples.kitchen.render", "--pairs", str(pairs), "--size", str(FRAME_SIZE)),
            *("--split", split, "--out", data / split, "--workers", "2"),
        )
    systems, missing = systems_of(config.run_dir, config.model)
    if missing:
        print(f"not trained to the end, and so not in the table: {', '.join(missing)}")
    detector = chain.run / "hand_detector"
    chain.call(
        *("-m", "examples.kitchen.table", "--data", data / "test", "--validation-data", data / "val", *output),
        *("--frames-dir", chain.run / "table", "--systems", *systems, "--compare-to", "LEGO"),
        *("--pairs", str(config.pairs), "--tuning-pairs", str(config.tuning_pairs)),
        *(("--hand-detector", detector) if detector.exists() else ()),
    )
    untuned = ("--untuned", chain.run / "vlm_start") if (chain.run / "vlm_start").exists() else ()
    chain.call(
        *("-m", "examples.kitchen.descriptions", "--data", data / "test", "--model", config.model, *untuned, *output),
        *("--pairs", str(config.pairs)),
    )
    chain.call(
        *("-m", "examples.kitchen.few_steps", "--data", data / "test", "--model", config.model, *output),
        *("--pairs", str(config.few_steps_pairs)),
    )
    evaluate(chain, config)
    if not (chain.run / "ldm" / "report.json").exists():
        print(f"the model card stays as it is: it needs the logs of the training, and {chain.run} has none")
        return
    chain.call(
        *("-m", "examples.kitchen.card", "--run-dir", chain.run, "--model", config.model),
        *("--results", config.output_dir),
    )


if __name__ == "__main__":
    run(main, ReportConfig, __doc__)
