"""Answers of networks on disk: found again, computed once, kept when a run is stopped."""

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lego_pipeline.evaluation import features
from lego_pipeline.evaluation.features import FeatureCache


class Network:
    """The number of a key as an array, and the batches that were asked for."""

    def __init__(self, keys: Sequence[str], fails_at: str = ""):
        self.keys, self.fails_at, self.batches = keys, fails_at, []

    def __call__(self, indices: Sequence[int]) -> list[np.ndarray]:
        names = [self.keys[i] for i in indices]
        if self.fails_at in names:
            raise ValueError(f"{self.fails_at} can't be read")
        self.batches.append(names)
        return [np.full(2, float(name), np.float32) for name in names]


def test_answers_come_in_the_order_of_the_keys_and_each_is_computed_once():
    keys = ["3", "1", "3", "2", "1"]
    network = Network(keys)
    cache = FeatureCache(batch_size=2)
    assert [answer[0] for answer in cache.answers(keys, network, "x")] == [3, 1, 3, 2, 1]
    assert network.batches == [["3", "1"], ["2"]] and cache.computed == 3


def test_a_second_cache_on_the_same_folder_computes_only_what_is_new(tmp_path):
    FeatureCache(tmp_path).answers(["1", "2"], Network(["1", "2"]), "x")
    network = Network(["2", "5", "1"])
    answers = FeatureCache(tmp_path).answers(["2", "5", "1"], network, "x")
    assert network.batches == [["5"]] and [answer.tolist() for answer in answers] == [[2, 2], [5, 5], [1, 1]]


def test_what_was_computed_before_an_error_is_kept(tmp_path):
    keys = ["1", "2", "3", "4"]
    with pytest.raises(ValueError, match="3 can't be read"):
        FeatureCache(tmp_path, batch_size=1).answers(keys, Network(keys, fails_at="3"), "x")
    network = Network(keys)
    FeatureCache(tmp_path).answers(keys, network, "x")
    assert network.batches == [["3", "4"]]


def test_answers_of_other_shapes_and_types_come_back_as_they_were(tmp_path):
    values = {"text": np.frombuffer("a händ".encode(), np.uint8).copy(), "none": np.empty((0, 7), np.float32)}
    FeatureCache(tmp_path).answers([*values], lambda indices: [[*values.values()][i] for i in indices], "x")
    read = FeatureCache(tmp_path).answers([*values], lambda _: pytest.fail("computed again"), "x")
    for answer, value in zip(read, values.values(), strict=True):
        assert answer.dtype == value.dtype and answer.shape == value.shape and (answer == value).all()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_written(tmp_path: Path):
    """The process is killed while the third batch is computed; two were written, as every write is due."""
    script = f"""
        import os, signal
        import numpy as np
        from pathlib import Path
        from lego_pipeline.evaluation import features
        features.WRITE_EVERY = 0
        def network(indices):
            if indices[0] == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return [np.full(1, i) for i in indices]
        features.FeatureCache(Path({str(tmp_path)!r}), batch_size=2).answers(list("abcdef"), network, "x")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    asked = []
    answers = FeatureCache(tmp_path).answers(
        list("abcdef"), lambda indices: asked.extend(indices) or [np.full(1, i) for i in indices], "x"
    )
    assert asked == [4, 5] and [int(answer[0]) for answer in answers] == [0, 1, 2, 3, 4, 5]


def test_a_damaged_cache_is_named(tmp_path):
    FeatureCache(tmp_path).answers(["1"], Network(["1"]), "x")
    (shard,) = tmp_path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"the shard {shard} must be as it was written"):
        FeatureCache(tmp_path)


def test_writing_waits_for_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "WRITE_EVERY", 1e9)
    keys = [str(i) for i in range(6)]
    FeatureCache(tmp_path, batch_size=1).answers(keys, Network(keys), "x")
    assert len([*tmp_path.glob("*.parquet")]) == 1
