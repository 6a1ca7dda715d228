from lego_pipeline import LegoPipeline  # noqa: F401
