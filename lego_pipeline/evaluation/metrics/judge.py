"""The kitchen's judge as a metric: does a network that knows thirty actions name the asked one?"""

from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import torch
from torch.nn import functional

from lego_pipeline.data.shards import content_key, model_key
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.judge import Judge
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, Sample


class KitchenJudge:
    """Share of frames, in %, of which the judge names the asked action (or verb, or noun).

    It reads (input frame, generated frame). It knows the embedded rendered kitchen and nothing else: on photographs
    its answer means nothing. An action, verb or noun that it doesn't know has no answer (NaN). Not in the paper; the
    same in both modes.

    Args:
        judge: of `lego_pipeline.evaluation.judge`.
        question: "action", "verb" or "noun", each from an output of its own.
        cache: of answers; also tells device and batch size.
    """

    higher_is_better, unit = True, "%"
    reads: tuple[str, ...] = ("start", "action")

    def __init__(self, judge: Judge, question: str, cache: FeatureCache):
        self.name = "judge" if question == "action" else f"judge_{question}"
        self.title = f"judge: {question}"
        self.judge, self.question, self.cache = judge, question, cache
        self.weights: Mapping[str, str] = {"judge": model_key(judge)[:12]}
        self.definition = (
            f"share of frames of which the judge of the rendered kitchen names the asked {question} (means nothing on "
            "photographs; not in the paper)"
        )

    def features(self, frames: Sequence[Frame]) -> np.ndarray:
        """(N, A + 1) probabilities of the judge's actions, in the order of `judge.actions`."""
        return self._answers(frames)[:, : len(self.judge.actions)]

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        answers = self._answers(generated)
        if self.question == "action":
            names, chosen = self.judge.actions, answers[:, :-2].argmax(1)
        else:
            names = self.judge.verbs if self.question == "verb" else self.judge.nouns
            chosen = answers[:, -2 if self.question == "verb" else -1].astype(int)
        asked = [getattr(sample, self.question) for sample in samples]
        right = [names[answer] == name for answer, name in zip(chosen, asked, strict=True)]
        return np.where([name in names for name in asked], 100.0 * np.array(right, bool), np.nan)

    def _answers(self, frames: Sequence[Frame]) -> np.ndarray:
        """(N, A + 3): probabilities of the actions, then numbers of the verb and the noun."""
        if any(frame.start_digest is None for frame in frames):
            raise ValueError("`generated` must have the input frame for the judge; pass `start` to each Frame.")
        keys = [content_key("judge", self.weights["judge"], frame.digest, frame.start_digest) for frame in frames]
        answers = self.cache.answers(keys, lambda indices: self._compute([frames[i] for i in indices]), "judge")
        return np.stack(answers)

    def _compute(self, frames: Sequence[Frame]) -> np.ndarray:
        before = torch.cat([self._view(frame.start) for frame in frames])
        after = torch.cat([self._view(frame.image) for frame in frames])
        judge = self.judge
        return np.array(
            [[*reading.probabilities.values(), judge.verbs.index(reading.verb), judge.nouns.index(reading.noun)]
             for reading in judge.read(before, after)], np.float32
        )  # fmt: skip

    def _view(self, image: PIL.Image.Image | None) -> torch.Tensor:
        """(1, 3, S, S) in [-1, 1], resized as the judge itself does it."""
        assert image is not None  # see `_answers`
        picture, size = preprocess.unit_tensor(image), self.judge.size
        if picture.shape[-2:] != (size, size):
            picture = functional.interpolate(picture, (size, size), mode="bilinear", antialias=True)
        return picture * 2 - 1
