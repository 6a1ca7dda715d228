"""What a VLM's descriptions of held-out frames say that the question doesn't (hand, place, colour), and what is false.

    python -m examples.kitchen.descriptions --data runs/kitchen/data/test --untuned runs/kitchen/vlm_start

For each slot: the share of descriptions that name the true value, of the pairs whose true description names one; as a
baseline the most frequent value for that label among these same pairs (the best that can be said without looking); and
the share when the VLM sees the frame of another pair with the same label, with what chance would give then. A
statement is false if hand, place, colour or a thing contradicts the scene. `--untuned` is scored beside it: the VLM
before instruction tuning. Descriptions are kept in `output_dir`, so a run that was stopped goes on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText
from transformers.models.auto.processing_auto import AutoProcessor

from examples.kitchen.actions import HELD_OUT_ACTIONS
from examples.kitchen.claims import claims_of, false_claims
from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.cli.records import append_record, read_records
from lego_pipeline.config import run
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.evaluation.statistics import bootstrap_interval
from lego_pipeline.training import seed_of
from lego_pipeline.vlm import family_of
from lego_pipeline.vlm.base import ask

SLOTS = ("hand", "place", "colour")
Describe = Callable[[list[Image.Image], list[str], list[str]], list[str]]  # frames, labels, ids


@dataclass(kw_only=True)
class DescriptionsConfig:
    data: Path  # manifest of held-out pairs
    model: Path = KITCHEN  # LegoPipeline folder with a VLM
    untuned: Path | None = None  # folder of the VLM before tuning
    output_dir: Path = Path("docs/kitchen")
    split: str = "test"
    pairs: int = 400
    batch_size: int = 40
    device: str = "cpu"
    seed: int = 0


def other_frames(actions: Sequence[str], seed: int) -> list[int]:
    """For each pair the number of another pair with the same label, each used once; itself where there is no other."""
    result = list(range(len(actions)))
    for action in sorted(set(actions)):
        members = [i for i, other in enumerate(actions) if other == action]
        order = np.random.default_rng(seed_of("frames", seed, action)).permutation(members).tolist()
        for i, other in zip(order, order[1:] + order[:1], strict=True):
            result[i] = other
    return result


def slot_report(written: Sequence[str], truths: Sequence[str], actions: Sequence[str]) -> dict[str, dict | None]:
    """For each slot: right answers, the best answer without looking, and what an unrelated frame would give.

    Args:
        written: N descriptions.
        truths: N true ones.
        actions: N labels.

    Returns:
        For `hand`, `place`, `colour` and `open hand` (the hand of labels for which it isn't always the same):
        `share` with its interval, `most_frequent` and `chance`; None for a slot that no true description names.
    """
    report: dict[str, dict | None] = {}
    for name in (*SLOTS, "open hand"):
        slot = name.removeprefix("open ")
        values = [getattr(claims_of(text), slot) for text in truths]
        counts = {action: Counter() for action in actions}
        for action, value in zip(actions, values, strict=True):
            counts[action][value] += 1
        kept = [
            i
            for i, value in enumerate(values)
            if value is not None
            and (name == slot or max(counts[actions[i]].values()) < sum(counts[actions[i]].values()))
        ]
        if not kept:
            report[name] = None
            continue
        right = [getattr(claims_of(written[i]), slot) == values[i] for i in kept]
        best = {action: counter.most_common(1)[0][0] for action, counter in counts.items()}
        shares = [counts[actions[i]][values[i]] / counts[actions[i]].total() for i in kept]
        report[name] = {
            "share": asdict(bootstrap_interval(right)),
            "most_frequent": float(np.mean([best[actions[i]] == values[i] for i in kept])),
            "chance": float(np.mean(shares)),
        }
    return report


def report_of(written: Sequence[str], shuffled: Sequence[str], rows: Dataset) -> dict:
    """All that is said of one VLM: slots, false statements, and slots on other frames.

    Args:
        written: N descriptions of the pairs' own frames.
        shuffled: N descriptions of other frames with the same labels.
        rows: the N pairs.
    """
    truths, actions = rows["description"][:], rows["action"][:]
    slots = [json.loads(text) for text in rows["slots"][:]]
    wrong = [false_claims(*case) for case in zip(written, truths, slots, strict=True)]
    kinds = Counter(name for names in wrong for name in names)
    groups = {
        "all": range(len(rows)),
        "seen": [i for i, action in enumerate(actions) if action not in HELD_OUT_ACTIONS],
        "unseen": [i for i, action in enumerate(actions) if action in HELD_OUT_ACTIONS],
    }

    def chosen(values: Sequence[str], group: Sequence[int]) -> list[str]:
        return [values[i] for i in group]

    return {
        "slots": {
            name: slot_report(*(chosen(values, group) for values in (written, truths, actions)))
            for name, group in groups.items()
            if group
        },
        "slots_on_other_frames": slot_report(shuffled, truths, actions),
        "equal": asdict(bootstrap_interval([text == truth for text, truth in zip(written, truths, strict=True)])),
        "false_statement": {
            name: asdict(bootstrap_interval([bool(wrong[i]) for i in group]))
            for name, group in groups.items()
            if group
        },
        "false_by_kind": {name: kinds[name] / len(rows) for name in ("hand", "place", "colour", "things")},
    }


def describer(pipeline: LegoPipeline, vlm, processor, seed: int) -> Describe:
    """Function that describes frames with the pipeline's question and sampling settings, a generator per pair."""
    config = pipeline.config

    def describe(frames: list[Image.Image], labels: list[str], ids: list[str]) -> list[str]:
        return family_of(vlm).generate(
            vlm,
            processor,
            frames,
            [ask(config.question_template, label) for label in labels],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            generators=[torch.Generator().manual_seed(seed_of("description", seed, name)) for name in ids],
        )

    return describe


def describe_all(describe: Describe, rows: Dataset, frames: Sequence[int], path: Path, batch_size: int) -> list[str]:
    """Descriptions of all rows, taken from `path` (JSON lines by id) where they are there and added where not.

    Args:
        describe: of `describer`.
        rows: N pairs.
        frames: for each of them the number of the pair whose input frame is shown.
        path: of the descriptions; its folder is made.
        batch_size: pairs at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ids, actions = rows["id"][:], rows["action"][:]
    there = {name: record["description"] for name, record in read_records(path).items()}
    missing = [i for i, name in enumerate(ids) if name not in there]
    for start in tqdm(range(0, len(missing), batch_size), desc=path.stem, disable=not missing):
        batch = missing[start : start + batch_size]
        pictures = [rows[frames[i]]["image_0"] for i in batch]
        names = [ids[i] for i in batch]
        for name, text in zip(names, describe(pictures, [actions[i] for i in batch], names), strict=True):
            append_record(path, {"id": name, "description": text})
            there[name] = text
    return [there[name] for name in ids]


def markdown(reports: dict[str, dict]) -> str:
    """Table of the slots for each VLM."""
    lines = [
        "| VLM | slot | right (95 % interval) | pairs | most frequent for the label | on another frame | chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        for group, slots in report["slots"].items():
            for slot, values in slots.items():
                if values is None:
                    continue
                share = values["share"]
                other = (report["slots_on_other_frames"][slot] or {}) if group == "all" else {}
                cells = (
                    [f"{100 * other['share']['mean']:.0f} %", f"{100 * other['chance']:.0f} %"] if other else ["", ""]
                )
                lines.append(
                    f"| {name} | {slot}, {group} | {100 * share['mean']:.0f} % ({100 * share['low']:.0f} to "
                    f"{100 * share['high']:.0f}) | {share['count']} | {100 * values['most_frequent']:.0f} % | "
                    f"{cells[0]} | {cells[1]} |"
                )
        false, kinds = report["false_statement"]["all"], report["false_by_kind"]
        by_kind = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in kinds.items())
        lines.append(
            f"| {name} | false statement | {100 * false['mean']:.0f} % ({100 * false['low']:.0f} to "
            f"{100 * false['high']:.0f}) | {false['count']} | {by_kind} | | |"
        )
    return "\n".join(lines) + "\n"


def main(config: DescriptionsConfig) -> None:
    rows = read_manifest(config.data, config.split)
    if len(rows) < config.pairs:
        raise ValueError(f"`data` must hold {config.pairs} pairs of split {config.split}, got {len(rows)}.")
    rows = rows.select(range(config.pairs))
    pipeline = LegoPipeline.from_pretrained(config.model)
    if pipeline.vlm is None:
        raise ValueError(f"`model` must be a pipeline with a VLM, got {config.model} without; name another folder.")
    vlms = {"tuned": (config.model / "vlm", pipeline.vlm, pipeline.vlm_processor)}
    if config.untuned is not None:
        vlm = AutoModelForImageTextToText.from_pretrained(config.untuned)
        vlms["untuned"] = (config.untuned, vlm, AutoProcessor.from_pretrained(config.untuned))
    own, other = range(len(rows)), other_frames(rows["action"][:], config.seed)
    reports = {}
    for name, (folder, vlm, processor) in vlms.items():
        describe = describer(pipeline, vlm.to(config.device).eval(), processor, config.seed)
        kept = config.output_dir / "descriptions" / f"{name}-{weights_key(folder, config)}"
        written, shuffled = (
            describe_all(describe, rows, frames, kept.with_name(f"{kept.name}-{kind}.jsonl"), config.batch_size)
            for kind, frames in (("own", own), ("other", other))
        )
        reports[name] = report_of(written, shuffled, rows)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    results = {"pairs": len(rows), "split": config.split, "seed": config.seed, "vlms": reports}
    (config.output_dir / "descriptions.json").write_text(json.dumps(results, indent=1) + "\n")
    (config.output_dir / "descriptions.md").write_text(markdown(reports))
    print(markdown(reports), end="")


def weights_key(folder: Path, config: DescriptionsConfig) -> str:
    """Short key of the weights in a folder, the data and the seed, by which kept descriptions are found."""
    digest = hashlib.sha256(f"{config.data.resolve()} {config.split} {config.pairs} {config.seed}".encode())
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:10]


if __name__ == "__main__":
    run(main, DescriptionsConfig, __doc__)
