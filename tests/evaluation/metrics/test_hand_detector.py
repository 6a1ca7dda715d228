"""The hand detector as a metric: shares, pairs without an answer, and the cache of what was found."""

import math

import numpy as np
import pytest
import torch

from lego_pipeline.evaluation import hands
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.hands import LANDMARKS, PALM, Hand
from lego_pipeline.evaluation.metrics import open_metrics
from lego_pipeline.evaluation.metrics.base import Frame
from lego_pipeline.evaluation.metrics.hand_detector import FoundHand

BOX = (0.25, 0.25, 0.5, 0.5)


class Detector:
    """Finds what a list says, frame by frame, and counts."""

    def __init__(self, *answers: list[Hand]):
        self.answers = list(answers)

    def read_frame(self, frame: torch.Tensor) -> list[Hand]:
        assert frame.ndim == 3 and frame.shape[0] == 3 and 0 <= frame.min() and frame.max() <= 1
        return self.answers.pop(0)


def hand(presence: float, box=BOX) -> Hand:
    return Hand(0.75, box, presence, 0.125)


def test_the_share_of_frames_with_a_hand(frames, tmp_path):
    generated, target, samples = frames
    cache = FeatureCache(tmp_path)
    detector = Detector([hand(0.875), hand(0.25)], [], [hand(0.5)], *([hand(1.0)] for _ in range(3)))
    metric = FoundHand(detector, "digest", cache, in_place=False)
    assert metric.reads == () and metric.features(generated) is None
    assert metric.scores(generated, generated, samples).tolist() == [100, 0, 0, 100, 100, 100]
    again = FoundHand(Detector(), "digest", FeatureCache(tmp_path), in_place=False)
    assert again.hands(generated)[:2] == [[hand(0.875), hand(0.25)], []]


def test_a_hand_counts_in_the_place_of_the_true_one_alone(frames):
    generated, target, samples = (part[:3] for part in frames)
    elsewhere = (0.75, 0.75, 1.0, 1.0)
    detector = Detector([hand(0.9)], [hand(0.9, elsewhere)], [hand(0.9)], [hand(0.9)], [hand(0.9)], [hand(0.1)])
    scores = FoundHand(detector, "digest", FeatureCache(), in_place=True).scores(generated, target, samples)
    assert scores[:2].tolist() == [100, 0] and math.isnan(scores[2])


def test_the_folder_of_the_two_models_opens_it(frames, tmp_path, monkeypatch):
    for name in (PALM, LANDMARKS):
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setattr(hands, "load_model", lambda path: path.read_bytes())
    found, missing = open_metrics(["hand_detector", "hand_place"], {"hand_detector": tmp_path})
    assert not missing and [metric.name for metric in found] == ["hand_detector", "hand_place"]
    assert found[0].detector is found[1].detector and len(found[0].weights["hand_detector"]) == 12


def test_a_folder_without_the_models_is_named_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m examples.kitchen.hand_detector --output-dir"):
        open_metrics(["hand_detector"], {"hand_detector": tmp_path})


def test_no_frame_is_decoded_twice(frames, monkeypatch):
    generated, _, samples = (part[:2] for part in frames)
    metric = FoundHand(Detector([hand(1.0)], []), "digest", FeatureCache(), in_place=False)
    first = metric.scores(generated, generated, samples)
    monkeypatch.setattr(Frame, "image", property(lambda _: pytest.fail("read again")))
    np.testing.assert_array_equal(metric.scores(generated, generated, samples), first)
