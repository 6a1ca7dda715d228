"""Storyboards: several actions in a row, painted one after the other from a single frame.

Each picture is the frame of the next action, or every action starts from the first frame. The first shows a sequence
but adds up errors; the second keeps every picture close to the frame.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from lego_pipeline import images

if TYPE_CHECKING:
    from lego_pipeline.vlm.base import Enhancement

FOLLOW = ("previous", "first")


@dataclass(frozen=True)
class Panel:
    """One picture of a storyboard.

    Attributes:
        action: what was asked.
        description: the text that the picture was generated from.
        image: the generated frame, of the size of the first frame.
    """

    action: str
    description: str
    image: PIL.Image.Image


def paint_storyboard(
    pipe: Any,
    image: images.ImageInput,
    actions: Sequence[str],
    *,
    follow: str = "previous",
    enhance: "Callable[[images.Frame, str, torch.Generator | None], Enhancement] | None" = None,
    generator: torch.Generator | None = None,
    **arguments: Any,
) -> list[Panel]:
    """Paints the frames of several actions in a row.

    Args:
        pipe: a `LegoPipeline`.
        image: the first frame, as for a call of the pipeline.
        actions: labels such as "open drawer", in their order.
        follow: "previous", each picture feeds the next action, or "first", all start from the first frame.
        enhance: gives the enhancement for a frame, an action and the generator, where the VLM is not the pipeline's.
        generator: of descriptions and noise; it advances from picture to picture.
        **arguments: of the pipeline's call, such as `num_inference_steps` or `guidance_scale`.

    Returns:
        One panel for each action.

    Raises:
        ValueError: no action, an empty one, more than one frame, or an unknown `follow`.
    """
    from lego_pipeline import checks  # with the VLM families of transformers, which whoever lists nodes need not load

    if isinstance(actions, str) or not actions:
        raise ValueError(f"`actions` must be a list of at least one action, got {actions!r}; pass for instance "
                         '["open drawer", "take spoon"].')  # fmt: skip
    checks.check_texts("actions", list(actions))
    checks.check_choice("follow", follow, FOLLOW)
    frames = images.to_frames(image)
    if len(frames) != 1:
        raise ValueError(f"`image` must be one frame, got {len(frames)}; call once for each.")
    panels: list[Panel] = []
    source: images.Frame = frames[0]
    for action in actions:
        given = {"action": action} if enhance is None else {"enhancement": enhance(source, action, generator)}
        output = pipe(source, **given, generator=generator, **arguments)
        panels.append(Panel(action, output.descriptions[0], output.images[0]))
        if follow == "previous":
            source = output.images[0]
    return panels
