"""Numbers of the sampler and of the released picture, against arrays that were stored once parity was shown."""

import importlib.util
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def test_the_samplers_numbers_have_not_changed() -> None:
    spec = importlib.util.spec_from_file_location("make_golden", FOLDER / "make_golden.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.sampler_arrays()
    with np.load(FOLDER / "sampler.npz", allow_pickle=False) as stored:
        assert set(stored.files) == {*made, "torch_version"}
        for name, array in made.items():
            if array.dtype == np.uint8:
                assert np.abs(array.astype(int) - stored[name]).max() <= 1
            else:
                assert np.abs(array - stored[name]).max() <= 1e-5 * np.abs(stored[name]).max(), name
