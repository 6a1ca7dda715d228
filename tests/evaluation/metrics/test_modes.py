"""Every metric in both modes on small networks: batches, cache, definitions, and what differs between the modes."""

import json
import math
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from lego_pipeline.evaluation.metrics import METRICS, open_metrics
from lego_pipeline.evaluation.metrics.base import Frame, Sample, SampleMetric, metric_key
from lego_pipeline.evaluation.metrics.pixels import CEILING
from lego_pipeline.parity import released_jpeg

SMALL = ("egovlp", "egovlp_plus", "clip", "psnr", "ssim", "lpips", "blip_b", "blip_l", "clip_text", "judge",
         "judge_verb", "judge_noun")  # fmt: skip


def opened(name, weights_folder, parity=None, **options) -> SampleMetric:
    (metric,), missing = open_metrics([name], {"folder": weights_folder}, parity, **options)
    assert not missing and isinstance(metric, SampleMetric) and metric.name == name
    return metric


# In the paper's mode dropout makes BLIP's captions depend on their batch, see `test_blip.py`.
@pytest.mark.parametrize(
    ("name", "parity"),
    [(name, parity) for name in SMALL for parity in (None, "paper") if not (parity and name.startswith("blip"))],
)
def test_a_batch_gives_what_single_pictures_give(name, parity, weights_folder, frames):
    generated, target, samples = frames
    together = opened(name, weights_folder, parity, batch_size=4).scores(generated, target, samples)
    alone = opened(name, weights_folder, parity, batch_size=1).scores(generated, target, samples)
    assert together.shape == (len(generated),) and np.isfinite(together).all()
    assert name.startswith("judge") or np.ptp(together) > 1e-3
    np.testing.assert_allclose(together, alone, atol=1e-5 * max(1, np.abs(alone).max()), rtol=0)


@pytest.mark.parametrize("parity", [None, "paper"])
@pytest.mark.parametrize("name", [name for name in SMALL if name != "psnr"])
def test_a_second_run_asks_no_network_and_opens_no_picture(
    name, parity, weights_folder, frames, tmp_path, monkeypatch
):
    generated, target, samples = frames
    first = opened(name, weights_folder, parity, cache=tmp_path / "cache")
    scores = first.scores(generated, target, samples)
    again = opened(name, weights_folder, parity, cache=tmp_path / "cache")

    def forbidden(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(torch.nn.Module, "__call__", forbidden)
    monkeypatch.setattr(Frame, "image", property(forbidden))
    np.testing.assert_array_equal(again.scores(generated, target, samples), scores)


def test_equal_pictures_are_seen_once(weights_folder, frames):
    generated, _, samples = frames
    metric = opened("clip", weights_folder)
    scores = metric.scores([generated[0]] * 3, [generated[0]] * 3, samples[:3])
    assert metric.cache.computed == 1
    np.testing.assert_allclose(scores, 100)


@pytest.mark.parametrize("name", SMALL)
def test_the_modes_have_their_own_definitions_and_keys(name, weights_folder):
    default, paper = (opened(name, weights_folder, parity) for parity in (None, "paper"))
    alike = name in ("clip_text",) or name.startswith("judge")
    assert (default.definition == paper.definition) is alike
    assert (metric_key(default) == metric_key(paper)) is alike
    assert default.definition and default.title and default.unit in ("%", "dB", "")


def test_pictures_in_other_wrappings_give_the_same_scores(weights_folder, frames, tmp_path):
    generated, target, samples = frames
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, frame in zip(paths, generated[:2], strict=True):
        frame.image.save(path)
    metric = opened("clip", weights_folder)
    expected = metric.scores(generated[:2], target[:2], samples[:2])
    for sources in (paths, [path.read_bytes() for path in paths]):
        np.testing.assert_array_equal(metric.scores([Frame(s) for s in sources], target[:2], samples[:2]), expected)


# --- PSNR and SSIM ---------------------------------------------------------------------------------------------------


def flat(value: int, size: tuple[int, int] = (32, 32)) -> Frame:
    return Frame(PIL.Image.new("RGB", size, (value, value, value)))


@pytest.mark.parametrize("parity", [None, "paper"])
def test_psnr_is_minus_ten_times_the_logarithm_of_the_error(parity):
    (metric,), _ = open_metrics(["psnr"], parity=parity)
    score = metric.scores([flat(100)], [flat(151)], [Sample("a", "open drawer")])
    assert score == pytest.approx([-20 * math.log10(51 / 255)])


def test_psnr_of_a_copy_is_infinite_in_the_papers_mode_alone():
    scores = [
        open_metrics(["psnr"], parity=parity)[0][0].scores([flat(9)], [flat(9)], [Sample("a", "b")])[0]
        for parity in (None, "paper")
    ]
    assert scores == [pytest.approx(CEILING), math.inf]
    assert pytest.approx(58.92, abs=0.01) == CEILING


def test_psnr_of_another_size_differs_between_the_modes():
    rng = np.random.default_rng(0)
    generated = Frame(PIL.Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)))
    default, paper = (
        open_metrics(["psnr"], parity=parity)[0][0].scores([generated], [flat(127)], [Sample("a", "b")])[0]
        for parity in (None, "paper")
    )
    assert default > paper + 3  # noise is averaged by antialiasing, and picked out without


def test_ssim_of_a_copy_is_one_and_falls_with_noise(frames, weights_folder):
    generated, target, samples = frames
    metric = opened("ssim", weights_folder)
    np.testing.assert_allclose(metric.scores(target, target, samples), 1, atol=1e-6)
    assert (metric.scores(generated, target, samples) < 0.9).all()


# --- LPIPS -----------------------------------------------------------------------------------------------------------


def test_lpips_sees_minus_one_to_one_and_in_the_papers_mode_half_of_it(weights_folder, frames):
    samples = frames[2]
    metric = opened("lpips", weights_folder)
    paper = opened("lpips", weights_folder, "paper")
    unit = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pair = [Frame(PIL.Image.fromarray((x.permute(1, 2, 0) * 255).byte().numpy())) for x in unit]
    first, second = (torch.from_numpy(np.array(frame.image)).permute(2, 0, 1)[None] / 255 for frame in pair)
    for tried, low in ((metric, -1), (paper, 0)):
        with torch.no_grad():
            expected = tried.network(first * (1 - low) + low, second * (1 - low) + low).item()
        assert tried.scores(pair[:1], pair[1:], samples[:1])[0] == pytest.approx(100 * expected, rel=1e-4)
    assert metric.scores(pair[:1], pair[1:], samples[:1])[0] != pytest.approx(
        paper.scores(pair[:1], pair[1:], samples[:1])[0], rel=1e-2
    )


@pytest.mark.parametrize("backbone", ["squeeze", "vgg", "alex"])
def test_a_backbone_of_torchvision_is_taken_over_whole(backbone, tmp_path, monkeypatch):
    from torch import nn
    from torchvision import models

    from lego_pipeline.evaluation.metrics.lpips import load_lpips

    class Small(nn.Linear):  # 500 MB otherwise, almost all of it the classifier, which LPIPS doesn't use
        def __init__(self, *_: Any):
            super().__init__(1, 1)

    monkeypatch.setattr(nn, "Linear", Small)
    model: Any = {"squeeze": models.squeezenet1_1, "vgg": models.vgg16, "alex": models.alexnet}[backbone]()
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    network: Any = load_lpips(backbone, tmp_path / "backbone.pth")
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        last = network.net(network.scaling_layer(picture))[-1]
        features = model.features.eval()
        expected = features[: {"squeeze": 13, "vgg": 30, "alex": 12}[backbone]](network.scaling_layer(picture))
    torch.testing.assert_close(last, expected)


def test_another_backbone_is_refused(weights_folder):
    with pytest.raises(ValueError, match="`lpips_alex` must be torchvision's weights of alex, got .*squeezenet"):
        open_metrics(["lpips_alex"], {"lpips_alex": weights_folder / "squeezenet1_1-b8a52dc0.pth"})


# --- EgoVLP+, judge --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["egovlp_plus", "judge"])
def test_a_metric_that_reads_the_input_frame_asks_for_it(name, weights_folder, frames):
    generated, target, samples = frames
    without = [Frame(frame.image) for frame in generated]
    with pytest.raises(ValueError, match="must have the input frame"):
        opened(name, weights_folder).scores(without, target, samples)


def test_context_makes_scores_higher(weights_folder, frames):
    generated, target, samples = frames
    plain, plus = (
        opened(name, weights_folder).scores(generated, target, samples) for name in ("egovlp", "egovlp_plus")
    )
    assert plus.mean() > plain.mean()


def test_the_papers_egovlp_does_not_see_the_sides_of_a_wide_frame(weights_folder, pictures):
    wide = pictures([(96, 48)])[0]
    changed = wide.copy()
    changed.paste((255, 0, 0), (0, 0, 20, 48))
    scores = {
        parity: opened("egovlp", weights_folder, parity).scores([Frame(changed)], [Frame(wide)], [Sample("a", "b")])[0]
        for parity in (None, "paper")
    }
    assert scores["paper"] == pytest.approx(100, abs=1e-4) and scores[None] < 99.9


def test_the_judge_has_no_answer_for_an_action_that_it_does_not_know(frames, weights_folder):
    generated, target, samples = frames
    unknown = [Sample("a", "juggle knives", "juggle", "knives"), *samples[1:]]
    for name in ("judge", "judge_verb", "judge_noun"):
        scores = opened(name, weights_folder).scores(generated, target, unknown)
        assert math.isnan(scores[0]) and set(scores[1:]) <= {0, 100}


def test_the_judge_names_the_action_of_true_frames():
    from lego_pipeline.checkpoints import FRAMES
    from lego_pipeline.data.manifest import read_manifest

    rows = read_manifest(FRAMES)
    frames = [Frame(after, before) for before, after in zip(rows["image_0"][:], rows["image_1"][:], strict=True)]
    samples = [Sample(row["id"], row["action"], row["verb"], row["noun"]) for row in rows]
    metrics, _ = open_metrics(["judge", "judge_verb", "judge_noun"])
    for metric in metrics:
        assert metric.scores(frames, frames, samples).mean() > 85, metric.name
    swapped = [samples[-1], *samples[:-1]]
    assert metrics[0].scores(frames, frames, swapped).mean() < 30
    assert metrics[0].features(frames).sum(1) == pytest.approx(1)


def test_clip_text_changes_with_the_words(weights_folder, frames):
    generated, target, samples = frames
    metric = opened("clip_text", weights_folder)
    other = [Sample(sample.id, "close fridge") for sample in samples]
    assert (np.abs(metric.scores(generated, target, samples) - metric.scores(generated, target, other)) > 1e-4).all()
    assert metric.reads == ("action",)


def test_scores_are_those_of_jpeg_files_too(weights_folder, frames, tmp_path):
    """The released tree is of JPEG files: they are read as they are."""
    generated, target, samples = frames
    (tmp_path / "a.jpg").write_bytes(released_jpeg(generated[0].image))
    score = opened("clip", weights_folder, "paper").scores([Frame(tmp_path / "a.jpg")], target[:1], samples[:1])
    assert np.isfinite(score).all()


def test_every_metric_has_a_definition_here_or_is_tested_in_another_file():
    assert {*SMALL, "fid", "lpips_vgg", "lpips_alex", "hand_detector", "hand_place"} == set(METRICS)


def test_the_benchmark_compares_single_pictures_with_batches(capsys, tmp_path):
    from benchmarks import metrics

    settings = metrics.MetricsConfig(
        metrics=("judge",), frames=6, batch_size=3, json=tmp_path / "new" / "metrics.json"
    )
    metrics.main(settings)
    assert "| judge |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert row["speedup"] == pytest.approx(row["batched"] / row["single"]) and row["difference"] <= 1e-5
