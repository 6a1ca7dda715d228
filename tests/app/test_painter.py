"""What the page asks of the model, without the page."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline import LegoPipeline
from lego_pipeline.app.drift import difference
from lego_pipeline.app.painter import Painter, Settings
from lego_pipeline.app.results import Run
from lego_pipeline.cli.model import draw
from lego_pipeline.images import read_image

SETTINGS = Settings(steps=2)


@pytest.fixture
def vision_passes(painter: Painter) -> list[int]:
    """Grows by one with each pass of the VLM's vision tower."""
    passes: list[int] = []
    painter.pipeline.vlm.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    return passes


def pixels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def test_a_description_is_the_same_each_time(painter: Painter, frame_file: Path) -> None:
    assert painter.describe(frame_file, "open drawer") == painter.describe(frame_file, " open drawer ") != ""


def test_a_frame_is_looked_at_once(painter: Painter, frame_file: Path, vision_passes: list[int]) -> None:
    text = painter.describe(frame_file, "open drawer")
    painter.paint(frame_file, "open drawer", text, 0, SETTINGS)
    painter.paint(frame_file, "open drawer", f"{text} slowly", 1, SETTINGS)
    painter.describe(frame_file, "take cup")
    assert len(vision_passes) == 1


def test_a_record_is_enough_to_paint_the_picture_again(painter: Painter, frame_file: Path) -> None:
    picture = painter.paint(frame_file, "open drawer", "", 7, Settings(steps=2, guidance_scale=3.0, keep_scene=False))
    assert picture is not None
    record = picture.record
    [again], _ = draw(
        painter.pipeline,
        image=read_image(frame_file),
        action=record["action"],
        description=record["description"],
        num_inference_steps=record["steps"],
        guidance_scale=record["guidance_scale"],
        image_guidance_scale=record["image_guidance_scale"],
        keep_scene=record["keep_scene"],
        generator=torch.Generator().manual_seed(record["seed"]),
    )
    # The cache keeps the VLM's states as they are, but batches its work otherwise than a call without a cache.
    assert np.abs(pixels(again) - pixels(picture.image)).max() <= 1
    assert record["image"] == "frame.png" and record["id"] == "open-drawer-seed-7"
    assert record["image_guidance_scale"] == painter.pipeline.config.image_guidance_scale
    assert record["request"] == {"model": "plain"}


def test_an_empty_description_is_the_vlms_and_an_edited_one_is_painted(painter: Painter, frame_file: Path) -> None:
    own = painter.paint(frame_file, "open drawer", " ", 0, SETTINGS)
    edited = painter.paint(frame_file, "open drawer", "with the left hand", 0, SETTINGS)
    assert own is not None and edited is not None
    assert own.record["description"] == painter.describe(frame_file, "open drawer")
    assert edited.record["description"] == "with the left hand"
    assert pixels(own.image).tolist() != pixels(edited.image).tolist()


def test_seeds_give_the_pictures_that_they_give_alone(painter: Painter, frame_file: Path, tmp_path: Path) -> None:
    run = Run.start(frame_file, tmp_path)
    heard = []

    def watch(share: float, text: str) -> bool:
        heard.append((round(share, 2), text))
        return True

    counts = [len(now.files) for now in painter.paint_seeds(run, "open drawer", "", 5, 3, SETTINGS, watch)]
    assert counts == [1, 2, 3]
    assert [run.record(k)["seed"] for k in range(3)] == [5, 6, 7]
    alone = painter.paint(frame_file, "open drawer", "", 6, SETTINGS)
    assert alone is not None and read_image(run.files[1]).tobytes() == alone.image.tobytes()
    assert heard[:3] == [
        (0, "picture 1 of 3"),
        (0.17, "picture 1 of 3, step 1 of 2"),
        (0.33, "picture 1 of 3, step 2 of 2"),
    ]
    assert heard[-1][0] == 1


def test_a_stopped_run_keeps_what_was_finished(painter: Painter, frame_file: Path, tmp_path: Path) -> None:
    run = Run.start(frame_file, tmp_path)
    for _ in painter.paint_seeds(run, "open drawer", "", 0, 3, SETTINGS, lambda share, text: share < 0.5):
        pass
    assert len(run.files) == 1
    assert painter.paint(frame_file, "open drawer", "", 0, SETTINGS) is not None, "the pipeline stays interrupted"


def test_nothing_is_begun_that_was_stopped_while_it_waited(painter: Painter, frame_file: Path, tmp_path: Path) -> None:
    painter.pipeline.vlm.register_forward_hook(lambda *_: pytest.fail("it was begun"))
    run = Run.start(frame_file, tmp_path)
    assert not list(painter.paint_seeds(run, "open drawer", "", 0, 3, SETTINGS, lambda share, text: False))
    assert not list(painter.paint_storyboard(run, ["open drawer"], 0, SETTINGS, watch=lambda share, text: False))


def test_a_storyboard_goes_on_from_its_pictures(painter: Painter, frame_file: Path, tmp_path: Path) -> None:
    run = Run.start(frame_file, tmp_path)
    list(painter.paint_storyboard(run, ["open drawer", "take spoon"], 3, SETTINGS))
    assert [file.name for file in run.files] == ["01-open-drawer.png", "02-take-spoon.png"]
    assert [run.record(k)["image"] for k in range(2)] == ["frame.png", "01-open-drawer.png"]
    alone = painter.paint(run.files[0], "take spoon", "", 3, SETTINGS)
    assert alone is not None and alone.image.tobytes() == read_image(run.files[1]).tobytes()
    first, *pictures = (read_image(path) for path in (frame_file, *run.files))
    assert run.drift[0]["first"] == run.drift[0]["source"] == difference(first, pictures[0])
    assert run.drift[1] == {"first": difference(first, pictures[1]), "source": difference(*pictures)}


def test_a_storyboard_from_the_first_frame_feeds_nothing_back(
    painter: Painter, frame_file: Path, tmp_path: Path
) -> None:
    run = Run.start(frame_file, tmp_path)
    list(painter.paint_storyboard(run, ["open drawer", "take spoon"], 3, SETTINGS, "first"))
    assert [run.record(k)["image"] for k in range(2)] == ["frame.png", "frame.png"]
    assert run.drift[1]["first"] == run.drift[1]["source"]


def test_without_a_vlm_the_words_are_painted(make_painter: Callable[..., Painter], frame_file: Path) -> None:
    painter = make_painter(vlm=None, vlm_processor=None, vlm_dropout=True)
    assert not painter.has_vlm
    pictures = [painter.paint(frame_file, "open drawer", text, 0, SETTINGS) for text in ("", "by its handle")]
    assert [picture and picture.record["description"] for picture in pictures] == ["open drawer", "by its handle"]
    with pytest.raises(ValueError, match="no visual LLM"):
        painter.describe(frame_file, "open drawer")


@pytest.mark.parametrize("action", ["", "  ", None])
def test_an_action_is_asked_for(action: str | None, painter: Painter, frame_file: Path) -> None:
    with pytest.raises(ValueError, match="Type or pick an action first"):
        painter.paint(frame_file, action, "text", 0, SETTINGS)  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_is_none_is_refused(seed: int, painter: Painter, frame_file: Path) -> None:
    with pytest.raises(ValueError, match=f"seed must be a whole number .* got {seed}"):
        painter.paint(frame_file, "open drawer", "", seed, SETTINGS)


def test_a_file_that_is_no_picture_is_named(painter: Painter, tmp_path: Path) -> None:
    (tmp_path / "frame.png").write_text("no picture")
    with pytest.raises(ValueError, match="frame.png must be of a format that Pillow reads"):
        painter.describe(tmp_path / "frame.png", "open drawer")


def test_the_few_step_pipeline_is_loaded_once_and_only_when_asked(
    make_painter: Callable[..., Painter], make_tiny_pipeline: Callable[..., LegoPipeline], frame_file: Path
) -> None:
    loaded = []

    def load_fast(pipeline: LegoPipeline) -> LegoPipeline:
        loaded.append(pipeline)
        return make_tiny_pipeline(num_inference_steps=1, guidance_scale=1.0, image_guidance_scale=1.0)

    painter = make_painter(load_fast)
    assert painter.has_fast and painter.defaults().steps == 3 and not loaded
    pictures = [painter.paint(frame_file, "open drawer", "", 0, Settings(fast=True)) for _ in range(2)]
    records = [picture.record for picture in pictures if picture]
    assert loaded == [painter.pipeline]
    assert [(record["steps"], record["guidance_scale"]) for record in records] == [(1, 1.0)] * 2
    assert records[0]["model"] == "tiny --fast" and records[0]["request"] == {"model": "fast"}


def test_few_steps_are_refused_without_adapters(painter: Painter, frame_file: Path) -> None:
    with pytest.raises(ValueError, match="no few-step adapters"):
        painter.paint(frame_file, "open drawer", "", 0, Settings(fast=True))
