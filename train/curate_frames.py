"""Curate pairs of frames from egocentric video: annotated actions in, a manifest and a report of every drop out.

    python train/curate_frames.py --format epic --annotations EPIC_100_train.csv EPIC_100_validation.csv \\
        --videos EPIC-KITCHENS --boxes hand-objects --encoder clip-vit-large-patch14 --output-dir runs/epic
    python train/curate_frames.py --format ego4d --annotations v2/annotations/fho_main.json --videos v2/full_scale ...
    python train/curate_frames.py --format table --annotations actions.csv --videos my_videos --licence "my own" ...

A table has the columns video, start, stop, action; `lego_pipeline/curation/table.py` lists the others. The input frame
lies shortly before the action, the target frame at its height; around each time the sharpest frame is taken. What is
blurred, black, frozen, repeated, without hands, or not alike enough (or too much) is dropped, and so is what
annotations and files make impossible. Results:

    OUTPUT_DIR/manifest/{train,val}/*.parquet    for --data of the other scripts
    OUTPUT_DIR/report.html                       counts by reason, which add up, with example pictures
    OUTPUT_DIR/outcomes.jsonl, summary.json      the fate of every action; the counts and settings

The command may be killed at any time and run again: it goes on where it stopped (each process loses 50 actions at
most). Videos that were missing, or have another size since, are looked at again until it has finished. Several
processes share the videos and give the same files, byte for byte; OUTPUT_DIR must be a folder that all of them see:

    accelerate launch --num_processes 16 train/curate_frames.py --expect-processes 16 ...        one machine
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 16 train/curate_frames.py ...              without a GPU

Decoding runs on one thread a process: start as many as there are cores.
"""

import hashlib
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from lego_pipeline.config import plain_values, run
from lego_pipeline.curation.actions import Action, Timing
from lego_pipeline.curation.boxes import open_boxes
from lego_pipeline.curation.frames import Rules, curate, find_videos
from lego_pipeline.curation.readers import read_actions
from lego_pipeline.curation.similarity import load_similarity
from lego_pipeline.curation.work import Work, cut_units, own_units
from lego_pipeline.data.shards import content_key
from lego_pipeline.training import check_number, check_processes, long_waits

logger = logging.getLogger("curate_frames")

FREE_SETTINGS = ("output_dir", "videos", "annotations", "boxes", "encoder", "expect_processes")


@dataclass(kw_only=True)
class CurateFramesConfig:
    annotations: tuple[Path, ...]  # files of one format
    videos: Path  # folder of the video files, searched with its subfolders
    output_dir: Path  # results, and until they are complete what is done of them
    format: Literal["ego4d", "epic", "table"] = "table"  # fho_main.json, EPIC-100 CSV, a CSV of your own
    licence: str = ""  # of the rows; needed for a table without such a column, data sets have their own
    source: str = ""  # of the rows, where the annotations don't say
    before_seconds: float = 0.25  # input frame before the start (epic, table)
    target_position: float = 0.5  # target frame at this share of start to stop (epic, table)
    after_seconds: float | None = None  # instead: target frame this long after the start
    ego4d_input: Literal["pre_45", "pre_30", "pre_15", "pre_frame"] = "pre_15"  # 1.5, 1, 0.5, 0 s before
    ego4d_target: Literal["contact_frame", "pnr_frame", "post_frame"] = "pnr_frame"  # else the contact frame
    ego4d_clips: bool = False  # the videos are Ego4D's clips, named by clip uid
    val_share: float = 0.05  # of the videos, where the annotations have no split
    window_seconds: float = 0.1  # candidates lie at most this far from a wanted time; 0 = the frame shown then
    min_sharpness: float = 0.03  # variance of the Laplacian over that of the grey values
    min_brightness: float = 16.0  # mean grey value of 255; less is black
    min_contrast: float = 4.0  # its standard deviation; less is blank
    boxes: Path | None = None  # folder of EPIC hand-object <video>.pkl or VISOR <video>.json; else the annotations'
    box_seconds: float = 0.25  # boxes are taken from an annotated moment at most this far from the frame
    require_hands: bool = True  # drop target frames in which hands were looked for and not found
    encoder: Path | None = None  # folder of a CLIP, SigLIP or DINO model; without one, colour histograms
    band: tuple[float, float] | None = None  # similarities that are kept; else the encoder's own (CLIP 0.81 to 0.97)
    size: int = 256  # pixels of the stored frames' shorter side; 0 = as in the video
    expect_processes: int = 0  # refuse another number of processes; 0 = any

    def __post_init__(self):
        if not self.annotations:
            raise ValueError("`annotations` must name at least one file, got none.")
        for name in ("before_seconds", "after_seconds", "window_seconds", "box_seconds", "size", "expect_processes"):
            check_number(self, name, 0)
        for name in ("min_sharpness", "min_brightness", "min_contrast"):
            check_number(self, name, 0)
        for name in ("target_position", "val_share"):
            check_number(self, name, 0, 1)


def settings_of(config: CurateFramesConfig, similarity_name: str) -> dict[str, Any]:
    """All that the result depends on but the videos.

    Annotations are told by names, which give splits and sources, and content, files of boxes by names and sizes, the
    encoder by its weights.
    """
    settings = {name: value for name, value in plain_values(config).items() if name not in FREE_SETTINGS}
    boxes = "annotations"
    if config.boxes is not None:
        files = sorted(path for path in config.boxes.rglob("*") if path.suffix in (".pkl", ".json"))
        boxes = content_key([(str(path.relative_to(config.boxes)), path.stat().st_size) for path in files])
    return settings | {
        "annotations": content_key(sorted([path.name, _digest(path)] for path in config.annotations)),
        "boxes": boxes,
        "similarity": similarity_name,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_plan(config: CurateFramesConfig) -> list[Action]:
    """The annotated actions."""
    timing = Timing(**{field.name: getattr(config, field.name) for field in fields(Timing)})
    return read_actions(
        config.annotations,
        config.format,
        timing,
        licence=config.licence,
        source=config.source,
        ego4d_clips=config.ego4d_clips,
    )


def main(config: CurateFramesConfig) -> None:
    accelerator = Accelerator(kwargs_handlers=[long_waits()])
    check_processes(config.expect_processes, accelerator.num_processes)
    # Read by one process: the annotations of Ego4D take several gigabytes as JSON, the actions a fraction.
    plan = [read_plan(config) if accelerator.is_main_process else None]
    actions = broadcast_object_list(plan)[0]
    videos, boxes = find_videos(config.videos), open_boxes(config.boxes, config.box_seconds)
    similarity = load_similarity(config.encoder, config.band, accelerator.device)
    rules = Rules(**{field.name: getattr(config, field.name) for field in fields(Rules)})
    name = f"{similarity.name} {list(similarity.band)}"
    work = Work(config.output_dir, settings_of(config, name) if accelerator.is_main_process else {})
    if accelerator.is_main_process:
        work.claim()
        if config.encoder is None:
            logger.warning(
                "no `encoder` is given: pairs are compared by %s, kept from %s to %s, not by the paper's CLIP band",
                *(similarity.name, *similarity.band),
            )
        missing = len({action.video for action in actions} - set(videos))
        logger.info(
            "%d actions in %d videos, %d of them not in %s; %d process(es); similarity by %s",
            *(len(actions), len({action.video for action in actions}), missing, config.videos),
            *(accelerator.num_processes, similarity.name),
        )
    accelerator.wait_for_everyone()
    if work.summary is None:
        units = cut_units(actions)
        mine = own_units(units, accelerator.process_index, accelerator.num_processes)
        bar = tqdm(
            total=sum(len(units[number]) for number in mine),
            desc="curate",
            unit="action",
            disable=not accelerator.is_main_process,
            mininterval=2,
        )
        for number in mine:
            if not work.is_done(number, units[number], videos):
                earlier = work.earlier(number, units)
                outcomes = list(curate(units[number], videos, rules, similarity, boxes, earlier))
                work.write_unit(number, units[number], videos, outcomes)
            bar.update(len(units[number]))
        bar.close()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            work.finish(len(units))
    elif accelerator.is_main_process:
        logger.info("%s is complete already", config.output_dir)
    if accelerator.is_main_process and work.summary is not None:
        summary = work.summary
        logger.info("%d pairs of %d actions; dropped: %s", summary["pairs"], summary["actions"], summary["dropped"])
        logger.info("boxes are known in frames of pairs: %s", summary["pairs_with_boxes_in_frames"])
        logger.info("look at %s", config.output_dir / "report.html")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run(main, CurateFramesConfig, __doc__)
