"""The stage from a frame and an action to description and embeddings, with or without a cache.

`LegoPipeline.enhance` and `train/cache_embeddings.py` both come here, so that one cache serves pipeline, command line
and training. With a cache the VLM's language side always reads the frame's states as they are stored: an answer is
the same whether its frame was seen before or not. The descriptions of a cache depend on frame, question, VLM and
sampling settings alone; the generators of a call have no part in them.

Letters: B samples, N_i VLM image tokens, K width of a frame's states, T VLM text states, D VLM width.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import PIL.Image
import torch

from lego_pipeline.data.embedding_cache import EmbeddingCache, Recipe, sampling_seed
from lego_pipeline.data.shards import content_key, model_key, pixel_key
from lego_pipeline.vlm import Enhancement, family_of
from lego_pipeline.vlm.base import ask, base_model

PROBES = 8  # values of each weight by which a change is noticed without hashing all of them
# Neither weights nor meaning: where a model comes from, which class reads its images, what it computes in.
IGNORED = {"_attn_implementation", "_from_model_config", "_name_or_path", "architectures", "attn_implementation",
           "auto_map", "base_model_name_or_path", "dtype", "image_processor_type", "inference_mode", "peft_version",
           "processor_class", "revision", "torch_dtype", "transformers_version", "use_cache"}  # fmt: skip

_weight_keys: WeakKeyDictionary[torch.nn.Module, tuple[str, dict[str, str]]] = WeakKeyDictionary()


def enhance(
    vlm: Any,
    processor: Any,
    images: Sequence[PIL.Image.Image],
    actions: Sequence[str] | None,
    descriptions: Sequence[str] | None = None,
    *,
    question_template: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    generators: Sequence[torch.Generator | None] | None = None,
    cache: EmbeddingCache | None = None,
) -> list[Enhancement]:
    """Describes and embeds frames.

    Args:
        vlm, processor: of a family in `VLM_FAMILIES`. With `vlm=None` everything has to be in the cache.
        images: B upright RGB frames.
        actions: B labels; None if descriptions are given, which then stand in for them in the question.
        descriptions: B given descriptions; None to have them sampled.
        question_template, max_new_tokens, temperature, top_k: of question and sampling.
        generators: one per sample, for sampling without a cache.
        cache: what it lacks is added to it and written.

    Returns:
        B enhancements: on the VLM's device without a cache, float32 on the CPU with one.

    Raises:
        ValueError: without a VLM, a frame and action that the cache lacks.
    """
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
    if cache is None:
        family = family_of(vlm)
        questions = [ask(question_template, text) for text in actions or descriptions or ()]
        if descriptions is None:
            descriptions = family.generate(vlm, processor, images, questions, generators=generators, **settings)
        return family.embed(vlm, processor, images, questions, descriptions)
    if vlm is None:
        return _read(cache, images, actions, descriptions)
    recipe = make_recipe(vlm, processor, question_template=question_template, **settings)
    keys = fill_cache(vlm, processor, cache, recipe, images, actions, descriptions)
    cache.write()
    return [cache.enhancement(frame, text, recipe) for frame, text in keys]


@torch.no_grad()
def fill_cache(
    vlm: Any,
    processor: Any,
    cache: EmbeddingCache,
    recipe: Recipe,
    images: Sequence[PIL.Image.Image],
    actions: Sequence[str] | None,
    descriptions: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """Adds to a cache what it lacks of some frames and actions, in one batch; whole shards are written.

    Frames that are there cost no vision work, texts that are there no work of the VLM at all.

    Args:
        vlm, processor: that the recipe was made from.
        cache: to be filled; `cache.write()` afterwards writes the rest.
        recipe: of `make_recipe`.
        images, actions, descriptions: as for `enhance`.

    Returns:
        B pairs of the keys of the frame entry and the text entry.
    """
    labels = actions or [None] * len(images)
    given = descriptions or [None] * len(images)
    pixels = [pixel_key(image) for image in images]
    keys = [
        (recipe.frame_key(frame), recipe.text_key(frame, label, text))
        for frame, label, text in zip(pixels, labels, given, strict=True)
    ]
    if any(key not in cache for pair in keys for key in pair):
        cache.refresh()  # another process may have added it
    new_frames = {frame: i for i, (frame, _) in enumerate(keys) if frame not in cache}
    new_texts = {text: i for i, (_, text) in enumerate(keys) if text not in cache}
    if new_frames or new_texts:
        cache.add_recipe(recipe, vlm)
    family = family_of(vlm)
    if new_frames:
        states = family.frame_states(vlm, processor, [images[i] for i in new_frames.values()])
        for key, frame_states in zip(new_frames, states, strict=True):
            cache.add_frame(key, frame_states)
    if new_texts:
        rows = list(new_texts.values())
        pictures = [images[i] for i in rows]
        questions = [ask(recipe.question_template, labels[i] or given[i] or "") for i in rows]
        states = [cache.frame_states(keys[i][0]) for i in rows]
        if descriptions is None:
            texts = family.generate(
                vlm,
                processor,
                pictures,
                questions,
                max_new_tokens=recipe.max_new_tokens,
                temperature=recipe.temperature,
                top_k=recipe.top_k,
                generators=[torch.Generator().manual_seed(sampling_seed(key)) for key in new_texts],
                frame_states=states,
            )
        else:
            texts = [descriptions[i] for i in rows]
        enhancements = family.embed(vlm, processor, pictures, questions, texts, frame_states=states)
        for key, enhancement in zip(new_texts, enhancements, strict=True):
            cache.add_text(key, enhancement.description, enhancement.text_embeds)
    return keys


def make_recipe(vlm: Any, processor: Any, **settings: Any) -> Recipe:
    """The recipe of a VLM and some settings.

    The weights are hashed once per VLM, and again when a probe of them or torch's count of their changes differs.
    That takes a second for 1.7 GB of them as float32, on one thread.

    Args:
        vlm: with or without adapters of peft.
        processor: of the VLM.
        **settings: fields of `Recipe` that are no keys: question_template, max_new_tokens, temperature, ...

    Raises:
        ValueError: the VLM's projector is quantized, which a cache couldn't keep.
    """
    family = family_of(vlm)
    if not all(weight.is_floating_point() for weight in family.connector(vlm).parameters()):
        raise ValueError(
            "`vlm` must have a projector of floats where there is a cache, got a quantized one; load it with "
            "`lego_pipeline.vlm.tuning.load_in_4_bits`, which quantizes the language model only, or use no cache."
        )
    num_image_tokens, dim = family.sizes(vlm, processor)
    weights = _keys_of_weights(vlm, "vlm", "vision", "connector")
    facts = _facts(vlm, processor)
    vision = {name: value for name, value in facts["config"].items() if name != "text_config"}
    return Recipe(
        family=base_model(vlm).config.model_type,
        vlm_key=content_key(weights["vlm"], facts),
        vision_key=content_key(weights["vision"], vision, facts["images"]),
        connector_key=content_key(weights["connector"], family.connector_settings(vlm)),
        num_image_tokens=num_image_tokens,
        vlm_dim=dim,
        vlm_id=vlm_id(vlm, processor),
        **settings,
    )


def vlm_id(vlm: Any, processor: Any) -> str | None:
    """32 hex digits for a VLM: its weights, settings, vocabulary and chat template, whatever it computes in.

    A checkpoint keeps the id of the VLM that it was trained with, an enhancement that of the VLM that made it. Weights
    count by their values as bfloat16, so that a VLM has one id in single precision and in bfloat16. Half precision,
    quantization and adapters that aren't merged change the values otherwise, and such a VLM has no id.

    Args:
        vlm: with its processor; hashed once, see `make_recipe`.

    Returns:
        The id, or None.
    """
    is_plain = all(weight.dtype in (torch.float32, torch.bfloat16) for weight in vlm.parameters())
    if not is_plain or getattr(vlm, "peft_config", None):
        return None
    return content_key(_keys_of_weights(vlm, "rounded")["rounded"], _facts(vlm, processor))


def _facts(vlm: Any, processor: Any) -> dict[str, Any]:
    """What a VLM's answers depend on beside its weights and the question."""
    tokenizer = processor.tokenizer
    return {
        "config": _config(base_model(vlm).config),
        "generation": _meaning(base_model(vlm).generation_config.to_diff_dict()),
        "adapters": {name: _meaning(adapter.to_dict()) for name, adapter in getattr(vlm, "peft_config", {}).items()},
        "active": list(getattr(vlm, "active_adapters", [])) if hasattr(vlm, "peft_config") else [],
        "images": _meaning(processor.image_processor.to_dict()),
        "template": processor.chat_template or tokenizer.chat_template,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "end": tokenizer.eos_token_id,
    }


def _read(
    cache: EmbeddingCache,
    images: Sequence[PIL.Image.Image],
    actions: Sequence[str] | None,
    descriptions: Sequence[str] | None,
) -> list[Enhancement]:
    """Enhancements that a cache holds, by its only recipe or the one that it was opened with."""
    labels, given = actions or [None] * len(images), descriptions or [None] * len(images)
    found = []
    for image, label, text in zip(images, labels, given, strict=True):
        enhancement = cache.lookup(image, label, description=text)
        if enhancement is None:
            raise ValueError(
                f"`cache` must hold the frame with the action {label or text!r} where there is no VLM, but "
                f"{cache.folder} lacks it; load the pipeline with its VLM, or fill the cache with "
                "`train/cache_embeddings.py`."
            )
        found.append(enhancement)
    return found


def _keys_of_weights(vlm: Any, *names: str) -> dict[str, str]:
    """Keys of weights: of all of them as they are or rounded to bfloat16, of the vision side's, of the projector's."""
    state, family = _fingerprint(vlm), family_of(vlm)
    if vlm not in _weight_keys or _weight_keys[vlm][0] != state:
        _weight_keys[vlm] = (state, {})
    keys = _weight_keys[vlm][1]
    parts = {"vlm": vlm, "rounded": vlm, "vision": family.vision_modules(vlm), "connector": family.connector(vlm)}
    for name in names:
        if name not in keys:
            keys[name] = model_key(parts[name], precision=torch.bfloat16 if name == "rounded" else torch.float32)
    return keys


def _fingerprint(model: torch.nn.Module) -> str:
    """Changes with every in-place change that torch counts, and with most others: a few values of each weight."""
    facts = []
    for tensor in (*model.parameters(), *model.buffers()):
        version = 0 if tensor.is_inference() else tensor._version
        step = max(1, tensor.numel() // PROBES)
        probe = [] if tensor.is_meta else tensor.detach().reshape(-1)[::step].tolist()
        facts.append((list(tensor.shape), version, probe))
    return content_key(facts)


def _config(config: Any) -> dict[str, Any]:
    """A model's settings that differ from their defaults: what a later version of a library adds is not among them."""
    parts = {name: _config(getattr(config, name)) for name in config.sub_configs if getattr(config, name, None)}
    defaults = type(config)().to_dict()
    own = {name: value for name, value in config.to_dict().items() if name not in parts}
    differing = {name: value for name, value in own.items() if name not in defaults or value != defaults[name]}
    return {**_meaning(differing), **parts, "model_type": config.model_type}


def _meaning(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what changes nothing in the result, as JSON has them; None counts as absent."""
    kept = {str(name): value for name, value in settings.items() if name not in IGNORED and value is not None}
    return {name: _plain(value) for name, value in kept.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return _meaning(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value if isinstance(value, (str, int, float, bool)) else str(value)
