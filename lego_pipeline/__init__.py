"""LEGO as a diffusers pipeline: an egocentric frame and an action in, the frame of that action out.

The package has three public names. `LegoPipeline` and `LegoPipelineOutput` are loaded at first use (PEP 562), so that
`import lego_pipeline` and `lego --help` take no time for torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lego_pipeline.pipeline_lego import LegoPipeline, LegoPipelineOutput

__version__ = "0.1.0"
__all__ = ["LegoPipeline", "LegoPipelineOutput", "__version__"]


def __getattr__(name: str) -> object:
    if name in ("LegoPipeline", "LegoPipelineOutput"):
        from lego_pipeline import pipeline_lego

        return getattr(pipeline_lego, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
