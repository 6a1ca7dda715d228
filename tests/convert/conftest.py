"""The tiny LLaVA in the original layout, made by the parity tests' own module."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
