"""cache_embeddings.py at tiny size, run in this process through its `main`; two processes are in the slow test."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lego_pipeline.checkpoints import FRAMES
from lego_pipeline.config import parse_config
from lego_pipeline.data.embedding_cache import EmbeddingCache
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.data.mirror import mirror_image, mirror_text
from lego_pipeline.vlm import llava
from train import cache_embeddings

ROOT = Path(__file__).parents[2]


def write_pairs(folder: Path, count: int = 6) -> Path:
    """Rendered pairs, the last two of them to validate; the second and third have the first one's frame."""
    rows = [dict(row) for row in read_manifest(FRAMES).select(range(count))]
    for i, row in enumerate(rows):
        row["image_0"] = rows[0 if i in (1, 2) else i]["image_0"].convert("RGB").resize((32, 32))
        row["split"] = "train" if i < count - 2 else "val"
    rows[3]["action"] += " with the left hand"
    write_shard(rows, folder / "000.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data: Path, vlm_folder: Path) -> Callable[..., EmbeddingCache]:
    """Runs the script and opens the cache that it filled."""

    def run(folder: Path, **changes: Any) -> EmbeddingCache:
        settings = {"data": (data,), "vlm": str(vlm_folder), "batch_size": 3, "max_new_tokens": 5, **changes}
        cache_embeddings.main(cache_embeddings.CacheEmbeddingsConfig(cache=folder, **settings))
        return EmbeddingCache(folder)

    return run


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the frames that the VLM sees and the rows that it describes and embeds."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(vlm: Any, processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
            counts[name] += len(images)
            return function(vlm, processor, images, *args, **kwargs)

        return call

    for name in ("frame_states", "generate", "embed"):
        monkeypatch.setattr(llava, name, counted(name, getattr(llava, name)))
    return counts


def content(cache: EmbeddingCache) -> dict[str, tuple[str | None, torch.Tensor]]:
    """Everything that a cache holds, by key."""
    return {key: (cache.store.columns(key)["description"], cache.store.get(key)["states"]) for key in cache.store}


def assert_equal_content(first: EmbeddingCache, second: EmbeddingCache, tolerance: float = 0.0) -> None:
    """Both hold the same entries; the states of other batches may differ by a rounding."""
    a, b = content(first), content(second)
    assert a and a.keys() == b.keys()
    for key, (description, states) in a.items():
        assert b[key][0] == description
        torch.testing.assert_close(b[key][1], states, atol=tolerance, rtol=tolerance)


def test_a_second_run_calls_no_vlm(run: Callable[..., EmbeddingCache], tmp_path: Path, work: Counter[str]) -> None:
    assert len(run(tmp_path)) == 2 + 4  # two frames, four descriptions
    assert work == {"frame_states": 2, "generate": 4, "embed": 4}
    run(tmp_path, batch_size=2)
    assert work == {"frame_states": 2, "generate": 4, "embed": 4}


def test_every_row_is_found_without_the_vlm(run: Callable[..., EmbeddingCache], data: Path, tmp_path: Path) -> None:
    cache = run(tmp_path, split=("train", "val"))
    for row in read_manifest(data):
        found = cache.lookup(row["image_0"], row["action"])
        assert found is not None and found.image_embeds.shape == (4, 32)


def test_other_batches_give_the_same_cache(run: Callable[..., EmbeddingCache], tmp_path: Path) -> None:
    assert_equal_content(run(tmp_path / "a"), run(tmp_path / "b", batch_size=1, shard_size=2), tolerance=2e-3)
    assert len(list((tmp_path / "b").glob("*.parquet"))) == 3


def test_another_seed_gives_other_descriptions_of_the_same_frames(
    run: Callable[..., EmbeddingCache], tmp_path: Path, work: Counter[str]
) -> None:
    first = run(tmp_path, temperature=1.0)
    second = run(tmp_path, temperature=1.0, seed=1)
    assert work["frame_states"] == 2
    assert len(first) == 2 + 4 and len(second) == 2 + 8
    assert len(second.recipes()) == 2


def test_manifest_descriptions_are_embedded_as_they_are(
    run: Callable[..., EmbeddingCache], data: Path, tmp_path: Path, work: Counter[str]
) -> None:
    cache = run(tmp_path, descriptions="manifest")
    assert work["generate"] == 0
    for row in read_manifest(data, "train"):
        found = cache.lookup(row["image_0"], row["action"], description=row["description"])
        assert found is not None and found.description == row["description"]


@pytest.mark.parametrize("descriptions", ["generate", "manifest"])
def test_flips_add_the_mirrored_frames_with_mirrored_words(
    descriptions: str, run: Callable[..., EmbeddingCache], data: Path, tmp_path: Path, work: Counter[str]
) -> None:
    cache = run(tmp_path, descriptions=descriptions, flips=True)
    assert work["frame_states"] == 4 and len(cache) == 2 * (2 + 4)
    sides = 0
    for row in read_manifest(data, "train"):
        text = mirror_text(row["description"])
        sides += text != row["description"]
        given = text if descriptions == "manifest" else None
        found = cache.lookup(mirror_image(row["image_0"]), mirror_text(row["action"]), description=given)
        assert found is not None
        assert descriptions == "generate" or found.description == text
    assert sides > 0


def test_rows_without_a_description_are_named(run: Callable[..., EmbeddingCache], data: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in read_manifest(data)]
    rows[1]["description"] = None
    write_shard(rows, tmp_path / "data" / "000.parquet")
    with pytest.raises(ValueError, match=rf"`descriptions` must be generate .* 1 of 4 rows .* '{rows[1]['id']}'"):
        run(tmp_path / "cache", data=(tmp_path / "data",), descriptions="manifest")
    assert len(run(tmp_path / "cache", data=(tmp_path / "data",))) == 2 + 4


def test_several_manifests_share_one_cache(run: Callable[..., EmbeddingCache], data: Path, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "data", 8)
    cache = run(tmp_path / "cache", data=(data, other))
    assert len(cache) == (2 + 2) + (4 + 2)  # the first four rows are the same
    assert len(cache.recipes()) == 1


def test_an_adapter_that_was_not_merged_is_used(
    run: Callable[..., EmbeddingCache], tiny_components: dict[str, Any], tmp_path: Path, work: Counter[str]
) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(tiny_components["vlm"]), LoraConfig(r=2, target_modules=llava.LORA_TARGETS))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.fill_(0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    plain, cache = run(tmp_path / "cache"), run(tmp_path / "cache", adapter=tmp_path / "adapter")
    assert work == {"frame_states": 2, "generate": 8, "embed": 8}
    texts = [{d for d, _ in content(c).values() if d is not None} for c in (plain, cache)]
    assert len(texts[1] - texts[0]) > 0


def test_an_adapter_that_is_not_there_is_named(run: Callable[..., EmbeddingCache], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`adapter` must be a folder that peft saved, found no adapter_config"):
        run(tmp_path / "cache", adapter=tmp_path)


def test_int8_is_asked_for_by_a_flag(run: Callable[..., EmbeddingCache], tmp_path: Path) -> None:
    cache = run(tmp_path, cache_dtype="int8")
    assert {cache.store.get(key)["states"].dtype for key in cache.store} == {torch.int8}


def test_the_flags_take_several_manifests_and_splits(tmp_path: Path) -> None:
    arguments = ["--data", "a", "b", "--split", "train", "val", "--vlm", "v", "--cache", "c", "--flips"]
    config = parse_config(cache_embeddings.CacheEmbeddingsConfig, arguments=arguments)
    assert (config.data, config.split, config.flips) == ((Path("a"), Path("b")), ("train", "val"), True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_template": "What?"}, "`question_template` must have exactly one {}"),
        ({"data": ()}, "`data` and `split` must each name at least one"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"temperature": -1.0}, "`temperature` must be at least 0, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(
    changes: dict[str, Any], message: str, run: Callable[..., EmbeddingCache], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


def test_another_number_of_processes_is_refused(run: Callable[..., EmbeddingCache], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`expect_processes` must be the number of processes that run, got 2 and 1"):
        run(tmp_path, expect_processes=2)


def test_rows_are_shared_whole_and_by_frame(data: Path) -> None:
    rows = read_manifest(data)
    shares = [cache_embeddings.own_rows(rows, rank, 3) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(len(rows)))
    assert {number for share in shares if 0 in share for number in share} >= {0, 1, 2}


def test_a_kill_costs_the_unwritten_shard_alone(
    run: Callable[..., EmbeddingCache], tmp_path: Path, work: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = llava.embed

    def killed_at_the_third(vlm: Any, processor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
        if work["embed"] == 2:
            raise KeyboardInterrupt
        return embed(vlm, processor, images, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llava, "embed", killed_at_the_third)
        run(tmp_path, batch_size=1, shard_size=2)
    assert len(EmbeddingCache(tmp_path)) == 2  # the frame and its first text; the second waited for its shard
    work.clear()
    assert len(run(tmp_path, batch_size=1, shard_size=2)) == 2 + 4
    assert work == {"frame_states": 1, "generate": 3, "embed": 3}


def launch(launcher: list[str], arguments: list[Any], **settings: Any) -> subprocess.Popen[str]:
    """The script in a subprocess on the CPU."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, ROOT / "train" / "cache_embeddings.py", *arguments]
    return subprocess.Popen([*map(str, command)], env=environment, start_new_session=True, text=True, **settings)


@pytest.mark.slow
def test_two_processes_and_a_sigkill_fill_the_cache_of_one(
    run: Callable[..., EmbeddingCache], vlm_folder: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "data", 12)
    settings = {"batch_size": 2, "max_new_tokens": 5, "flips": True}
    expected = run(tmp_path / "one", data=(data,), **settings)
    arguments = ["--data", data, "--vlm", vlm_folder, "--cache", tmp_path / "two", "--batch-size", 2]
    arguments += ["--max-new-tokens", 5, "--flips", "--shard-size", 3, "--expect-processes", 2]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    first = launch(launcher, arguments)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "two").glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert 0 < len(EmbeddingCache(tmp_path / "two"))
    second = launch(launcher, arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = second.communicate(timeout=600)
    assert second.returncode == 0, output[-4000:]
    filled = EmbeddingCache(tmp_path / "two")
    assert_equal_content(expected, filled, tolerance=2e-3)
    assert {path.name.split("-")[0] for path in (tmp_path / "two").glob("*.parquet")} == {"0", "1"}
    recipes = [json.loads(path.read_text()) for path in tmp_path.glob("*/recipe-*.json")]
    assert recipes[0] == recipes[1]


@pytest.mark.slow
def test_a_mistake_ends_in_one_line(tmp_path: Path) -> None:
    arguments = ["--data", tmp_path / "none", "--vlm", tmp_path, "--cache", tmp_path / "cache"]
    process = launch([], arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error: `path` must be a manifest" in errors and "Traceback" not in errors
