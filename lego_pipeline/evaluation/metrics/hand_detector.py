"""Hands found by a detector that learnt from photographs of real hands, in generated and in true frames."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lego_pipeline.data.shards import content_key
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.hands import FOUND, Hand, HandDetector, best_presence, in_same_place
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, Sample


class FoundHand:
    """Share of frames, in %, in which the detector finds a hand; in the true frame's place, if `in_place`.

    Without `in_place` no true frame is read. With it, a pair in whose true frame no hand is found has no answer (NaN);
    a hand is in place if its box overlaps with one of the true frame's by 0.3 or more. Not in the paper; the same in
    both modes. It says whether there is a plausible hand, not whether the hand does the right thing.

    Args:
        detector, digest: the detector and the key of its files.
        cache: of the hands that were found.
        in_place: see above.

    Source: `lego_pipeline.evaluation.hands`.
    """

    higher_is_better, unit = True, "%"

    def __init__(self, detector: HandDetector, digest: str, cache: FeatureCache, *, in_place: bool):
        self.name, self.title = ("hand_place", "hand in place") if in_place else ("hand_detector", "hand found")
        self.reads: tuple[str, ...] = ("target",) if in_place else ()
        self.detector, self.cache, self.in_place = detector, cache, in_place
        self.weights: Mapping[str, str] = {"hand_detector": digest}
        where = " where it finds one in the true frame" if in_place else ""
        self.definition = (
            f"share of frames in which MediaPipe's detector finds a hand{where}, probability above {FOUND} "
            "(not in the paper)"
        )

    def features(self, frames: Sequence[Frame]) -> None:
        return None

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        found = self.hands(generated)
        if not self.in_place:
            return np.array([100.0 * (best_presence(hands) > FOUND) for hands in found])
        wanted = self.hands(target)
        return 100 * np.array([in_same_place(*pair) for pair in zip(found, wanted, strict=True)], float)

    def hands(self, frames: Sequence[Frame]) -> list[list[Hand]]:
        """The hands of each frame, the likeliest first."""
        keys = [content_key("hands", self.weights["hand_detector"], frame.digest) for frame in frames]
        answers = self.cache.answers(keys, lambda indices: [self._compute(frames[i]) for i in indices], "hands")
        return [[Hand(palm, (x0, y0, x1, y1), presence, right)
                 for palm, x0, y0, x1, y1, presence, right in answer.tolist()] for answer in answers]  # fmt: skip

    def _compute(self, frame: Frame) -> np.ndarray:
        """(K, 7): palm, x0, y0, x1, y1, presence, right of K hands."""
        hands = self.detector.read_frame(preprocess.unit_tensor(frame.image)[0])
        rows = [[hand.palm, *hand.box, hand.presence, hand.right] for hand in hands]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 7).numpy()
