"""A batch whose descriptions are edited by hand: same frames, same noise, other words.

    python examples/edited_descriptions.py --swap right left --output edited_descriptions.png

The VLM describes each action; then one word is exchanged for another and the edited text goes the same way, without
sampling: one forward pass of the VLM gives the embeddings that belong to it. Both batches start from the same noise,
so that what differs between the pictures comes from the words.
"""

from pathlib import Path

import torch
import tyro

from lego_pipeline import LegoPipeline, LegoPipelineOutput
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.contact_sheet import Card, draw_contact_sheet
from lego_pipeline.data.manifest import read_manifest


def main(
    output: Path = Path("edited_descriptions.png"),
    swap: tuple[str, str] = ("right", "left"),
    frames: int = 4,
    steps: int | None = None,
    seed: int = 0,
) -> None:
    """Generates every frame twice, from the VLM's description and from an edited one.

    Args:
        output: where the contact sheet goes.
        swap: two words that change places in the descriptions.
        frames: how many of the embedded frames.
        steps: denoising steps; without it the checkpoint's own number.
        seed: of the noise and of the descriptions.
    """
    pairs = list(read_manifest(FRAMES).select(range(frames)))
    pipeline = LegoPipeline.from_pretrained(KITCHEN)

    def generate(descriptions: list[str] | None = None) -> LegoPipelineOutput:
        return pipeline(
            [pair["image_0"] for pair in pairs],
            action=[pair["action"] for pair in pairs],
            description=descriptions,
            num_inference_steps=steps,
            # A generator for each sample: its picture depends neither on its neighbours nor on the batch size.
            generator=[torch.Generator().manual_seed(seed + i) for i in range(frames)],
        )

    described = generate()
    edited = generate([exchange(text, *swap) for text in described.descriptions])

    cards = [
        Card(
            title=pair["action"],
            frames=[("input", pair["image_0"]), ("as described", described.images[i]), ("edited", edited.images[i])],
            text=f"{described.descriptions[i]} / {edited.descriptions[i]}",
        )
        for i, pair in enumerate(pairs)
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_contact_sheet(cards, title=f"{swap[0]} and {swap[1]} exchanged in the description").save(output)
    print(output)


def exchange(text: str, one: str, other: str) -> str:
    """The text with two words in each other's places; it may hold either, both or none of them."""
    words = {one: other, other: one}
    return " ".join(words.get(word, word) for word in text.split(" "))


if __name__ == "__main__":
    tyro.cli(main)
