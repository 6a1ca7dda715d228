"""Where the checkpoint that travels with the package is.

`KITCHEN` is a complete LegoPipeline folder that knows the rendered kitchen of `examples/kitchen/` and no photographs.
`FRAMES` is a manifest (`lego_pipeline.data.manifest.read_manifest`) of a few pairs of the same kitchens that training
never saw; demo, examples and tests start from them. `FAST` is the folder of few-step adapters in a pipeline's folder
(`lego_pipeline.fast`).
"""

from pathlib import Path

KITCHEN: Path = Path(__file__).parent / "kitchen"
FRAMES: Path = Path(__file__).parent / "frames"
FAST = "fast"
