"""Rows of the table that generate: their names, what of the condition they use, and frames made once."""

from pathlib import Path

import PIL.Image
import pytest
import torch
from datasets import Dataset

from examples.kitchen.systems import LEGO, Generator, Scales, System, parse_system, weights_key

SCALES = Scales(2.0, 1.5, 2)


@pytest.fixture
def rows(make_frame) -> Dataset:
    return Dataset.from_list([
        {"id": f"pair-{i}", "image_0": make_frame(32, 32, seed=i), "action": action, "description": f"{action}, so."}
        for i, action in enumerate(["open drawer", "take cup", "open drawer"])
    ])  # fmt: skip


def generator(folder: Path, kept: Path, parts: str = LEGO, **settings) -> Generator:
    return Generator(System("name", folder, parts), kept, batch_size=2, **settings)


def test_names_folders_and_parts_are_read(tiny_folder):
    assert parse_system(f"LEGO={tiny_folder}") == System("LEGO", tiny_folder, "description+image+text")
    assert parse_system(f"label only={tiny_folder}:label") == System("label only", tiny_folder, "label")
    assert parse_system(f"A={tiny_folder}:decoded") == System("A", tiny_folder, "description+image+text", decoded=True)
    assert parse_system(f"A={tiny_folder}:label:decoded") == System("A", tiny_folder, "label", decoded=True)
    assert parse_system(f"a=b={tiny_folder}".replace("a=b", "a", 1)).name == "a"


def test_a_folder_without_a_vlm_takes_the_label(make_tiny_pipeline, tmp_path):
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained(tmp_path / "pipeline")
    assert parse_system(f"label only={tmp_path / 'pipeline'}").parts == "label"


@pytest.mark.parametrize("text", ["LEGO", "={}", "LEGO={}:words", "LEGO={}:image", "LEGO=/nowhere"])
def test_other_forms_are_refused(text, tiny_folder):
    with pytest.raises(ValueError, match="must"):
        parse_system(text.format(tiny_folder))


def condition(folder: Path, tmp_path: Path, parts: str, rows: Dataset) -> torch.Tensor:
    return generator(folder, tmp_path, parts)._condition(list(rows))[0].detach()


def test_parts_that_are_left_out_are_zero_and_the_others_are_lego_s(tiny_folder, tmp_path, rows):
    whole = condition(tiny_folder, tmp_path, "description+image+text", rows)
    image, text = slice(77, 77 + 4), slice(77 + 4, None)
    assert whole[:, image].any() and whole[:, text].any()
    for parts, zeroed in (
        ("description", (image, text)),
        ("description+image", (text,)),
        ("description+text", (image,)),
    ):
        part = condition(tiny_folder, tmp_path, parts, rows)
        expected = whole.clone()
        for place in zeroed:
            expected[:, place] = 0
        torch.testing.assert_close(part, expected)
    label = condition(tiny_folder, tmp_path, "label", rows)
    assert not label[:, 77:].any()
    torch.testing.assert_close(label[0], label[2])  # the label alone knows nothing of the frame
    assert not torch.equal(label[0], label[1])


def test_lego_s_row_is_what_the_pipeline_gives(tiny_folder, tmp_path, rows):
    made = generator(tiny_folder, tmp_path)
    pipeline = made.load()
    condition, null_condition, texts = made._condition(list(rows))
    enhancements = list(made.enhancements.values())
    expected, expected_null = pipeline.encode_condition(enhancements)
    torch.testing.assert_close(condition, expected)
    torch.testing.assert_close(null_condition, expected_null)
    assert texts == [item.description for item in enhancements]


def test_the_true_description_can_stand_in_for_the_vlm_s(tiny_folder, tmp_path, rows):
    made = generator(tiny_folder, tmp_path, "truth+image+text")
    condition, _, texts = made._condition(list(rows))
    assert texts == rows["description"][:]
    pipeline = made.load()
    given = pipeline.enhance(rows["image_0"][:], rows["action"][:], rows["description"][:])
    torch.testing.assert_close(condition, pipeline.encode_condition(given)[0])


def test_frames_are_made_once_and_again_when_something_changes(tiny_folder, tmp_path, rows, monkeypatch):
    made: list[str] = []
    real = Generator._generate

    def counted(self, batch, scales):
        made.extend(row["id"] for row in batch)
        return real(self, batch, scales)

    monkeypatch.setattr(Generator, "_generate", counted)
    first = generator(tiny_folder, tmp_path).frames(rows, SCALES)
    assert first.shape == (3, 3, 32, 32) and len(made) == 3
    path = next(tmp_path.rglob("pair-1.png"))
    path.write_bytes(path.read_bytes()[:100])  # cut short by a kill
    assert torch.equal(generator(tiny_folder, tmp_path).frames(rows, SCALES), first)
    assert made[3:] == ["pair-1"]
    generator(tiny_folder, tmp_path, seed=1).frames(rows, SCALES)
    assert len(made) == 7
    generator(tiny_folder, tmp_path, "label", seed=1).frames(rows, SCALES)
    assert len(made) == 10


def test_a_frame_depends_on_its_pair_alone(tiny_folder, tmp_path, rows):
    together = generator(tiny_folder, tmp_path / "a").frames(rows, SCALES)
    alone = generator(tiny_folder, tmp_path / "b").frames(rows.select([1]), SCALES)
    assert (alone[0] - together[1]).abs().max() <= 1.01 / 127.5  # a rounded grey level


def test_descriptions_are_kept_with_the_frames(tiny_folder, tmp_path, rows):
    made = generator(tiny_folder, tmp_path, "label")
    made.frames(rows, SCALES)
    assert made.descriptions(rows["id"][:], SCALES) == rows["action"][:]


def test_the_key_changes_with_the_weights(make_tiny_pipeline, tiny_folder, tmp_path):
    pipeline = make_tiny_pipeline()
    with torch.no_grad():
        pipeline.projector.image_projection.bias.add_(1)
    pipeline.save_pretrained(tmp_path / "other")
    assert weights_key(tmp_path / "other") != weights_key(tiny_folder)
    assert weights_key(tiny_folder) == weights_key(tiny_folder)


def test_a_system_without_a_vlm_cannot_describe(make_tiny_pipeline, tmp_path):
    make_tiny_pipeline(vlm=None, vlm_processor=None).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="must have a VLM"):
        generator(tmp_path / "pipeline", tmp_path, "description").load()


def test_pictures_come_back_as_they_were_written(tmp_path):
    from examples.kitchen.systems import _pixels

    values = torch.arange(256).byte().reshape(16, 16)
    picture = PIL.Image.fromarray(values.numpy()).convert("RGB")
    assert torch.equal(_pixels(picture)[0], values)
