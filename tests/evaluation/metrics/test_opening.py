"""Which metrics can be opened with which weights, and what is said about the others."""

import re
import shutil
from pathlib import Path

import pytest

from lego_pipeline.evaluation import metrics
from lego_pipeline.evaluation.metrics import METRICS, WEIGHTS, open_metrics

WITHOUT_WEIGHTS = ["psnr", "ssim", "judge", "judge_verb", "judge_noun"]


def test_without_weights_five_metrics_are_open_and_all_others_are_named():
    found, missing = open_metrics()
    assert [metric.name for metric in found] == WITHOUT_WEIGHTS
    assert {item.name for item in missing} == set(METRICS) - set(WITHOUT_WEIGHTS)
    for item in missing:
        for weight in METRICS[item.name].weights:
            assert all(file in item.needs for file in WEIGHTS[weight].files)
            assert f"{weight}=PATH" in item.how_to_get and WEIGHTS[weight].source in item.how_to_get


def test_metrics_come_in_the_order_asked_for_each_once():
    found, missing = open_metrics(["judge", "lpips", "psnr", "judge"])
    assert [metric.name for metric in found] == ["judge", "psnr"]
    assert [item.name for item in missing] == ["lpips"]
    assert "squeezenet1_1-b8a52dc0.pth" in missing[0].needs and "SqueezeNet1_1_Weights" in missing[0].how_to_get


def test_a_folder_brings_all_that_it_holds(weights_folder):
    found, missing = open_metrics("all", {"folder": weights_folder})
    assert {item.name for item in missing} == {"fid", "lpips_vgg", "lpips_alex", "hand_detector", "hand_place"}
    by_name = {metric.name: metric for metric in found}
    assert by_name["egovlp"].tower is by_name["egovlp_plus"].tower
    assert by_name["blip_b"].texts is by_name["blip_l"].texts
    for name, metric in by_name.items():
        known = {weight.removesuffix("_b").removesuffix("_l") for weight in metric.weights}
        assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in metric.weights.values()), name
        assert bool(metric.weights) is (name not in ("psnr", "ssim")), known


def test_two_files_of_egovlp_in_a_folder_must_be_told_apart(weights_folder, tmp_path):
    for name in ("egovlp.pth", "epic_mir_plus.pth"):
        shutil.copy(weights_folder / "egovlp.pth", tmp_path / name)
    with pytest.raises(ValueError, match="must say which EgoVLP is meant, found egovlp.pth, epic_mir_plus.pth"):
        open_metrics(["egovlp"], {"folder": tmp_path})
    (metric,), _ = open_metrics(["egovlp"], {"folder": tmp_path, "egovlp": tmp_path / "epic_mir_plus.pth"})
    assert "still x16" in metric.definition


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"names": ["psnr", "fvd"]}, "`metrics` must be all or of egovlp, .*, got fvd"),
        ({"weights": {"bert": "x"}}, "`weights` must be of egovlp, .* or folder, got 'bert'"),
        ({"weights": {"egovlp": "nowhere/egovlp.pth"}}, "`weights` egovlp must be .* there, got nowhere/egovlp.pth"),
        ({"weights": {"folder": Path("nowhere")}}, "`weights` folder must be .* there, got nowhere"),
        ({"parity": "release"}, "`parity` must be \"paper\" or None, got 'release'"),
        ({"device": "tpu"}, "`device` must be known to torch"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        open_metrics(**arguments)


def test_a_hub_name_that_can_not_be_reached_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="`clip` must be a folder .* or a hub name that can be reached") as error:
        open_metrics(["clip"], {"clip": "nobody/no-such-model"})
    assert "\n" not in str(error.value)


def test_weights_that_are_damaged_are_refused_and_not_left_out(weights_folder, tmp_path):
    broken = tmp_path / "egovlp.pth"
    broken.write_bytes((weights_folder / "egovlp.pth").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"egovlp.pth` must be"):
        open_metrics("all", {"egovlp": broken})


def test_a_missing_package_is_named_with_the_line_that_brings_it(monkeypatch, weights_folder):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "timm" else True)
    _, missing = open_metrics(["egovlp", "psnr"], {"folder": weights_folder})
    assert [(item.name, item.needs) for item in missing] == [("egovlp", "the package timm")]
    assert missing[0].how_to_get == 'run `pip install "lego-pipeline[eval]"`'
