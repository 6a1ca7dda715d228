"""CLIP: cosine of the image features of generated and true frame, and of a generated frame with the action's words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lego_pipeline.data.shards import content_key, model_key
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, Parity, Sample
from lego_pipeline.evaluation.metrics.egovlp import cosine


class ClipImage:
    """Cosine of CLIP's projected image features of generated and true frame, in %.

    Default: the whole frame squeezed to the model's square, bicubic with antialiasing. `parity="paper"`: without
    antialiasing and without clamping. (CLIP's authors cut out the middle square instead, which the released code
    doesn't, and which would lose hands at the sides.)

    Args:
        model: a transformers `CLIPModel`.
        digest: key of its weights.
        parity: mode.
        cache: of features; also tells device and batch size.

    Source: `BolinLai/LEGO: metrics/all_metrics_in_one.py` (`clip_image_sim`), ViT-L/14.
    """

    name, title, higher_is_better, unit = "clip", "CLIP", True, "%"
    reads: tuple[str, ...] = ("target",)

    def __init__(self, model: Any, digest: str, parity: Parity, cache: FeatureCache):
        self.model, self.parity, self.cache = model, parity, cache
        self.weights: Mapping[str, str] = {"clip": digest}
        self.size = model.config.vision_config.image_size
        how = "without antialiasing" if parity else "with antialiasing"
        self.definition = f"cosine of CLIP's image features, whole frame resized to {self.size} px bicubic {how}"

    def features(self, frames: Sequence[Frame]) -> np.ndarray:
        """(N, D), not normalised."""
        keys = [content_key("clip", self.parity, self.weights["clip"], frame.digest) for frame in frames]
        answers = self.cache.answers(keys, lambda indices: self._compute([frames[i] for i in indices]), "CLIP")
        return np.stack(answers)

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        return 100 * cosine(self.features(generated), self.features(target))

    @torch.no_grad()
    def _compute(self, frames: Sequence[Frame]) -> np.ndarray:
        view = preprocess.squeezed_without_antialiasing if self.parity else preprocess.whole_frame
        pixels = torch.cat([view(preprocess.unit_tensor(frame.image), self.size) for frame in frames])
        pixels = preprocess.normalised(pixels, preprocess.CLIP).to(self.cache.device)
        return self.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu().numpy()


class ClipText:
    """Cosine of CLIP's features of the generated frame and of the action's label, in %.

    Not in the paper: it needs no true frame, and can be asked about another verb or noun. Pictures are seen as by
    `ClipImage` in the same mode.

    Args:
        image: whose model and features are used.
        tokenizer: of the model.

    Source: Hessel et al., "CLIPScore", EMNLP 2021, without its factor 2.5 and its cut at zero.
    """

    name, title, higher_is_better, unit = "clip_text", "CLIP text", True, "%"
    reads: tuple[str, ...] = ("action",)

    def __init__(self, image: ClipImage, tokenizer: Any):
        self.image, self.tokenizer = image, tokenizer
        self.weights: Mapping[str, str] = image.weights
        self.definition = (
            "cosine of CLIP's features of the generated frame and of the action's label (not in the paper)"
        )

    def features(self, frames: Sequence[Frame]) -> np.ndarray:
        """(N, D) of the pictures, not normalised."""
        return self.image.features(frames)

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        texts = [sample.action for sample in samples]
        keys = [content_key("clip text", self.weights["clip"], text) for text in texts]
        cache = self.image.cache
        answers = cache.answers(keys, lambda indices: self._compute([texts[i] for i in indices]), "CLIP text")
        return 100 * cosine(self.features(generated), np.stack(answers))

    @torch.no_grad()
    def _compute(self, texts: Sequence[str]) -> np.ndarray:
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self.image.model.config.text_config.max_position_embeddings,
            truncation=True, return_tensors="pt"
        ).to(self.image.cache.device)  # fmt: skip
        return self.image.model.get_text_features(**tokens).pooler_output.float().cpu().numpy()


def load_clip(place: str) -> tuple[Any, str]:
    """A CLIP model in evaluation mode, float32, and the key of its weights.

    Args:
        place: folder, or name on the model hub, as transformers reads it.

    Raises:
        ValueError: there is none.
    """
    from transformers import CLIPModel

    try:
        model = CLIPModel.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise _no_clip(place, error) from error
    return model, model_key(model)[:12]


def load_tokenizer(place: str) -> Any:
    """The tokenizer of a CLIP model.

    Raises:
        ValueError: there is none.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise _no_clip(place, error) from error


def _no_clip(place: str, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or ["unreadable"])[0]
    return ValueError(
        f"`clip` must be a folder with a CLIP model and its tokenizer, or a hub name that can be reached, got {place} "
        f"({reason}); pass the folder."
    )
