"""Checks of what callers pass to the pipeline, each with an error that says what to do.

`check_call` is the whole list for `LegoPipeline.__call__`; the functions after it check single values.

Letters: B samples, N = B * images per sample.
"""

import warnings
from collections.abc import Sequence
from typing import Any, overload

import torch

from lego_pipeline import guidance, images
from lego_pipeline.vlm.base import Enhancement

OUTPUT_SIZES = ("input", "model")


def check_call(
    pipe: Any,
    frames: list[images.Frame] | None,
    *,
    action: Any,
    description: Any,
    enhancement: Any,
    height: Any,
    width: Any,
    num_inference_steps: Any,
    guidance_scale: Any,
    image_guidance_scale: Any,
    guidance_interval: Any,
    keep_scene: Any,
    negative_prompt: Any,
    num_images_per_prompt: Any,
    generator: Any,
    latents: Any,
    prompt_embeds: Any,
    negative_prompt_embeds: Any,
    output_size: Any,
    output_type: Any,
    callback_on_step_end_tensor_inputs: Any,
    image_latents: Any,
) -> list[tuple[int, int]]:
    """All checks of `LegoPipeline.__call__`, before any model runs.

    Args:
        pipe: the pipeline; its components' configs say what fits.
        frames: from `images.to_frames`, or None; the other arguments are those of the call.

    Returns:
        (height, width) in pixels at which the model works, for each of the B samples.

    Raises:
        TypeError, ValueError: naming the argument, its rule, what came, and what to do.
    """
    # Which sources of the condition go together
    given = {"enhancement": enhancement, "description": description, "prompt_embeds": prompt_embeds}
    names = [name for name, value in given.items() if value is not None]
    if action is not None and "description" not in names:
        names.append("action")
    if len(names) != 1:
        raise ValueError(
            "one source of the condition must be given: `action`, `description` (with or without `action`), "
            f"`enhancement` or `prompt_embeds`; got {', '.join(f'`{n}`' for n in names) or 'none of them'}."
        )
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("`negative_prompt` and `negative_prompt_embeds` must not both be given; pass one.")
    check_texts("action", action)
    check_texts("description", description)
    check_texts("negative_prompt", negative_prompt, may_be_empty=True)

    # Numbers and choices
    check_count("num_inference_steps", num_inference_steps)
    check_count("num_images_per_prompt", num_images_per_prompt)
    check_interval("guidance_interval", guidance_interval)
    check_keep_scene(keep_scene)
    check_choice("output_size", output_size, OUTPUT_SIZES)
    check_choice("output_type", output_type, images.OUTPUT_TYPES)
    for name in callback_on_step_end_tensor_inputs:
        check_choice("callback_on_step_end_tensor_inputs", name, pipe._callback_tensor_inputs)
    for name, value in {"height": height, "width": width}.items():
        if value is not None:
            check_count(name, value)
            if value % pipe.vae_scale_factor or image_latents is not None:
                raise ValueError(
                    f"`{name}` must be a multiple of {pipe.vae_scale_factor} and can't be given with "
                    f"`image_latents`, got {value}; leave it out to work at the checkpoint's own area."
                )

    # Tensors
    check_enhancements(enhancement, pipe.projector.config)
    for name, value in {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}.items():
        if value is not None:
            shape = ("B", "L", pipe.unet.config.cross_attention_dim)
            check_tensor(name, value, shape, "pass a whole sequence such as `encode_condition` gives")
    if image_latents is not None:
        shape = ("B", pipe.vae.config.latent_channels, "h", "w")
        check_tensor("image_latents", image_latents, shape, "pass what `encode_image` gives")

    # Number of samples
    batch_size = batch_size_of(
        image=frames,
        action=as_list(action),
        description=as_list(description),
        enhancement=as_list(enhancement),
        negative_prompt=as_list(negative_prompt),
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        image_latents=image_latents,
    )
    num_images = batch_size * num_images_per_prompt
    guidance.check_scale("guidance_scale", guidance_scale, batch_size)
    guidance.check_scale("image_guidance_scale", image_guidance_scale, batch_size)
    check_generator(generator, num_images)

    # The image side
    needs_vlm = pipe.vlm is not None and prompt_embeds is None and enhancement is None
    if frames is None and (image_latents is None or needs_vlm):
        what = "a frame for the VLM to look at" if needs_vlm else "a frame, or None together with `image_latents`"
        raise ValueError(f"`image` must be {what}, got None; pass a PIL image.")
    sizes = _model_sizes(pipe, frames, height, width, image_latents, batch_size)
    if latents is not None:
        factor, channels = pipe.vae_scale_factor, pipe.vae.config.latent_channels
        if len(set(sizes)) > 1:
            raise ValueError(
                f"`latents` must be for frames of one model size, got {sorted(set(sizes))}; call once per size."
            )
        shape = (num_images, channels, sizes[0][0] // factor, sizes[0][1] // factor)
        check_tensor("latents", latents, shape, "pass noise of that size, or leave it out")
    if output_type != "pil":
        resized = frames is not None and output_size == "input" and output_type != "latent"
        results = [images.frame_size(frame) for frame in frames or []] if resized else sizes
        if len(set(results)) > 1:
            described = [f"{width}x{height}" for height, width in sorted(set(results))]
            raise ValueError(images.different_sizes(output_type, described))

    # The null condition
    passes = guidance.needed_passes(guidance_scale, image_guidance_scale)
    if passes == ("C",):
        if negative_prompt is not None or negative_prompt_embeds is not None:
            warnings.warn(
                "The negative prompt has no effect, as `guidance_scale` and `image_guidance_scale` are 1.",
                stacklevel=3,
            )
    else:
        own = condition_length(pipe)
        length = own if prompt_embeds is None else prompt_embeds.shape[1]
        null_length = own if negative_prompt_embeds is None else negative_prompt_embeds.shape[1]
        if length != null_length:
            raise ValueError(
                "`prompt_embeds` and `negative_prompt_embeds` must have one length, got "
                f"{length} and {null_length} tokens (this checkpoint's own have {own}); pass both."
            )

    # Components
    channels = pipe.vae.config.latent_channels
    if pipe.unet.config.in_channels != 2 * channels:
        raise ValueError(
            f"`unet` must take {2 * channels} channels, noisy latents and the frame's, got a UNet for "
            f"{pipe.unet.config.in_channels}; use the UNet of a LegoPipeline or of InstructPix2Pix."
        )
    if not hasattr(pipe.scheduler, "scale_model_input"):
        raise ValueError(
            f"`scheduler` must be of the DDPM family, got {type(pipe.scheduler).__name__}; use for instance "
            "EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)."
        )
    return sizes


def condition_length(pipe: Any) -> int:
    """L, the tokens of the sequences that a pipeline's `encode_condition` makes."""
    return pipe.text_length + pipe.projector.config.num_image_tokens + pipe.projector.config.num_text_tokens


def warn_of_unknown_frames(statistics: dict[str, Any] | None, enhancements: Sequence[Enhancement]) -> None:
    """One warning if the VLM's features of a frame are far from those of the training frames.

    Args:
        statistics: `frame_statistics` of the pipeline; None warns never.
        enhancements: B, with `image_embeds` (N_i, D).
    """
    if statistics is None:
        return
    mean, scale = torch.tensor(statistics["mean"]), torch.tensor(statistics["scale"])
    features = torch.stack([item.image_embeds.float().mean(dim=0).cpu() for item in enhancements])  # (B, D)
    features = features @ torch.tensor(statistics["directions"]).T  # (B, K)
    distances = ((features - mean) / scale).square().mean(dim=1).tolist()  # B
    far = [i for i, distance in enumerate(distances) if distance > statistics["limit"]]
    if far:
        warnings.warn(
            f"This checkpoint has not seen frames like number {', '.join(map(str, far))} of this call: mean squared "
            f"z-score {max(distances):.3g}, at most {statistics['limit']:.3g} expected. Its results there mean "
            "nothing; use a checkpoint that was trained on such frames.",
            stacklevel=4,
        )


@overload
def as_list(value: None) -> None: ...
@overload
def as_list(value: str | Sequence[Any]) -> list[Any]: ...
@overload
def as_list(value: Any) -> list[Any] | None: ...
def as_list(value: Any) -> list[Any] | None:
    """A list as it is, None as it is, a single value as a list of one."""
    if value is None or isinstance(value, list):
        return value
    return list(value) if isinstance(value, tuple) else [value]


def batch_size_of(**values: Sequence[Any] | None) -> int:
    """Number of samples of a call: the one length above 1 of its lists, or 1. None counts for nothing.

    Raises:
        ValueError: two lists above length 1 differ, or one is empty.
    """
    lengths = {name: len(value) for name, value in values.items() if value is not None}
    described = ", ".join(f"`{name}` {length}" for name, length in lengths.items())
    if 0 in lengths.values() or len({length for length in lengths.values() if length > 1}) > 1:
        raise ValueError(
            f"lists of a call must have one common length, or 1, got {described}; pass one entry per sample."
        )
    return max(lengths.values(), default=1)


@overload
def expand(values: None, batch_size: int) -> None: ...
@overload
def expand(values: list[Any], batch_size: int) -> list[Any]: ...
def expand(values: list[Any] | None, batch_size: int) -> list[Any] | None:
    """One entry per sample: a list of one is repeated."""
    return values * batch_size if values is not None and len(values) == 1 else values


def check_texts(name: str, texts: Any, may_be_empty: bool = False) -> None:
    """Raises unless `texts` is None, a string or a list of strings with something in them."""
    for text in as_list(texts) or []:
        if not isinstance(text, str):
            raise TypeError(f"`{name}` must be a string or a list of strings, got {type(text).__name__}.")
        if not may_be_empty and not any(character.isalnum() for character in text):
            raise ValueError(f'`{name}` must say something, got {text!r}; pass for instance "open drawer".')


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer >= 1, got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_interval(name: str, value: Any) -> None:
    """Raises unless `value` is (start, end) with 0 <= start <= end <= 1."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not is_pair or not all(isinstance(part, (int, float)) for part in value) or not 0 <= value[0] <= value[1] <= 1:
        raise ValueError(
            f"`{name}` must be (start, end) with 0 <= start <= end <= 1, fractions of the steps, got {value!r}; "
            "(0.0, 1.0) guides every step."
        )


def check_keep_scene(value: Any) -> None:
    """Raises unless `value` is False or two thresholds, 0 <= first < second."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    if value is False or (
        is_pair and all(isinstance(part, (int, float)) for part in value) and 0 <= value[0] < value[1]
    ):
        return
    raise ValueError(
        f"`keep_scene` must be two thresholds of change, 0 <= first < second, or False, got {value!r}; "
        "the embedded checkpoint has (0.3, 0.6)."
    )


def check_tensor(name: str, value: Any, shape: Sequence[int | str], advice: str) -> None:
    """Raises unless `value` is a finite floating point tensor of the shape.

    Args:
        shape: sizes; a string stands for any size of at least 1 and names it in the message.
        advice: what to do, the end of the message.
    """
    expected = f"({', '.join(map(str, shape))})"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a float tensor {expected}, got {type(value).__name__}; {advice}.")
    fits = value.ndim == len(shape) and all(map(_fits, value.shape, shape))
    if not fits or not value.is_floating_point():
        raise ValueError(
            f"`{name}` must be a float tensor {expected}, got {tuple(value.shape)} of {value.dtype}; {advice}."
        )
    if not value.isfinite().all():
        count = int((~value.isfinite()).sum())
        raise ValueError(f"`{name}` must be finite, got {count} NaN or infinite values of {value.numel()}; {advice}.")


def check_generator(generator: Any, count: int) -> None:
    """Raises unless `generator` is None, a `torch.Generator` or a list of `count` of them."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    for item in generators:
        if item is not None and not isinstance(item, torch.Generator):
            raise TypeError(
                f"`generator` must be a torch.Generator or a list of them, got {type(item).__name__}; "
                "pass torch.Generator().manual_seed(seed)."
            )
    if generators is generator and (len(generators) != count or None in generators):
        raise ValueError(
            f"`generator` as a list must hold one torch.Generator per image ({count}), got {len(generators)} entries; "
            "count `num_images_per_prompt` as well."
        )


def check_enhancements(enhancements: Any, projector: Any) -> None:
    """Raises unless `enhancements` is None, an `Enhancement` or a list of them that fit a projector.

    Args:
        projector: config of a `LegoProjector`. Where it and an enhancement both know their VLM, it has to be one and
            the same; otherwise only the sizes are compared.
    """
    for item in as_list(enhancements) or []:
        if not isinstance(item, Enhancement):
            raise TypeError(
                f"`enhancement` must be an Enhancement or a list of them, got {type(item).__name__}; "
                "make one with `pipe.enhance` or `Enhancement.load`."
            )
        advice = "use the VLM that this checkpoint was trained with"
        shape = (projector["num_image_tokens"], projector["vlm_dim"])
        check_tensor("enhancement.image_embeds", item.image_embeds, shape, advice)
        check_tensor("enhancement.text_embeds", item.text_embeds, ("T", projector["vlm_dim"]), advice)
        if None not in (item.vlm_id, projector["vlm_id"]) and item.vlm_id != projector["vlm_id"]:
            raise ValueError(
                f"`enhancement` must be of the VLM that this checkpoint was trained with ({projector['vlm_id']}), got "
                f"one of another VLM of the same size ({item.vlm_id}); {advice}."
            )


def _fits(size: int, expected: int | str) -> bool:
    return size >= 1 if isinstance(expected, str) else size == expected


def _model_sizes(
    pipe: Any,
    frames: list[images.Frame] | None,
    height: int | None,
    width: int | None,
    image_latents: torch.Tensor | None,
    batch_size: int,
) -> list[tuple[int, int]]:
    factor = pipe.vae_scale_factor
    if image_latents is not None:
        return [(image_latents.shape[-2] * factor, image_latents.shape[-1] * factor)] * batch_size
    own = [images.frame_size(frame) for frame in frames or []]
    return expand(
        [images.model_size(*size, pipe.config.resolution, factor, height, width) for size in own], batch_size
    )
