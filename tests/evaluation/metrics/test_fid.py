"""FID: the distance by hand and by matrix roots, Inception's poolings, and both ways of resizing."""

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.nn import functional

from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, SetMetric
from lego_pipeline.evaluation.metrics.fid import SIZE, Fid, build_inception, frechet_distance, load_inception


class Means(nn.Module):
    """Stands for Inception, which is of 90 MB: mean colours of the four quarters, so resizing shows."""

    def __init__(self):
        super().__init__()
        self.calls, self.weight = 0, nn.Parameter(torch.ones(1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        assert pictures.shape[1:] == (3, SIZE, SIZE) and pictures.abs().max() < 1.0001
        self.calls += 1
        return functional.adaptive_avg_pool2d(pictures * self.weight, 2).flatten(1)


def test_the_distance_of_one_feature_is_known():
    """(m1 - m2)^2 + (s1 - s2)^2 with sample deviations."""
    first, second = np.array([[0.0], [2.0]]), np.array([[5.0], [6.0], [7.0]])
    assert frechet_distance(first, second) == pytest.approx((1 - 6) ** 2 + (np.sqrt(2) - 1) ** 2)


@pytest.mark.parametrize(("count", "other_count"), [(40, 60), (5, 60), (5, 4)])
def test_the_distance_is_that_of_matrix_roots(count, other_count):
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(count, 8)) @ rng.normal(size=(8, 8)), rng.normal(1, 2, (other_count, 8))
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_one_frame_has_no_distance():
    with pytest.raises(ValueError, match="at least two frames on each side, got 1 and 2"):
        frechet_distance(np.ones((1, 3)), np.ones((2, 3)))


@pytest.mark.parametrize("parity", [None, "paper"])
def test_features_are_cached_and_equal_in_batches(parity, frames, tmp_path):
    generated, target, _ = frames
    metric = Fid(Means(), parity, FeatureCache(tmp_path, batch_size=4))
    assert isinstance(metric, SetMetric)
    features = metric.features(generated)
    assert features.shape == (6, 12) and metric.network.calls == 2
    again = Fid(Means(), parity, FeatureCache(tmp_path))
    np.testing.assert_array_equal(again.features(generated), features)
    assert again.network.calls == 0
    alone = Fid(Means(), parity, FeatureCache(batch_size=1)).features(generated)
    np.testing.assert_allclose(alone, features, atol=1e-5)
    assert metric.distance(features, features) < 1e-6 < metric.distance(features, metric.features(target))


def test_the_modes_resize_differently():
    large = [Frame(PIL.Image.effect_noise((700, 700), 80).convert("RGB"))]
    default, paper = (Fid(Means(), parity, FeatureCache()).features(large) for parity in (None, "paper"))
    assert np.abs(default - paper).max() > 1e-3


def test_the_default_resizing_is_clean_fids(frames):
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    for frame in frames[0]:
        theirs = resize(np.array(frame.image))
        ours = preprocess.whole_frame(preprocess.unit_tensor(frame.image), SIZE)[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(ours - theirs).max() < 0.02  # of 255


def test_inception_pools_as_tensorflow_does():
    torch.manual_seed(0)
    network = build_inception().eval()
    assert sum("weight" in name for name in network.state_dict()) == 188  # 94 convolutions, each with its norm
    x = torch.randn(1, 192, 5, 5)
    block = network.Mixed_5b
    with torch.no_grad():
        average = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        torch.testing.assert_close(block(x)[:, -32:], block.branch_pool(average))
        assert not torch.allclose(block(x)[:, -32:], block.branch_pool(functional.avg_pool2d(x, 3, 1, 1)), atol=1e-4)
        x, block = torch.randn(1, 2048, 3, 3), network.Mixed_7c
        torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(functional.max_pool2d(x, 3, 1, 1)))
        x, block = torch.randn(1, 1280, 3, 3), network.Mixed_7b
        average = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(average))


@pytest.mark.slow
def test_inceptions_file_is_read_whole_and_another_refused(tmp_path, weights_folder):
    network = build_inception().eval()
    state = {**network.state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    loaded = load_inception(tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    picture = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        features = loaded(picture)
        assert features.shape == (2, 2048)
        torch.testing.assert_close(features, network(picture))
    with pytest.raises(ValueError, match="`inception` must be pytorch-fid's weights"):
        load_inception(weights_folder / "squeezenet1_1-b8a52dc0.pth")
