"""The judge of the embedded kitchen: a small network that reads (before, after) and says which action was carried out.

Trained by `examples/kitchen/train_judge.py` on rendered pairs alone, in kitchens of which neither the validation nor
the test split has one; it has seen no generated frame and no photograph. It knows all thirty actions, those too that
the generator never saw, and the answer "nothing", for a frame that was copied.

Letters: B pairs, S side of the frames in pixels (128), A actions, P places.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

WEIGHTS: Path = Path(__file__).parent / "judge.safetensors"
HANDS = ("left", "right")
BOXES = ("hand_left", "hand_right", "object")
NOTHING = "nothing"


@dataclass
class Reading:
    """What the judge reads from one pair of frames.

    Attributes:
        action: the likeliest answer, "nothing" among them.
        best_action: the likeliest of the actions alone.
        verb, noun: each from an output of its own, so "nothing" or a combination that is no action can occur.
        probabilities: of every answer, summing to 1.
        hands: sides of the hands that are seen in the frame after.
        place: where, as the manifest's slot `place` says it: left, middle, right, knob 1 to 4.
        boxes: hand_left, hand_right (if seen) and object (what the action is about, all of it): (x0, y0, x1, y1) in
            fractions of the frame.
    """

    action: str
    best_action: str
    verb: str
    noun: str
    probabilities: dict[str, float]
    hands: tuple[str, ...]
    place: str
    boxes: dict[str, tuple[float, float, float, float]]


class Judge(nn.Module):
    """Convolutions on both frames and their difference, one head for each question.

    Args:
        actions: (verb, noun) of the A actions.
        places: the P places.
        size: S, a multiple of 16.
        widths: channels of the four levels, from S / 2 to S / 16.
        hidden: width of the last layer before the heads.
    """

    def __init__(
        self,
        actions: Sequence[Sequence[str]],
        places: Sequence[str],
        size: int = 128,
        widths: Sequence[int] = (24, 48, 96, 128),
        hidden: int = 160,
    ):
        super().__init__()
        self.settings = {
            "actions": [list(action) for action in actions],
            "places": list(places),
            "size": size,
            "widths": list(widths),
            "hidden": hidden,
        }
        self.size = size
        self.actions = [*(" ".join(action) for action in actions), NOTHING]
        self.verbs = [*sorted({verb for verb, _ in actions}), NOTHING]
        self.nouns = [*sorted({noun for _, noun in actions}), NOTHING]
        self.places = list(places)
        first, second, third, fourth = widths
        self.trunk = nn.Sequential(
            *_layer(9, first, 2),
            *_layer(first, second, 2),
            *_layer(second, third, 2),
            Residual(third),
            *_layer(third, fourth, 2),
            Residual(fourth),
            *_layer(fourth, 24, 1, kernel=1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(24 * (size // 16) ** 2, hidden),
            nn.ReLU(),
        )
        outputs = {
            "action": len(self.actions),
            "verb": len(self.verbs),
            "noun": len(self.nouns),
            "place": len(places),
            "hands": len(HANDS),
            "boxes": 4 * len(BOXES),
        }
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, count) for name, count in outputs.items()})

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raw outputs for frames (B, 3, S, S) float in [-1, 1].

        Returns:
            logits `action` (B, A + 1), `verb`, `noun`, `place` (B, P) and `hands` (B, 2); `boxes` (B, 3, 4), corners
            x0, y0, x1, y1 in fractions of the frame.
        """
        features = self.trunk(torch.cat([before, after, after - before], 1))
        output = {name: head(features) for name, head in self.heads.items()}
        middle, extent = output["boxes"].reshape(-1, len(BOXES), 2, 2).sigmoid().unbind(2)  # (B, 3, 2) each
        output["boxes"] = torch.cat([middle - extent / 2, middle + extent / 2], -1)
        return output

    @torch.no_grad()
    def read(self, before: torch.Tensor, after: torch.Tensor) -> list[Reading]:
        """What is seen in B pairs of frames; the same for a pair whatever the others are.

        Args:
            before, after: (B, 3, H, W) float in [-1, 1], of the same size, resized to S if need be.

        Raises:
            ValueError: another shape.
        """
        if before.ndim != 4 or before.shape[1] != 3 or before.shape != after.shape:
            raise ValueError(
                "`before` and `after` must both be (B, 3, H, W), got "
                f"{tuple(before.shape)} and {tuple(after.shape)}; stack the frames of B pairs."
            )
        self.eval()
        device = next(self.parameters()).device
        frames = [_resized(frames.to(device).float(), self.size) for frames in (before, after)]
        output = {name: values.cpu() for name, values in self(*frames).items()}
        probabilities = output["action"].softmax(1)
        return [self._reading({name: values[i] for name, values in output.items()}, probabilities[i])
                for i in range(len(before))]  # fmt: skip

    def _reading(self, output: dict[str, torch.Tensor], probabilities: torch.Tensor) -> Reading:
        hands = tuple(side for side, logit in zip(HANDS, output["hands"].tolist(), strict=True) if logit > 0)
        corners = output["boxes"].clamp(0, 1).tolist()
        boxes = {
            name: (x0, y0, x1, y1)
            for name, (x0, y0, x1, y1) in zip(BOXES, corners, strict=True)
            if name == "object" or name.removeprefix("hand_") in hands
        }
        return Reading(
            action=self.actions[int(probabilities.argmax())],
            best_action=self.actions[int(probabilities[:-1].argmax())],
            verb=self.verbs[int(output["verb"].argmax())],
            noun=self.nouns[int(output["noun"].argmax())],
            probabilities=dict(zip(self.actions, probabilities.tolist(), strict=True)),
            hands=hands,
            place=self.places[int(output["place"].argmax())],
            boxes=boxes,
        )


class Residual(nn.Module):
    """Two convolutions around which the features pass unchanged."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(*_layer(width, width, 1), *_layer(width, width, 1)[:-1])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.relu(features + self.layers(features))


def _layer(inputs: int, outputs: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def _resized(frames: torch.Tensor, size: int) -> torch.Tensor:
    if frames.shape[-2:] == (size, size):
        return frames
    return nn.functional.interpolate(frames, (size, size), mode="bilinear", antialias=True)


def box_corners(boxes: Iterable[Mapping[str, Any]]) -> torch.Tensor:
    """Corners of what the judge looks for, from the boxes of a manifest row.

    Returns:
        (3, 4) float: left hand, right hand, and one box around all that the action is about; NaN where there is none.
    """
    result = torch.full((len(BOXES), 4), torch.nan)
    boxes = list(boxes)
    for number, name in enumerate(BOXES):
        chosen = [
            [box["x0"], box["y0"], box["x1"], box["y1"]]
            for box in boxes
            if (box["name"] == name if name.startswith("hand") else not box["name"].startswith("hand"))
        ]
        if chosen:
            found = torch.tensor(chosen)
            result[number] = torch.cat([found[:, :2].amin(0), found[:, 2:].amax(0)])
    return result


def box_overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Intersection over union (...) of boxes (..., 4); NaN where one is."""
    shared = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    areas = [(box[..., 2:] - box[..., :2]).clamp(0).prod(-1) for box in (first, second)]
    return shared.prod(-1) / (sum(areas) - shared.prod(-1)).clamp_min(1e-6)


def load_judge(path: str | Path = WEIGHTS) -> Judge:
    """The judge in evaluation mode, float32 on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"the judge's weights must be at {path}, found none; make them with "
            "`python -m examples.kitchen.train_judge --help`."
        )
    with safe_open(path, framework="pt") as file:
        settings = (file.metadata() or {}).get("judge")
        if settings is None:
            raise ValueError(f"{path} must hold a judge with its settings, got other weights; train one again.")
        judge = Judge(**json.loads(settings))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no dict)
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    judge.load_state_dict(weights)
    return judge.eval()


def save_judge(judge: Judge, path: Path) -> None:
    """Writes weights in half precision and settings as one safetensors file, whole or not at all."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in judge.state_dict().items()
    }
    unfinished = path.with_name(f"{path.name}.unfinished")
    save_file(weights, unfinished, metadata={"judge": json.dumps(judge.settings)})
    unfinished.replace(path)
