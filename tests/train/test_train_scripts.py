"""The kitchen's own training scripts, train_vae.py and train_clip.py: two steps, stop, two more, bit-equal weights.

They run in this process through their `main`, with a clock by which every step takes a minute.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from examples.kitchen import train_clip, train_vae


def assert_equal_weights(first: Path, second: Path) -> None:
    """Both folders hold the same tensors, bit for bit."""
    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert files
    for file in files:
        a, b = load_file(first / file), load_file(second / file)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_the_kitchens_autoencoder_in_two_slices_has_the_weights_of_one(
    kitchen_data: Path, tmp_path: Path, minute_clock: None
) -> None:
    def config(folder: str, **changes: Any) -> train_vae.TrainVaeConfig:
        settings = {"batch_size": 2, "max_steps": 4, "warmup_steps": 1, **changes}
        return train_vae.TrainVaeConfig(data=kitchen_data, output_dir=tmp_path / folder, **settings)

    train_vae.main(config("whole"))
    train_vae.main(config("sliced", max_minutes=1.5))
    assert report(tmp_path / "sliced")["step"] == 2
    train_vae.main(config("sliced", max_minutes=1.5))
    assert report(tmp_path / "sliced")["finished"]
    assert_equal_weights(tmp_path / "whole" / "vae", tmp_path / "sliced" / "vae")


def test_the_kitchens_clip_in_two_slices_has_the_weights_of_one(
    kitchen_data: Path, tmp_path: Path, minute_clock: None
) -> None:
    def config(folder: str, **changes: Any) -> train_clip.TrainClipConfig:
        settings = {"batch_size": 3, "max_steps": 4, "warmup_steps": 1, **changes}
        return train_clip.TrainClipConfig(data=kitchen_data, output_dir=tmp_path / folder, **settings)

    train_clip.main(config("whole"))
    train_clip.main(config("sliced", max_minutes=1.5))
    assert report(tmp_path / "sliced")["step"] == 2
    train_clip.main(config("sliced", max_minutes=1.5))
    assert report(tmp_path / "sliced")["finished"]
    for tower in ("text_encoder", "vision_tower"):
        assert_equal_weights(tmp_path / "whole" / tower, tmp_path / "sliced" / tower)


def test_equal_texts_are_all_right_answers_for_a_frame() -> None:
    similarity = torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    right = train_clip.contrastive_loss(similarity, ["open", "open", "close"])
    wrong = train_clip.contrastive_loss(similarity, ["open", "close", "open"])
    assert right < 0.5 < wrong
