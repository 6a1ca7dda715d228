"""BLIP-B and BLIP-L: a caption of the generated frame is compared with a text, by EgoVLP's text tower."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lego_pipeline.convert.checkpoint import read_tensors
from lego_pipeline.data.shards import content_key, model_key
from lego_pipeline.evaluation.features import FeatureCache
from lego_pipeline.evaluation.metrics import preprocess
from lego_pipeline.evaluation.metrics.base import Frame, Parity, Sample
from lego_pipeline.evaluation.metrics.egovlp import TextSimilarity, cosine

PROMPT = "a picture of "
NUM_BEAMS, LONGEST, SHORTEST = 3, 20, 5  # tokens with the prompt
RELEASED_BATCH, RELEASED_SEED = 30, 42
DROPOUT = 0.1  # of the text decoder, and of the large image encoder's last blocks, where it rises from 0
LARGE_WIDTH = 1024  # of the image encoder that has stochastic depth
BEGIN, SEPARATOR, PADDING = 30522, 102, 0  # BLIP's own token [DEC], and BERT's

# Names in Salesforce's files -> transformers'; the text decoder's are the same.
RENAMED = (
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"(layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"(layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"(layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
)


class BlipCaption:
    """Cosine of EgoVLP's text features of BLIP's caption of the generated frame and of a reference text, in %.

    Default: captions by the network in evaluation mode, so that one depends on its frame alone; the reference is the
    manifest's description, or the action's label where there is none. `parity="paper"`: dropout (0.1 in the text
    decoder, stochastic depth in the large image encoder) is left on, so captions depend on seed, batches of 30 and
    order, as in the release (which drew on another device: they are alike in kind, not word for word); the reference
    is the text that the generator was given, which is the VLM's own; the prompt lacks its blank, so captions start
    with one, which the text tower doesn't see. Where no such text is known, as for the rows beside the systems, the
    reference is that of the default, so these are not asked quite the same.

    Args:
        name: "blip_b" or "blip_l".
        model: a transformers `BlipForConditionalGeneration`.
        tokenizer: BERT's, uncased.
        texts: compares texts.
        parity: mode.
        cache: of captions; also tells device and batch size.

    Source: Lai et al., ECCV 2024, section 5.1; Li et al., "BLIP", ICML 2022; `BolinLai/LEGO:
    metrics/all_metrics_in_one.py`.
    """

    higher_is_better, unit = True, "%"
    reads: tuple[str, ...] = ("action", "description")

    def __init__(
        self, name: str, model: Any, tokenizer: Any, texts: TextSimilarity, parity: Parity, cache: FeatureCache
    ):
        self.name, self.title = name, {"blip_b": "BLIP-B", "blip_l": "BLIP-L"}[name]
        self.model, self.tokenizer, self.texts, self.parity, self.cache = model, tokenizer, texts, parity, cache
        self.weights: Mapping[str, str] = {name: model_key(model)[:12], "egovlp": texts.digest}
        reference = (
            "the generator's own prompt, where none is known the manifest's description or the label; dropout on"
            if parity
            else "the manifest's description, else the label"
        )
        self.definition = f"cosine of EgoVLP's text features of BLIP's caption and of {reference}"
        if parity:
            set_dropout(model)

    def features(self, frames: Sequence[Frame]) -> np.ndarray:
        """(N, E) of the captions, not normalised."""
        return self.texts.features(self.captions(frames))

    def scores(self, generated: Sequence[Frame], target: Sequence[Frame], samples: Sequence[Sample]) -> np.ndarray:
        return 100 * cosine(
            self.features(generated), self.texts.features([self._reference(sample) for sample in samples])
        )

    def captions(self, frames: Sequence[Frame]) -> list[str]:
        """The captions of N frames without the prompt's words; in `parity="paper"` each starts with a blank."""
        facts = (self.name, self.parity, self.weights[self.name])
        digests = [frame.digest for frame in frames]
        if self.parity:  # a caption depends on its place among all
            facts = (*facts, content_key(digests))
            keys = [content_key(*facts, i) for i in range(len(digests))]
        else:
            keys = [content_key(*facts, digest) for digest in digests]
        size = RELEASED_BATCH if self.parity else None
        answers = self.cache.answers(keys, lambda indices: self._compute(frames, indices), self.title, size)
        return [answer.tobytes().decode() for answer in answers]

    def _reference(self, sample: Sample) -> str:
        return (self.parity and sample.prompt) or sample.description or sample.action

    @torch.no_grad()
    def _compute(self, frames: Sequence[Frame], indices: Sequence[int]) -> list[np.ndarray]:
        size = self.model.config.vision_config.image_size
        pixels = torch.cat([preprocess.squeezed_by_pillow(frames[i].image, size) for i in indices])
        pixels = preprocess.normalised(pixels, preprocess.CLIP).to(self.cache.device)
        prompt = self.tokenizer(PROMPT, return_tensors="pt").input_ids.to(self.cache.device)
        # Seeded by the batch, so that a run that was stopped goes on as it would have.
        with torch.random.fork_rng(enabled=bool(self.parity)):
            if self.parity:
                torch.manual_seed(RELEASED_SEED + indices[0] // RELEASED_BATCH)
            tokens = self.model.generate(
                pixels, prompt.repeat(len(pixels), 1), num_beams=NUM_BEAMS, max_length=LONGEST, min_length=SHORTEST
            )
        whole = self.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        captions = [caption[len(PROMPT.strip()) :] for caption in whole]
        if not self.parity:
            captions = [caption.strip() for caption in captions]
        return [np.frombuffer(caption.encode(), np.uint8).copy() for caption in captions]


def set_dropout(model: Any) -> None:
    """Puts BLIP into the training mode of the release: dropout in the text decoder, and in the large image encoder
    stochastic depth, which rises linearly to 0.1 over the blocks."""
    from timm.layers import DropPath

    model.train()
    for module in model.text_decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = DROPOUT
    if model.config.vision_config.hidden_size == LARGE_WIDTH:
        layers = model.vision_model.encoder.layers
        for layer, share in zip(layers, np.linspace(0, DROPOUT, len(layers)).tolist(), strict=True):
            drop = DropPath(share)
            layer.mlp.register_forward_hook(lambda *call, drop=drop: drop(call[2]))
            layer.self_attn.register_forward_hook(lambda *call, drop=drop: (drop(call[2][0]), *call[2][1:]))


def load_blip(name: str, place: str) -> Any:
    """BLIP for captions in evaluation mode, float32.

    Args:
        name: of the weights, for messages.
        place: a file of Salesforce's (`model_base_caption_capfilt_large.pth`, `model_large_caption.pth`), a folder of
            transformers, or a name on the model hub.

    Raises:
        ValueError: it is none of these, damaged, or of another network.
    """
    from transformers import BlipForConditionalGeneration

    if Path(place).is_file():
        return _load_file(name, Path(place)).eval().requires_grad_(False)
    try:
        return BlipForConditionalGeneration.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise ValueError(
            f"`{name}` must be a file of BLIP captioning, a folder, or a hub name that can be reached, got {place} "
            f"({reason}); pass the file or the folder."
        ) from error


def _load_file(name: str, path: Path) -> Any:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    state = {new_name(key): value.float() if value.is_floating_point() else value
             for key, value in read_tensors(path).items()}  # fmt: skip
    state.pop("text_decoder.bert.embeddings.position_ids", None)
    try:
        width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
        places = state["vision_model.embeddings.position_embedding"].shape[1] - 1
        vocabulary, text_width = state["text_decoder.bert.embeddings.word_embeddings.weight"].shape
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_count(state, r"vision_model\.encoder\.layers\.(\d+)\."),
            num_attention_heads=width // 64,
            image_size=round(places**0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=state["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_count(state, r"text_decoder\.bert\.encoder\.layer\.(\d+)\."),
            num_attention_heads=text_width // 64,
            max_position_embeddings=state["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
            bos_token_id=BEGIN,
            sep_token_id=SEPARATOR,
            pad_token_id=PADDING,
        )
        model = BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"`{name}` must be a file of BLIP captioning in Salesforce's layout, got {path} ({reason}); pass "
            "model_base_caption_capfilt_large.pth or model_large_caption.pth of bolinlai/LEGO-Metrics."
        ) from error
    return model


def new_name(name: str) -> str:
    """transformers' name of a weight in Salesforce's files."""
    for old, new in RENAMED:
        name = re.sub(old, new, name)
    return name


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})
