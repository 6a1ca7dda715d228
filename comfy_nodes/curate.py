"""Node that makes training pairs of videos: the curation of `train/curate_frames.py` with its default rules."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from comfy_api.latest import io, ui

from lego_pipeline.images import to_rgb

from . import adapter
from .frames import to_image

FORMATS = ["table", "epic", "ego4d"]


def videos_state(folder: Path) -> str:
    """Key of the names and sizes of the videos in a folder and below it; other files don't count."""
    from lego_pipeline.curation.frames import SUFFIXES

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    state = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:32]


def curate_folder(
    videos: Path, annotations: Path, form: Literal["table", "epic", "ego4d"], folder: Path, licence: str
) -> dict[str, Any]:
    """Curates with a progress bar and cancel; the folder gets manifest and report, and goes on where it was stopped.

    Until it is finished, videos that were added or have changed are looked at again; a finished one stays as it is.

    Returns:
        The summary, see `lego_pipeline.curation.work.summarise`.

    Raises:
        ValueError: the folder holds a curation with other settings or annotations, or a finished one of other videos.
    """
    from lego_pipeline.curation.actions import Timing
    from lego_pipeline.curation.frames import Outcome, Rules, curate, find_videos
    from lego_pipeline.curation.readers import read_actions
    from lego_pipeline.curation.similarity import load_similarity
    from lego_pipeline.curation.work import Work, cut_units

    rules, timing, similarity = Rules(), Timing(), load_similarity(None)
    settings = {"format": form, "licence": licence, "rules": asdict(rules), "timing": asdict(timing)}
    settings |= {"annotations": hashlib.sha256(annotations.read_bytes()).hexdigest()[:32]}
    settings |= {"similarity": f"{similarity.name} {list(similarity.band)}"}
    work, state = Work(folder, settings), {"videos": videos_state(videos)}
    if work.summary is not None:
        work.settings |= state
    try:
        work.claim()
    except ValueError as error:
        told = str(error).removeprefix("`output_dir` ")
        raise ValueError(f"`name` must be a new one, got {folder.name!r}: {told}") from error
    if work.summary is not None:
        return work.summary
    actions, files = read_actions([annotations], form, timing, licence=licence), find_videos(videos)
    units = cut_units(actions)
    show, done = adapter.progress(len(actions)), 0

    def watched(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        for number, outcome in enumerate(outcomes, start=1):
            adapter.stop_if_asked()
            show(done + number, None)
            yield outcome

    for number, unit in enumerate(units):
        if not work.is_done(number, unit, files):
            found = curate(unit, files, rules, similarity, earlier=work.earlier(number, units))
            work.write_unit(number, unit, files, list(watched(found)))
        done += len(unit)
    work.settings |= state
    return work.finish(len(units))


def report_of(summary: dict[str, Any], folder: Path) -> str:
    """Counts by reason, which add up, and where the files are."""
    from lego_pipeline.curation.frames import REASONS

    lines = [f"{summary['pairs']} pairs of {summary['actions']} actions in {summary['videos']} videos"]
    lines += [f"{count} dropped, {reason}: {REASONS[reason]}" for reason, count in summary["dropped"].items()]
    lines += [f"similarity by {summary['settings']['similarity']}"]
    lines += [f"pictures of all reasons: {folder / 'report.html'}", f"manifest for training: {folder / 'manifest'}"]
    return "\n".join(lines)


class LegoCuratePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoCuratePairs",
            display_name="LEGO Curate Pairs",
            category="LEGO/curate",
            description="Picks a frame before and a frame at the height of every annotated action of your videos, and "
            "says of each dropped one why. Manifest and report are written below output/lego_pairs. Needs av and "
            "jinja2.",
            search_aliases=["dataset", "video frames", "training pairs", "lego"],
            inputs=[
                io.Combo.Input(
                    "videos", options=list(adapter.video_folders()), tooltip="A folder of videos in the input folder."
                ),
                io.Combo.Input(
                    "annotations",
                    options=list(adapter.annotation_files()),
                    tooltip="A file in the input folder that says what is done when.",
                ),
                io.Combo.Input(
                    "format",
                    options=FORMATS,
                    default=FORMATS[0],
                    tooltip="A CSV with video, start, stop, action (table), EPIC-KITCHENS-100's, or Ego4D's "
                    "fho_main.json.",
                ),
                io.String.Input(
                    "licence",
                    default="",
                    tooltip="Under which the videos may be used; it is kept with each pair. A table needs it.",
                ),
                io.String.Input(
                    "name",
                    default="pairs",
                    tooltip="Of the folder below output/lego_pairs; the same name goes on where it was stopped.",
                ),
                io.Int.Input(
                    "count",
                    default=16,
                    min=1,
                    max=256,
                    tooltip="Pairs that are given on as images, at most; the manifest has all.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image_0", is_output_list=True, tooltip="Frames before the actions."),
                io.Image.Output(display_name="image_1", is_output_list=True, tooltip="Frames that show the actions."),
                io.String.Output(display_name="action", is_output_list=True, tooltip="The labels of the pairs."),
                io.String.Output(
                    display_name="report", tooltip="How many pairs, and what was dropped for which reason."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, videos: str, annotations: str, **_: Any) -> str:
        folder, file = adapter.video_folders().get(videos), adapter.annotation_files().get(annotations)
        state = "" if file is None else f"{file.stat().st_size} {file.stat().st_mtime_ns}"
        return f"{state} {'' if folder is None else videos_state(folder)}"

    @classmethod
    def execute(
        cls,
        videos: str,
        annotations: str,
        format: Literal["table", "epic", "ego4d"],
        licence: str,
        name: str,
        count: int,
    ) -> io.NodeOutput:
        from lego_pipeline.data.manifest import read_manifest

        folder = adapter.pairs_to_write(name)
        video_folder = adapter.folder_of(videos, adapter.video_folders(), "videos")
        file = adapter.folder_of(annotations, adapter.annotation_files(), "annotations")
        summary = curate_folder(video_folder, file, format, folder, licence.strip())
        report = report_of(summary, folder)
        if not summary["pairs"]:
            raise ValueError(f"`videos` must hold at least one pair that can be kept, got none.\n{report}")
        rows = read_manifest(folder / "manifest")
        rows = [rows[number] for number in range(min(count, len(rows)))]
        pictures = [[to_image([to_rgb(row[key])]) for row in rows] for key in ("image_0", "image_1")]
        return io.NodeOutput(*pictures, [row["action"] for row in rows], report, ui=ui.PreviewText(report))


NODES = [LegoCuratePairs]
