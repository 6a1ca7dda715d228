"""One call: an egocentric frame and an action in, the action frame out.

    python examples/generate.py --row 3 --output generate.png

Works on the embedded checkpoint and frames, without network and GPU. A frame of your own needs a checkpoint that knows
such frames: the embedded one knows a rendered kitchen and no photographs.
"""

from pathlib import Path

import torch
import tyro

from lego_pipeline import LegoPipeline
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.data.manifest import read_manifest


def main(
    output: Path = Path("generate.png"),
    row: int = 0,
    action: str | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> None:
    """Generates the action frame for one of the embedded frames.

    Args:
        output: where the picture goes.
        row: which of the embedded frames.
        action: what the hands shall do; without it, what they do in the row.
        steps: denoising steps; without it the checkpoint's own number.
        seed: of the noise and of the description.
    """
    pair = read_manifest(FRAMES)[row]
    pipeline = LegoPipeline.from_pretrained(KITCHEN)

    result = pipeline(
        pair["image_0"],
        action=action or pair["action"],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )

    output.parent.mkdir(parents=True, exist_ok=True)
    result.images[0].save(output)
    print(f"{output}: {result.descriptions[0]}")


if __name__ == "__main__":
    tyro.cli(main)
