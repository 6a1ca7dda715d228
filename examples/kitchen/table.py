"""The kitchen's table: what each part of LEGO brings on held-out pairs, with intervals and paired tests.

    python -m examples.kitchen.table --data runs/kitchen/data/test --validation-data runs/kitchen/data/val \
        --systems "label only=runs/label/best:label" "LEGO=runs/kitchen/ldm/best"

Rows: the true frame (what the judge can reach); the true frame through the autoencoder (what the decoder can reach);
the input copied (floor); the true frame of another action in the same scene, where there is one; and the systems
(`systems.py` has their syntax). Guidance scales are chosen on other pairs, for every system from the same grid by the
same score: share of frames of which the judge names the asked action, plus a tenth of the PSNR in dB inside the boxes.
Regions: inside the boxes of hands and things in either frame, outside, whole. Intervals are 95 % bootstrap intervals
over pairs; the paired tests compare each row with `--compare-to` on the same pairs. A pair draws the same noise in
every system. Generated frames are kept in `--frames-dir`; a run that was stopped goes on.

`--hand-detector` adds what a detector says that was trained on real hands (`hand_detector.py` fetches it): the share
of frames with a hand, its mean score, and of the pairs in whose true frame it finds one, the share with one there.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from examples.kitchen.actions import HELD_OUT_ACTIONS
from examples.kitchen.frames import load_frames, load_masks, psnr, to_unit
from examples.kitchen.hand_calibration import calibration_text
from examples.kitchen.systems import Generator, Scales, frames_folder, parse_system
from lego_pipeline import images
from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.cli.records import read_png_record, write_png
from lego_pipeline.config import run
from lego_pipeline.contact_sheet import Card, draw_contact_sheet
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.evaluation.hands import DETECTED, FOUND, HandDetector, detector_measures
from lego_pipeline.evaluation.judge import HANDS, Judge, box_corners, box_overlap, load_judge
from lego_pipeline.evaluation.results import difference_of, interval_of
from lego_pipeline.evaluation.statistics import bootstrap_interval

TRUTH, ROUND_TRIP, COPIED, OTHER = (
    "true frame",
    "true frame through the autoencoder",
    "input copied",
    "true frame of another action",
)
WHICH_OF_TWO = ("drawer", "cupboard", "hob")  # nouns of which there are several, and the words say which
JUDGED = {
    "action": "action",
    "verb": "verb",
    "noun": "noun",
    "hand_seen": "a hand is seen",
    "hand_side": "hand side",
    "which": "which of two",
    "overlap_hands": "overlap of hands",
    "overlap_object": "overlap of things",
}
MEASURED = {
    f"{metric}_{region}": f"{metric.upper()} {region}"
    for metric in ("psnr", "ssim")
    for region in ("inside", "outside", "whole")
}
Values = dict[str, np.ndarray]  # by measure: (N,) float, NaN where a pair doesn't have it


@dataclass(kw_only=True)
class TableConfig:
    data: Path  # manifest of held-out pairs
    validation_data: Path  # manifest of the val split, for the guidance scales
    systems: tuple[str, ...] = (f"LEGO={KITCHEN}",)  # NAME=FOLDER or NAME=FOLDER:PARTS each
    compare_to: str = ""  # name of the system that the others are compared with, default the last
    output_dir: Path = Path("docs/kitchen")
    frames_dir: Path = Path("runs/kitchen/table")  # generated frames, kept
    pairs: int = 400
    tuning_pairs: int = 100
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    image_guidance_scales: tuple[float, ...] = (1.0, 1.5)
    hand_detector: Path | None = None  # folder that examples.kitchen.hand_detector wrote; without, it isn't asked
    steps: int | None = None  # of every system, default each checkpoint's own
    sheet: int = 16  # cases of the contact sheet, drawn by seed
    unlucky: int = 8  # cases of the contact sheet that came out worst
    batch_size: int = 20
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self):
        if min(self.pairs, self.tuning_pairs, self.batch_size) < 1:
            raise ValueError("`pairs`, `tuning_pairs` and `batch_size` must be at least 1.")
        if not self.systems or not self.guidance_scales or not self.image_guidance_scales:
            raise ValueError("`systems`, `guidance_scales` and `image_guidance_scales` must each have an entry.")


class Pairs:
    """Held-out pairs as tensors, with what the frames must show.

    Args:
        rows: N manifest rows of the kitchen.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows
        frames = to_unit(load_frames(rows))
        self.before, self.target = frames[:, 0], frames[:, 1]  # (N, 3, H, W) in [-1, 1]
        inside = load_masks(rows, *frames.shape[-2:]).any(1)
        self.regions = {"inside": inside, "outside": ~inside, "whole": torch.ones_like(inside)}
        self.boxes = torch.stack([box_corners(boxes) for boxes in rows["boxes_1"][:]])  # (N, 3, 4)
        self.actions, self.verbs, self.nouns = rows["action"][:], rows["verb"][:], rows["noun"][:]
        self.places = [json.loads(slots)["place"] for slots in rows["slots"][:]]
        unseen = np.array([action in HELD_OUT_ACTIONS for action in self.actions])
        self.groups = {"all": np.ones(len(rows), bool), "seen combinations": ~unseen, "unseen combinations": unseen}


def measure(judge: Judge, pairs: Pairs, pictures: torch.Tensor, batch_size: int = 50) -> Values:
    """All measures of one row of the table.

    Args:
        judge: reads (before, picture).
        pairs: N pairs.
        pictures: (N, 3, H, W) float in [-1, 1].
        batch_size: pairs at a time.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    values: dict[str, list[float]] = {name: [] for name in (*JUDGED, *MEASURED)}
    for start in range(0, len(pictures), batch_size):
        part = slice(start, min(start + batch_size, len(pictures)))
        for i, reading in zip(
            range(*part.indices(len(pictures))), judge.read(pairs.before[part], pictures[part]), strict=True
        ):
            hands = [side for k, side in enumerate(HANDS) if not pairs.boxes[i, k].isnan().any()]
            found = {name: torch.tensor(box) for name, box in reading.boxes.items()}
            overlaps = [
                float(box_overlap(found[f"hand_{side}"], pairs.boxes[i, HANDS.index(side)]))
                if side in reading.hands
                else 0.0
                for side in hands
            ]
            judged = {
                "action": reading.action == pairs.actions[i],
                "verb": reading.verb == pairs.verbs[i],
                "noun": reading.noun == pairs.nouns[i],
                "hand_seen": bool(reading.hands) if hands else np.nan,
                "hand_side": list(reading.hands) == hands if hands else np.nan,
                "which": reading.place == pairs.places[i] if pairs.nouns[i] in WHICH_OF_TWO else np.nan,
                "overlap_hands": np.mean(overlaps) if hands else np.nan,
                "overlap_object": float(box_overlap(found["object"], pairs.boxes[i, -1])),
            }
            for name, value in judged.items():
                values[name].append(float(value))
        clamped = pictures[part].clamp(-1, 1)
        similarity = structural_similarity_index_measure(
            clamped, pairs.target[part], data_range=2.0, reduction="none", return_full_image=True
        )[1].mean(1)  # (B, H, W)
        for region, masks in pairs.regions.items():
            mask = masks[part]
            values[f"psnr_{region}"] += psnr(clamped, pairs.target[part], mask).tolist()
            shares = (similarity * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)
            values[f"ssim_{region}"] += shares.tolist()
    return {name: np.array(column) for name, column in values.items()}


def tuning_score(values: Values) -> float:
    """What guidance scales are chosen by: share of asked actions named, plus 0.1 for each dB inside the boxes."""
    return float(values["action"].mean() + values["psnr_inside"].mean() / 10)


def tune(generator: Generator, judge: Judge, pairs: Pairs, config: TableConfig) -> tuple[Scales, list[dict]]:
    """The scales of the grid with the best score on the tuning pairs, and the score of each."""
    steps = config.steps or generator.default_scales().steps
    tried = []
    for text in config.guidance_scales:
        for image in config.image_guidance_scales:
            scales = Scales(text, image, steps)
            values = measure(judge, pairs, generator.frames(pairs.rows, scales))
            tried.append({**asdict(scales), "score": round(tuning_score(values), 4),
                          "action": round(float(values["action"].mean()), 3),
                          "psnr_inside": round(float(values["psnr_inside"].mean()), 2)})  # fmt: skip
    best = max(tried, key=lambda entry: entry["score"])
    return Scales(best["guidance_scale"], best["image_guidance_scale"], steps), tried


def other_actions(pairs: Pairs, folder: Path) -> tuple[torch.Tensor, list[str | None]]:
    """True frames of another action in each pair's scene, NaN where there is none, and these actions.

    The scene is rendered anew from the numbers in the row's id; frames are kept in `folder`.
    """
    from examples.kitchen.other_action import other_row

    size = pairs.before.shape[-1]
    frames = torch.full_like(pairs.target, torch.nan)
    names: list[str | None] = []
    for i, row_id in enumerate(tqdm(pairs.rows["id"][:], desc="other actions")):
        path = folder / f"{row_id}.png"
        record = read_png_record(path)
        if record is None:
            _, split, index = row_id.rsplit("-", 2)
            row = other_row(split, int(index), size)
            record = {"id": row_id, "action": row["action"] if row else None}
            write_png(path, row["image_1"] if row else Image.new("RGB", (1, 1)), record)
        name = record.get("action")
        if isinstance(name, str):
            frames[i] = to_unit(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1))
        names.append(name)
    return frames, names


def intervals(values: Values, group: np.ndarray) -> dict[str, dict | None]:
    """Interval of each measure over the pairs of a group that have it; None where none has."""
    found = {name: interval_of(column[group], None) for name, column in values.items()}
    return {name: None if interval is None else asdict(interval) for name, interval in found.items()}


def differences(first: Values, second: Values, group: np.ndarray) -> dict[str, dict | None]:
    """Mean difference of each measure over the pairs that both have, its interval and the paired test's p-value."""
    found = {name: difference_of(column[group], second[name][group], None) for name, column in first.items()}
    return {name: None if test is None else {**asdict(test[0]), "p": test[1]} for name, test in found.items()}


def asked(table: dict[str, dict], paired: dict[str, dict], name: str, label_only: str | None) -> dict[str, dict]:
    """What is asked of LEGO, each with its value and whether it is met; all pairs together."""

    def mean(row: str, measure: str) -> float:
        entry = table[row]["all"][measure]
        return entry["mean"] if entry else float("nan")

    floor, ceiling = mean(COPIED, "psnr_inside"), mean(ROUND_TRIP, "psnr_outside")
    checks = {
        "judge's top 1 as a share of that on true frames, at least 0.8": (
            mean(name, "action") / mean(TRUTH, "action"),
            0.8,
        ),
        "dB inside the boxes above the input copied, at least 4": (mean(name, "psnr_inside") - floor, 4.0),
        "dB outside the boxes above the autoencoder's less 3, at least 0": (
            mean(name, "psnr_outside") - ceiling + 3,
            0.0,
        ),
        "hand side right, at least 0.8": (mean(name, "hand_side"), 0.8),
        "which of two right, at least 0.8": (mean(name, "which"), 0.8),
    }
    result = {text: {"value": round(value, 3), "met": bool(value >= least)} for text, (value, least) in checks.items()}
    if label_only in paired:
        for measure in ("psnr_inside", "hand_side", "which"):
            entry = paired[label_only]["all"][measure]
            if entry is not None:  # the difference is the other row's less this one's
                text = f"{(JUDGED | MEASURED)[measure]} above {label_only}, the interval above 0"
                result[text] = {"value": round(-entry["mean"], 3), "met": entry["high"] < 0}
    return result


def markdown(results: dict) -> str:
    """The tables of results.json for reading."""
    lines = []
    for group in next(iter(results["rows"].values())):
        for title, columns in (("judge", JUDGED), ("pictures", MEASURED), ("real hand detector", DETECTED)):
            first = next(iter(results["rows"].values()))[group]
            counts = first["psnr_whole"]
            if counts is None or not columns.keys() <= first.keys():
                continue
            lines += [f"### {group}, {title}", "", f"{counts['count']} pairs; mean (95 % interval).", ""]
            lines += [f"| | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
            for name, row in results["rows"].items():
                lines.append(f"| {name} | {' | '.join(_cell(column, row[group][column]) for column in columns)} |")
            lines.append("")
    if results["hand_detector"] is None:
        lines += ["Real hand detector: not run.", ""]
    else:
        lines += [f"A hand is found where its probability is above {FOUND}. {results['hand_detector']}", ""]
    lines += [f"### Row less {results['compare_to']}, the same pairs", ""]
    columns = ("action", "hand_side", "which", "overlap_hands", "psnr_inside", "psnr_outside")
    lines += [f"| | {' | '.join((JUDGED | MEASURED)[name] for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, groups in results["paired"].items():
        for group, row in groups.items():
            cells = [_cell(column, row[column], signed=True) for column in columns]
            lines.append(f"| {name}, {group} | {' | '.join(cells)} |")
    lines += ["", "### Asked", "", "| | value | met |", "|---|---|---|"]
    lines += [
        f"| {text} | {entry['value']} | {'yes' if entry['met'] else 'no'} |"
        for text, entry in results["asked"].items()
    ]
    return "\n".join(lines) + "\n"


def _cell(column: str, entry: dict | None, signed: bool = False) -> str:
    """One cell: shares in per cent, PSNR in dB, SSIM and overlap as they are."""
    if entry is None:
        return ""
    is_share = column in JUDGED | DETECTED and not column.startswith("overlap") and column != "detector_score"
    scale, digits = (100, 0) if is_share else (1, 2)
    sign = "+" if signed else ""
    mean, low, high = (f"{scale * entry[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    end = f", p {entry['p']:.2g}" if signed else ""
    return f"{mean}{' %' if is_share else ''} ({low} to {high}{end})"


def draw_sheet(
    pairs: Pairs,
    pictures: dict[str, torch.Tensor],
    descriptions: Sequence[str],
    worst: Sequence[int],
    config: TableConfig,
) -> Image.Image:
    """Cases drawn by seed and the unlucky ones: input, systems, truth, and the description that LEGO went by."""
    count = len(pairs.actions)
    drawn = sorted(random.Random(config.seed).sample(range(count), min(config.sheet, count)))
    cards = []
    for numbers, note in ((drawn, ""), (worst, "unlucky: ")):
        for i in numbers:
            frames = {"input": pairs.before[i], **{name: frames[i] for name, frames in pictures.items()}}
            shown = {**frames, "truth": pairs.target[i]}
            cards.append(
                Card(
                    title=f"{note}{pairs.actions[i]}",
                    frames=[(name, images.to_pil((frame / 2 + 0.5).clamp(0, 1))) for name, frame in shown.items()],
                    text=descriptions[i],
                )
            )
    title = f"{len(drawn)} held-out cases drawn by seed {config.seed}, and the {len(worst)} worst of all"
    return draw_contact_sheet(cards, title=title, columns=4 if len(pictures) == 1 else 3, frame_size=128)


def read_pairs(folder: Path, split: str, count: int, name: str) -> Pairs:
    """The first pairs of a manifest.

    Raises:
        ValueError: it has fewer.
    """
    rows = read_manifest(folder, split)
    if len(rows) < count:
        raise ValueError(f"`{name}` must hold {count} pairs of split {split}, got {len(rows)}; render more.")
    return Pairs(rows.select(range(count)))


def main(config: TableConfig) -> None:
    systems = [parse_system(text) for text in config.systems]
    names = [system.name for system in systems]
    compare_to = config.compare_to or names[-1]
    if compare_to not in names or len(set(names)) < len(names):
        raise ValueError(
            f"`compare_to` must be one of the systems' names, each used once; got {compare_to!r} and {names}."
        )
    judge = load_judge()
    detector = HandDetector(config.hand_detector) if config.hand_detector else None
    pairs = read_pairs(config.data, "test", config.pairs, "data")
    tuning_pairs = read_pairs(config.validation_data, "val", config.tuning_pairs, "validation_data")

    pictures: dict[str, torch.Tensor] = {}
    settings: dict[str, dict] = {}
    descriptions: list[str] = []
    for system in systems:
        folder = frames_folder(config.frames_dir, system.name)
        generator = Generator(system, folder, device=config.device, batch_size=config.batch_size, seed=config.seed)
        scales, tried = tune(generator, judge, tuning_pairs, config)
        pictures[system.name] = generator.frames(pairs.rows, scales)
        settings[system.name] = {
            "parts": system.parts,
            "decoded": system.decoded,
            "weights": generator.key,
            **asdict(scales),
            "tried": tried,
        }
        if system.name == compare_to:
            descriptions = generator.descriptions(pairs.rows["id"][:], scales)
            vae = generator.load().vae
            with torch.no_grad():
                batches = [
                    vae(batch.to(config.device)).sample.cpu() for batch in pairs.target.split(config.batch_size)
                ]
    others, shown = other_actions(pairs, config.frames_dir / "other_action")
    has_other = np.array([action is not None for action in shown])

    frames = {
        TRUTH: pairs.target,
        ROUND_TRIP: torch.cat(batches),
        COPIED: pairs.before,
        OTHER: others.nan_to_num(),
        **pictures,
    }
    values = {name: measure(judge, pairs, row) for name, row in frames.items()}
    if detector is not None:
        answers = {name: detector.read(row, f"hand detector: {name}") for name, row in frames.items()}
        for name, row in values.items():
            row.update(detector_measures(answers[name], answers[TRUTH]))
    values[OTHER] = {name: np.where(has_other, column, np.nan) for name, column in values[OTHER].items()}
    numbers = np.nonzero(has_other)[0].tolist()
    readings = [judge.read(pairs.before[i : i + 1], others[i : i + 1])[0].action for i in numbers]
    said = [reading == shown[i] for i, reading in zip(numbers, readings, strict=True)]
    table = {
        name: {group: intervals(row, members) for group, members in pairs.groups.items()}
        for name, row in values.items()
    }
    paired = {
        name: {group: differences(row, values[compare_to], members) for group, members in pairs.groups.items()}
        for name, row in values.items()
        if name != compare_to
    }
    label_only = next((system.name for system in systems if system.parts == "label"), None)
    results = {
        "pairs": config.pairs,
        "tuning_pairs": config.tuning_pairs,
        "seed": config.seed,
        "compare_to": compare_to,
        "systems": settings,
        "hand_detector": calibration_text(config.hand_detector) if config.hand_detector else None,
        "judge_names_the_other_action": asdict(bootstrap_interval(said)) if said else None,
        "rows": table,
        "paired": paired,
        "asked": asked(table, paired, compare_to, label_only),
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "table.json").write_text(json.dumps(results, indent=1) + "\n")
    (config.output_dir / "table.md").write_text(markdown(results))
    print(markdown(results), end="")
    if config.sheet + config.unlucky:
        row = values[compare_to]
        worst = np.lexsort((row["psnr_inside"], row["action"]))[: config.unlucky].tolist()
        shown_systems = {name: pictures[name] for name in (label_only, compare_to) if name is not None}
        sheet = draw_sheet(pairs, shown_systems, descriptions, worst, config)
        sheet.save(config.output_dir / "contact_sheet.jpg", quality=88)


if __name__ == "__main__":
    run(main, TableConfig, __doc__)
