"""The package has three public names, loaded at first use."""

import subprocess
import sys

import pytest

import lego_pipeline


def test_the_public_names_are_these_three() -> None:
    assert lego_pipeline.__all__ == ["LegoPipeline", "LegoPipelineOutput", "__version__"]


@pytest.mark.parametrize("name", lego_pipeline.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(lego_pipeline, name)
    assert name in dir(lego_pipeline)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lego_pipeline' has no attribute 'LegoPipelin'"):
        _ = lego_pipeline.LegoPipelin  # ty: ignore[unresolved-attribute]


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, lego_pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
