"""What comes with the package stays small, and knows what it doesn't know."""

import PIL.Image
import pytest

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FAST, FRAMES, KITCHEN
from lego_pipeline.checks import warn_of_unknown_frames
from lego_pipeline.data.manifest import read_manifest


def test_the_embedded_checkpoint_has_at_most_48_mib_and_its_few_step_adapters_8_more() -> None:
    assert (KITCHEN / "model_index.json").is_file()
    few = sum(path.stat().st_size for path in (KITCHEN / FAST).rglob("*") if path.is_file())
    assert few <= 8 << 20
    assert sum(path.stat().st_size for path in KITCHEN.rglob("*") if path.is_file()) - few <= 48 << 20


@pytest.fixture(scope="module")
def kitchen() -> LegoPipeline:
    return LegoPipeline.from_pretrained(KITCHEN)


def test_no_frame_of_a_held_out_kitchen_is_called_unknown(kitchen):
    enhancements = kitchen.enhance(read_manifest(FRAMES)["image_0"][:], description="I open the drawer.")
    warn_of_unknown_frames(kitchen.config.frame_statistics, enhancements)  # warnings are errors here


def test_a_picture_that_is_no_kitchen_is_called_unknown(kitchen):
    picture = PIL.Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    with pytest.warns(UserWarning, match="has not seen frames like number 0"):
        warn_of_unknown_frames(
            kitchen.config.frame_statistics, kitchen.enhance(picture, description="I open the drawer.")
        )
