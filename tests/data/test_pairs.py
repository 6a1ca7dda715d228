"""Samples of training: their facts, sizes, random numbers, what is computed once, what workers load."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Dataset
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from lego_pipeline.data.facts import centre_crop, common_size, read_facts
from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.data.mirror import mirror_image
from lego_pipeline.data.pairs import Draws, PairDataset, Precomputed, collate, load_batches
from lego_pipeline.data.precomputed import fill_latents, fill_prompts, open_precomputed
from lego_pipeline.data.shards import ShardStore, pixel_key
from lego_pipeline.images import to_model_input
from lego_pipeline.pipeline_lego import LegoPipeline

ALPHAS = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
BOX = {"name": "left hand", "x0": 0.0, "y0": 0.0, "x1": 0.25, "y1": 0.5}


@pytest.fixture
def make_rows(tmp_path: Path, make_frame: Callable[..., PIL.Image.Image]) -> Callable[..., Dataset]:
    """Manifest of pairs of the given sizes (width, height)."""

    def make(*sizes: tuple[int, int], name: str = "data", **changes: Any) -> Dataset:
        rows = [
            {
                "id": str(i),
                "image_0": make_frame(*size, seed=2 * i),
                "image_1": make_frame(*size, seed=2 * i + 1),
                "action": f"open left drawer {i}",
                "boxes_0": [BOX],
                **changes,
            }
            for i, size in enumerate(sizes)
        ]
        write_shard(rows, tmp_path / name / "0.parquet")
        return read_manifest(tmp_path / name)

    return make


def make_dataset(folder: Path, *rows: Dataset, **changes: Any) -> PairDataset:
    facts = [read_facts(part, folder / "frames", flips=changes.get("flips", False)) for part in rows]
    options: dict[str, Any] = {"resolution": 32, "factor": 4, "latent_channels": 6, "size": (32, 32), **changes}
    return PairDataset(rows, facts, Draws(seed=0, alphas_cumprod=ALPHAS), **options)


def assert_equal_items(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name], name


# --- Facts ----------------------------------------------------------------------------------------------------------


def test_facts_are_keys_and_sizes_of_the_frames(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    rows = make_rows((32, 24), (16, 40))
    facts = read_facts(rows, tmp_path / "frames", flips=True).to_pylist()
    assert [(fact["width_0"], fact["height_1"]) for fact in facts] == [(32, 24), (16, 40)]
    assert facts[1]["pixels_1"] == pixel_key(rows[1]["image_1"])
    assert facts[1]["mirrored_0"] == pixel_key(mirror_image(rows[1]["image_0"]))


def test_facts_are_found_once(
    make_rows: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows((32, 32), (32, 32))
    first = read_facts(rows, tmp_path / "frames")
    monkeypatch.setattr("lego_pipeline.data.facts.pixel_key", lambda frame: pytest.fail("a frame is read again"))
    assert read_facts(rows, tmp_path / "frames").equals(first)


def test_facts_of_changed_frames_are_found_anew(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    first = read_facts(make_rows((32, 32)), tmp_path / "frames")
    second = read_facts(make_rows((24, 32), name="other"), tmp_path / "frames")
    assert first["width_0"].to_pylist() == [32]
    assert second["width_0"].to_pylist() == [24]


def test_frames_in_files_are_known_by_content(make_frame: Callable[..., PIL.Image.Image], tmp_path: Path) -> None:
    """Same names, ids and paths inside the manifest; other pictures."""
    widths = []
    for size in (32, 48):
        folder = tmp_path / str(size)
        folder.mkdir()
        row = {"id": "a", "action": "open drawer", "image_0_file_name": "0.png", "image_1_file_name": "1.png"}
        for k in (0, 1):
            make_frame(size, size).save(folder / f"{k}.png")
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        widths += read_facts(read_manifest(folder), tmp_path / "frames")["width_0"].to_pylist()
    assert widths == [32, 48]


def test_a_pair_without_a_target_is_named(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`data` must have both frames in every row, '0' lacks image_1"):
        read_facts(make_rows((32, 32), image_1=None), tmp_path / "frames")


@pytest.mark.filterwarnings("ignore:Exception ignored in")  # PIL leaves a file open that it can't read
def test_an_image_that_is_cut_off_is_named_with_its_row(
    make_frame: Callable[..., PIL.Image.Image], tmp_path: Path
) -> None:
    row = {"id": "a7", "action": "open drawer", "image_0_file_name": "0.png", "image_1_file_name": "1.png"}
    for k in (0, 1):
        make_frame(32, 32).save(tmp_path / f"{k}.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    whole = (tmp_path / "1.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"no image"):
        (tmp_path / "1.png").write_bytes(content)
        with pytest.raises(ValueError, match="`data` must hold images that can be read, row 'a7' has one that can't"):
            read_facts(read_manifest(tmp_path), tmp_path / "frames")


def test_the_common_size_is_that_of_most_pairs(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    facts = [
        read_facts(make_rows((64, 32), (32, 32)), tmp_path / "frames"),
        read_facts(make_rows((128, 64), (64, 32), name="second"), tmp_path / "frames"),
    ]
    assert common_size(facts, 32, 4) == ((24, 44), 1)


# --- Draws ----------------------------------------------------------------------------------------------------------


def test_draws_depend_on_seed_step_and_sample_alone() -> None:
    draws = Draws(seed=1, alphas_cumprod=ALPHAS, vlm_dropout=0.5)
    first = draws(3, 5, (2, 4, 4))
    torch.manual_seed(7)
    assert_equal_items(first, draws(3, 5, (2, 4, 4)))
    others = [draws(4, 5, (2, 4, 4)), draws(3, 6, (2, 4, 4))]
    others.append(Draws(seed=2, alphas_cumprod=ALPHAS)(3, 5, (2, 4, 4)))
    assert all(not torch.equal(first["noise"], other["noise"]) for other in others)


def test_uniform_timesteps_are_spread_over_all() -> None:
    draws = Draws(seed=0, alphas_cumprod=ALPHAS)
    timesteps = torch.stack([draws(0, sample, (1, 1, 1))["timestep"] for sample in range(2000)])
    assert 0 <= timesteps.min() < 10
    assert 990 < timesteps.max() < 1000
    assert abs(timesteps.float().mean() - 499.5) < 25


def test_log_normal_timesteps_lie_around_the_wished_noise_level() -> None:
    draws = Draws(seed=0, alphas_cumprod=ALPHAS, timestep_sampling="log_normal", log_sigma_mean=1.0)
    timesteps = torch.stack([draws(0, sample, (1, 1, 1))["timestep"] for sample in range(2000)])
    log_sigma = 0.5 * torch.log((1 - ALPHAS[timesteps]) / ALPHAS[timesteps])
    assert abs(log_sigma.median() - 1.0) < 0.1


def test_a_share_of_the_samples_loses_the_vlm_and_half_of_these_the_description() -> None:
    draws = Draws(seed=0, alphas_cumprod=ALPHAS, vlm_dropout=0.4)
    drawn = collate([draws(0, sample, (1, 1, 1)) for sample in range(2000)])
    assert abs(drawn["no_vlm"].float().mean() - 0.4) < 0.04
    assert abs(drawn["use_label"].float().mean() - 0.2) < 0.04
    assert not (drawn["use_label"] & ~drawn["no_vlm"]).any()


def test_nothing_is_dropped_in_validation() -> None:
    draws = Draws(seed=0, alphas_cumprod=ALPHAS, vlm_dropout=1.0, has_dropout=False)
    drawn = collate([draws(0, sample, (1, 1, 1)) for sample in range(20)])
    assert (drawn["drop"] == 1).all()
    assert not drawn["no_vlm"].any()


# --- Samples --------------------------------------------------------------------------------------------------------


def test_samples_are_numbered_over_all_data_sets(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    rows = make_rows((32, 32), (32, 32)), make_rows((32, 32), name="second", action="close door")
    dataset = make_dataset(tmp_path, *rows)
    assert (len(dataset), dataset.sizes) == (3, [2, 1])
    assert [dataset.texts(sample)[1] for sample in range(3)] == [
        "open left drawer 0",
        "open left drawer 1",
        "close door",
    ]


def test_mirrored_samples_stand_behind_and_swap_the_sides(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, make_rows((32, 32), (32, 32)), flips=True, box_weight=3.0)
    assert dataset.sizes == [4]
    plain, mirrored = dataset[0, 1], dataset[0, 3]
    assert torch.equal(mirrored["pixels"], plain["pixels"].flip(-1))
    assert torch.equal(mirrored["weights"], plain["weights"].flip(-1))
    assert (plain["prompt"], mirrored["prompt"]) == ("open left drawer 1", "open right drawer 1")
    assert not torch.equal(plain["noise"], mirrored["noise"])


def test_weights_reach_every_cell_that_a_box_touches(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    rows = make_rows((32, 32), boxes_1=[{"name": "cup", "x0": 0.8, "y0": 0.9, "x1": 0.9, "y1": 1.0}])
    weights = make_dataset(tmp_path, rows, box_weight=3.0)[0, 0]["weights"]
    expected = torch.ones(8, 8)
    expected[:4, :2] = 3
    expected[7:, 6:8] = 3
    assert torch.equal(weights, expected)


def test_a_frame_of_another_aspect_is_cropped_in_its_middle(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    rows = make_rows((64, 32))
    pixels = make_dataset(tmp_path, rows)[0, 0]["pixels"][0]
    middle = to_model_input(rows[0]["image_0"].crop((16, 0, 48, 32)), 32, 32)
    assert torch.equal(pixels, middle)
    assert make_dataset(tmp_path, rows, size=None)[0, 0]["pixels"].shape == (2, 3, 24, 44)


def test_boxes_move_with_the_crop(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    """A box over the left quarter of a wide frame lies outside the middle; one from there on fills its left half."""
    beside = make_rows((64, 32))
    assert (make_dataset(tmp_path, beside, box_weight=3.0)[0, 0]["weights"] == 1).all()
    inside = make_rows((64, 32), name="inside", boxes_0=[{**BOX, "x0": 0.25, "x1": 0.5, "y1": 1.0}])
    expected = torch.ones(8, 8)
    expected[:, :4] = 3
    assert torch.equal(make_dataset(tmp_path, inside, box_weight=3.0)[0, 0]["weights"], expected)


@pytest.mark.parametrize(
    ("frame", "size", "window"),
    [
        ((64, 32), (32, 32), (0.25, 0, 0.75, 1)),
        ((32, 64), (32, 32), (0, 0.25, 1, 0.75)),
        ((50, 50), (8, 8), (0, 0, 1, 1)),
    ],
)
def test_the_crop_is_the_largest_middle_part_of_the_aspect(
    frame: tuple[int, int], size: tuple[int, int], window: tuple[float, ...]
) -> None:
    assert centre_crop(*frame, size) == pytest.approx(window)


def test_the_digest_changes_with_words_boxes_and_frames(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    def digest(*sizes: tuple[int, int], name: str, **changes: Any) -> str:
        return make_dataset(tmp_path, make_rows(*sizes, name=name, **changes)).digest()

    first = digest((32, 32), (32, 32), name="a")
    assert digest((32, 32), (32, 32), name="b") == first
    others = [
        digest((32, 32), (32, 32), name="c", action="wave"),
        digest((32, 32), (32, 32), name="d", description="the hand waves"),
        digest((32, 32), (32, 32), name="e", boxes_0=[{**BOX, "x1": 0.5}]),
        digest((32, 32), (32, 24), name="f"),
    ]
    assert len({first, *others}) == 5


def test_groups_are_sizes(make_rows: Callable[..., Dataset], tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, make_rows((32, 32), (64, 32), (32, 32)), size=None)
    assert dataset.groups() == [0, 1, 0]


# --- Computed once --------------------------------------------------------------------------------------------------


@pytest.fixture
def precomputed(tiny_pipeline: LegoPipeline, tmp_path: Path) -> Precomputed:
    return open_precomputed(
        tmp_path / "encoded", tiny_pipeline.vae, tiny_pipeline.text_encoder, tiny_pipeline.tokenizer
    )


def test_precomputed_samples_hold_what_the_models_give(
    make_rows: Callable[..., Dataset], tiny_pipeline: LegoPipeline, precomputed: Precomputed, tmp_path: Path
) -> None:
    rows = make_rows((32, 32), (32, 32))
    dataset, plain = make_dataset(tmp_path, rows, precomputed=precomputed), make_dataset(tmp_path, rows)
    fill_latents([dataset], tiny_pipeline.vae)
    fill_prompts([dataset], tiny_pipeline.encode_prompt)
    item, pixels = dataset[2, 1], plain[2, 1]["pixels"]
    with torch.no_grad():
        posterior = tiny_pipeline.vae.encode(pixels).latent_dist
        prompt = tiny_pipeline.encode_prompt(["open left drawer 1"])[0]
    assert torch.allclose(item["image_latents"], posterior.mean[0], atol=1e-5)
    assert torch.allclose(item["target"], posterior.mean[1], atol=1e-5)
    assert torch.allclose(item["target_std"], posterior.std[1], atol=1e-5)
    assert torch.allclose(item["prompt_embeds"], prompt, atol=1e-5)


def test_a_fill_that_was_killed_goes_on_to_the_same_latents(
    make_rows: Callable[..., Dataset], tiny_pipeline: LegoPipeline, precomputed: Precomputed, tmp_path: Path
) -> None:
    """A batch holds the same frames again, so that no bit depends on which of them were there already."""
    dataset = make_dataset(tmp_path, make_rows(*[(32, 32)] * 3), precomputed=precomputed)
    fill_latents([dataset], tiny_pipeline.vae, batch_size=4)
    partial = replace(precomputed, store=ShardStore(tmp_path / "partial"))
    key = dataset.latents_key(1, 0)
    partial.store.add(key, precomputed.store.get(key))
    again = make_dataset(tmp_path, read_manifest(tmp_path / "data"), precomputed=partial)
    seen = []
    encode = AutoencoderKL.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", lambda vae, pixels: seen.append(len(pixels)) or encode(vae, pixels))
        fill_latents([again], tiny_pipeline.vae, batch_size=4)
    assert seen == [4, 2]
    for sample in range(3):
        for k in (0, 1):
            key = dataset.latents_key(sample, k)
            assert torch.equal(partial.store.get(key)["mean"], precomputed.store.get(key)["mean"])


def test_latents_are_known_by_autoencoder_frame_size_crop_and_side(
    make_rows: Callable[..., Dataset], tiny_pipeline: LegoPipeline, tmp_path: Path
) -> None:
    rows, keys = make_rows((32, 32), (64, 32)), []

    def add(**changes: Any) -> None:
        parts = (tiny_pipeline.vae, tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)
        dataset = make_dataset(tmp_path, rows, precomputed=open_precomputed(tmp_path, *parts), flips=True, **changes)
        keys.extend(dataset.latents_key(sample, k) for sample in range(4) for k in (0, 1))

    add()
    add(resolution=64, size=(64, 64))
    next(tiny_pipeline.vae.parameters()).data[0] += 1
    add()
    tiny_pipeline.vae.register_to_config(norm_num_groups=2)
    add()
    assert len(set(keys)) == len(keys) == 32


def test_labels_are_encoded_only_where_they_may_be_asked_for(
    make_rows: Callable[..., Dataset], tiny_pipeline: LegoPipeline, precomputed: Precomputed, tmp_path: Path
) -> None:
    class Described(PairDataset):
        def texts(self, sample: int) -> tuple[str, str]:
            return f"description {sample}", f"label {sample}"

    rows = make_rows((32, 32), (32, 32))
    facts = [read_facts(rows, tmp_path / "frames")]
    counts = []
    for vlm_dropout in (0.0, 0.5):
        draws = Draws(seed=0, alphas_cumprod=ALPHAS, vlm_dropout=vlm_dropout)
        sizes: dict[str, Any] = {"resolution": 32, "factor": 4, "latent_channels": 6, "size": (32, 32)}
        fill_prompts([Described([rows], facts, draws, precomputed=precomputed, **sizes)], tiny_pipeline.encode_prompt)
        counts.append(len(precomputed.store))
    assert counts == [2, 4]


# --- Loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_and_leave_the_global_generator_alone(
    num_workers: int, make_rows: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset = make_dataset(tmp_path, make_rows((32, 32), (32, 32), (32, 32)))
    plan = [[(0, 2), (0, 0)], [(1, 1), (1, 2)], [(2, 0)]]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    batches = list(load_batches(dataset, iter(plan), num_workers=num_workers))
    assert torch.equal(torch.rand(1), expected)
    assert len(batches) == 3
    for batch, places in zip(batches, plan, strict=True):
        assert_equal_items(batch, collate([dataset[place] for place in places]))


def test_workers_read_stores_that_the_parent_opened(
    make_rows: Callable[..., Dataset], tiny_pipeline: LegoPipeline, precomputed: Precomputed, tmp_path: Path
) -> None:
    dataset = make_dataset(tmp_path, make_rows((32, 32), (32, 32)), precomputed=precomputed)
    fill_latents([dataset], tiny_pipeline.vae)
    fill_prompts([dataset], tiny_pipeline.encode_prompt)
    expected = collate([dataset[0, 0], dataset[0, 1]])
    loaded = next(load_batches(dataset, [[(0, 0), (0, 1)]], num_workers=1))
    assert_equal_items(loaded, expected)
