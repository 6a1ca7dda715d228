"""tune_vlm.py at tiny size on pairs that come with the package, run in this process through its `main`.

By the training loop's clock every step of a sliced run takes a minute. Two processes are in a slow test.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_bitsandbytes_available

from lego_pipeline.data.manifest import read_manifest, write_shard
from lego_pipeline.vlm import VLM_FAMILIES, family_of, tuning
from train import tune_vlm

ROOT = Path(__file__).parents[2]
ADAPTERS = {"tuning": "lora", "lora_rank": 2, "lora_alpha": 6}
FAMILIES = pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
# Plain gradient descent: Adam's first steps are the gradient's sign, also where rounding alone decides about it.
WITH_SGD = """
import torch
from train import tune_vlm

torch.optim.AdamW = lambda parameters, rate, **_: torch.optim.SGD(parameters, rate)
tune_vlm.run(tune_vlm.main, tune_vlm.TuneVlmConfig)
"""


@pytest.fixture
def start(family: str, request: pytest.FixtureRequest) -> Path:
    """Folder of the tiny VLM of a family."""
    return request.getfixturevalue({"llava": "vlm_folder", "qwen3_vl": "qwen_folder"}[family])


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD instead of AdamW, see WITH_SGD."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, rate, **_: torch.optim.SGD(parameters, rate))


def settings(data: Path | tuple[Path, ...], vlm: Path, output_dir: Path, **changes: Any) -> tune_vlm.TuneVlmConfig:
    values = {
        "batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "log_every_steps": 1,
        "report_to": "none",
        **changes,
    }
    manifests = data if isinstance(data, tuple) else (data,)
    return tune_vlm.TuneVlmConfig(data=manifests, vlm=str(vlm), output_dir=output_dir, **values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def differences(first: Path, second: Path) -> set[str]:
    """Names of the tensors that differ between two folders, in a bit."""
    a, b = weights(first), weights(second)
    assert a
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def largest_difference(first: Path, second: Path) -> float:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llava", {}), ("qwen3_vl", {**ADAPTERS, "lora_dropout": 0.3, "gradient_checkpointing": True})],
)
def test_tuning_in_two_slices_gives_the_weights_of_one(
    changes: dict[str, Any], data: Path, start: Path, tmp_path: Path, minute_clock: None
) -> None:
    changes = {**changes, "validation_split": "val", "validate_every_steps": 2, "gradient_accumulation_steps": 2}
    tune_vlm.main(settings(data, start, tmp_path / "whole", **changes))
    sliced = settings(data, start, tmp_path / "sliced", max_minutes=1.5, **changes)
    tune_vlm.main(sliced)
    assert report(tmp_path / "sliced").items() >= {"step": 2, "finished": False}.items()
    tune_vlm.main(sliced)
    assert report(tmp_path / "sliced").items() >= {"step": 4, "finished": True}.items()
    assert differences(tmp_path / "whole" / "vlm", tmp_path / "sliced" / "vlm") == set()
    assert lines(tmp_path / "whole" / "validation.jsonl") == lines(tmp_path / "sliced" / "validation.jsonl")


@FAMILIES
def test_full_tuning_trains_all_but_the_vision_side(data: Path, start: Path, family: str, tmp_path: Path) -> None:
    tune_vlm.main(settings(data, start, tmp_path, max_steps=1))
    before, after = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (start, tmp_path / "vlm"))
    trained = {id(p) for part in VLM_FAMILIES[family].language_modules(before) for p in part.parameters()}
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    changed = {name: not torch.equal(p, q) for (name, p), q in pairs}
    assert changed == {name: id(p) in trained for name, p in before.named_parameters()}
    assert {name.split(".")[1] for name in changed if not changed[name]} == {
        "vision_tower" if family == "llava" else "visual"
    }


@FAMILIES
def test_adapters_change_linear_layers_of_the_language_model_and_the_connector(
    data: Path, start: Path, family: str, tmp_path: Path
) -> None:
    tune_vlm.main(settings(data, start, tmp_path, **ADAPTERS, max_steps=2))
    changed = differences(start, tmp_path / "vlm")
    connector = {name for name in changed if "projector" in name or "merger" in name}
    assert connector
    assert len(changed - connector) == {"llava": 2, "qwen3_vl": 3}[family] * 7  # layers, linear ones of each
    assert all("language_model" in name and "_proj" in name for name in changed - connector)


@FAMILIES
def test_the_adapter_folder_on_the_start_is_the_merged_folder(
    data: Path, start: Path, family: str, tmp_path: Path
) -> None:
    tune_vlm.main(settings(data, start, tmp_path, **ADAPTERS, max_steps=2))
    plain = AutoModelForImageTextToText.from_pretrained(start)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    module, row = family_of(adapted), read_manifest(data / "train")[0]
    arguments = ([row["image_0"]], [row["action"]], [row["description"]])
    with torch.no_grad():
        one, other = (module.embed(vlm, processor, *arguments)[0] for vlm in (adapted, merged))
    assert torch.allclose(one.text_embeds, other.text_embeds, rtol=0, atol=1e-5)
    assert torch.allclose(one.image_embeds, other.image_embeds, rtol=0, atol=1e-6)
    assert "merge_and_unload" in (tmp_path / "adapter" / "README.md").read_text()


def test_accumulated_micro_batches_equal_one_batch(
    data: Path, vlm_folder: Path, tmp_path: Path, plain_descent: None
) -> None:
    changes = {"max_steps": 2, "validation_split": "val"}
    tune_vlm.main(settings(data, vlm_folder, tmp_path / "one", batch_size=4, **changes))
    split = {"batch_size": 1, "gradient_accumulation_steps": 4}
    tune_vlm.main(settings(data, vlm_folder, tmp_path / "many", **split, **changes))
    assert largest_difference(tmp_path / "one" / "vlm", tmp_path / "many" / "vlm") < 1e-7
    assert differences(vlm_folder, tmp_path / "one" / "vlm")
    for name in ("log.jsonl", "validation.jsonl"):
        one, many = lines(tmp_path / "one" / name), lines(tmp_path / "many" / name)
        assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in many], rel=1e-5)


def test_the_held_out_loss_is_the_mean_over_tokens_without_dropout(
    data: Path, vlm_folder: Path, tmp_path: Path
) -> None:
    tune_vlm.main(
        settings(data, vlm_folder, tmp_path, validation_split="val", learning_rate=0.0, max_steps=1,
                 batch_size=1, report_to="tensorboard", **ADAPTERS)
    )  # fmt: skip
    vlm, processor = AutoModelForImageTextToText.from_pretrained(vlm_folder), AutoProcessor.from_pretrained(vlm_folder)
    collate = tune_vlm.Collate("llava", processor, tune_vlm.DEFAULT_QUESTION)
    batch = collate(list(read_manifest(data, "val")))
    expected = tuning.answer_loss(vlm, batch, vlm.device).item() / tuning.count_tokens([batch])
    assert lines(tmp_path / "validation.jsonl") == [{"step": 1, "loss": pytest.approx(expected, rel=1e-5)}]
    assert report(tmp_path)["best_validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert list((tmp_path / "trackers").rglob("events.out.tfevents.*"))


def test_several_manifests_are_read_in_proportion_to_their_weights(
    data: Path, vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "action": "only this", "extra": 1} for row in read_manifest(data / "train")]
    write_shard(rows[:1], tmp_path / "other" / "000.parquet")
    seen: list[str] = []
    collate = tune_vlm.Collate.__call__

    def listen(self: Any, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.extend(row["action"] for row in batch)
        return collate(self, batch)

    monkeypatch.setattr(tune_vlm.Collate, "__call__", listen)
    both = (data / "train", tmp_path / "other")
    changes = {"data_weights": (1.0, 3.0), "batch_size": 16, "max_steps": 4, "learning_rate": 0.0}
    tune_vlm.main(settings(both, vlm_folder, tmp_path / "run", **changes))
    assert len(seen) == 64
    assert 0.6 < seen.count("only this") / 64 < 0.9


def test_weights_that_are_not_trained_may_be_of_half_width(data: Path, vlm_folder: Path, tmp_path: Path) -> None:
    half = {"dtype": "bfloat16", "mixed_precision": "bf16", "gradient_checkpointing": True}
    tune_vlm.main(settings(data, vlm_folder, tmp_path, **ADAPTERS, **half, max_steps=1))
    assert {tensor.dtype for tensor in weights(tmp_path / "vlm").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(tmp_path / "adapter").values()} == {torch.float32}


def test_loading_ahead_changes_nothing(data: Path, vlm_folder: Path, tmp_path: Path) -> None:
    changes = {**ADAPTERS, "lora_dropout": 0.3, "max_steps": 2}
    tune_vlm.main(settings(data, vlm_folder, tmp_path / "here", **changes))
    tune_vlm.main(settings(data, vlm_folder, tmp_path / "ahead", num_workers=1, **changes))
    assert differences(tmp_path / "here" / "vlm", tmp_path / "ahead" / "vlm") == set()


def test_tuning_refuses_rows_without_a_description(data: Path, vlm_folder: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in read_manifest(data / "train")]
    rows[1]["description"] = None
    write_shard(rows, tmp_path / "train" / "000.parquet")
    with pytest.raises(ValueError, match="must have a description in every row, .* lacks 1"):
        tune_vlm.main(settings(tmp_path, vlm_folder, tmp_path / "run"))


def test_tuning_refuses_a_template_that_does_not_lead_to_an_answer(
    data: Path, vlm_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(vlm_folder, tmp_path / "vlm")
    template = tmp_path / "vlm" / "chat_template.jinja"
    template.write_text(template.read_text().replace("{% if add_generation_prompt %}ASSISTANT: {% endif %}", ""))
    with pytest.raises(ValueError, match="`vlm` must have a chat template that puts an answer right after"):
        tune_vlm.main(settings(data, tmp_path / "vlm", tmp_path / "run"))


def test_4_bit_weights_need_bitsandbytes(
    data: Path, vlm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "lego-pipeline\[quantization\]"'):
        tune_vlm.main(settings(data, vlm_folder, tmp_path, tuning="qlora"))


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes (extra `quantization`) is not installed")
def test_4_bit_weights_are_tuned_by_adapters_in_two_slices_as_in_one(
    data: Path, vlm_folder: Path, tmp_path: Path, minute_clock: None
) -> None:
    changes = {**ADAPTERS, "tuning": "qlora", "dtype": "bfloat16", "mixed_precision": "bf16", "lora_dropout": 0.3}
    tune_vlm.main(settings(data, vlm_folder, tmp_path / "whole", **changes))
    sliced = settings(data, vlm_folder, tmp_path / "sliced", max_minutes=1.5, **changes)
    for _ in range(2):
        tune_vlm.main(sliced)
    assert report(tmp_path / "sliced") == {"step": 4, "finished": True}
    assert differences(tmp_path / "whole" / "adapter", tmp_path / "sliced" / "adapter") == set()
    assert not (tmp_path / "whole" / "vlm").exists()
    losses = [line["loss"] for line in lines(tmp_path / "whole" / "log.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question_template": "What?"}, "`question_template` must have exactly one {}"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"log_every_steps": 0}, "`log_every_steps` must be at least 1, got 0"),
        ({"validate_every_steps": 0}, "`validate_every_steps` must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` must be above 0, got 0.0"),
        ({"lora_alpha": 0}, "`lora_alpha` must be at least 1"),
        ({"lr_scheduler": "cosin"}, "`lr_scheduler` must be linear, .*, got 'cosin'"),
        ({"data_weights": (1.0, 2.0)}, r"`data_weights` must be one number for each `data` \(1\), got 2"),
        ({"lora_dropout": 1.0}, "`lora_dropout` must be at least 0 and below 1"),
        ({"mixed_precision": "int8"}, "`mixed_precision` must be no, fp16 or bf16"),
        ({"dtype": "bfloat16"}, "`dtype` must be float32 with `mixed_precision` no, .* pass --mixed-precision bf16"),
    ],
)
def test_mistakes_in_settings_are_named(changes: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(data, tmp_path, tmp_path, **changes)


def test_a_vlm_that_is_not_there_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`vlm` must be a folder with a VLM and its processor, .* got .*none"):
        tune_vlm.main(settings(data, tmp_path / "none", tmp_path))


def write_again(rows: list[dict[str, Any]], data: Path, **changes: Any) -> Path:
    write_shard([{**rows[0], **changes}, *rows[1:]], data / "train" / "000.parquet")
    return data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1.0}, "learning_rate: 0.01 -> 1.0"),
        ({"max_steps": 1}, "`max_steps` must be at least 2"),
    ],
)
def test_a_run_that_is_refused_leaves_its_files(
    changes: dict[str, Any], words: str, data: Path, vlm_folder: Path, tmp_path: Path
) -> None:
    tune_vlm.main(settings(data, vlm_folder, tmp_path, max_steps=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=words):
        tune_vlm.main(settings(data, vlm_folder, tmp_path, **{"max_steps": 2, **changes}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_does_not_go_on_from_other_frozen_weights(
    tuning: str, data: Path, vlm_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(vlm_folder, tmp_path / "vlm")
    config = settings(data, tmp_path / "vlm", tmp_path / "run", tuning=tuning, max_steps=1)
    tune_vlm.main(config)
    tune_vlm.main(config)
    vlm = AutoModelForImageTextToText.from_pretrained(vlm_folder)
    part = vlm.get_decoder() if tuning == "lora" else vlm.model.vision_tower
    with torch.no_grad():
        next(p for name, p in part.named_parameters() if name.endswith("k_proj.weight"))[0, 0] += 1e-3
    vlm.save_pretrained(tmp_path / "vlm")
    with pytest.raises(ValueError, match="changed are frozen weights: "):
        tune_vlm.main(config)


def test_a_run_does_not_go_on_with_a_manifest_that_was_edited(data: Path, vlm_folder: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in read_manifest(data / "train")]
    config = settings(write_again(rows, tmp_path / "data"), vlm_folder, tmp_path / "run", max_steps=1)
    tune_vlm.main(config)
    write_again(rows, tmp_path / "data", split="train", verb="seize")  # which isn't read
    tune_vlm.main(config)
    for changes in ({"description": "My left hand opens it."}, {"action": "open it"}, {"image_0": rows[1]["image_0"]}):
        write_again(rows, tmp_path / "data", **changes)
        with pytest.raises(ValueError, match="changed are rows: "):
            tune_vlm.main(config)


def test_the_key_of_rows_counts_image_files(data: Path, tmp_path: Path) -> None:
    row = read_manifest(data / "train")[0]
    record = {"id": "0", "image_0_file_name": "0.png", "action": row["action"], "description": row["description"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(record))
    row["image_0"].save(tmp_path / "0.png")
    first = tune_vlm.rows_key(read_manifest(tmp_path))
    assert tune_vlm.rows_key(read_manifest(tmp_path)) == first
    row["image_0"].resize((16, 16)).save(tmp_path / "0.png")
    assert tune_vlm.rows_key(read_manifest(tmp_path)) != first


@FAMILIES
def test_validation_leaves_the_vision_side_out_of_training_mode(data: Path, start: Path, family: str) -> None:
    vlm = tuning.train_whole(AutoModelForImageTextToText.from_pretrained(start))
    collate = tune_vlm.Collate(family, AutoProcessor.from_pretrained(start), tune_vlm.DEFAULT_QUESTION)
    tune_vlm.validate(Accelerator(), vlm, read_manifest(data, "val"), collate, 2)
    sides = (VLM_FAMILIES[family].vision_modules(vlm), [vlm.get_decoder()])
    modes = [{module.training for part in side for module in part.modules()} for side in sides]
    assert modes == [{False}, {True}]


def test_a_manifest_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`data` must name at least one"):
        settings((), tmp_path, tmp_path)


@FAMILIES
@pytest.mark.parametrize("changes", [{}, ADAPTERS, {**ADAPTERS, "tuning": "qlora", "gradient_checkpointing": True}])
def test_the_dry_run_tells_the_memory(changes: dict[str, Any], data: Path, start: Path, tmp_path: Path) -> None:
    report = settings(data, start, tmp_path, **changes).report()
    assert "trained weights" in report
    assert "at most in use" in report


def test_the_memory_is_told_for_a_config_file_alone(data: Path, vlm_folder: Path, tmp_path: Path) -> None:
    shutil.copy(vlm_folder / "config.json", tmp_path)
    whole, alone = (settings(data, folder, tmp_path / "run").report() for folder in (vlm_folder, tmp_path))
    assert whole == alone


def test_a_vlm_that_is_not_there_leaves_the_memory_unknown(data: Path, tmp_path: Path) -> None:
    assert settings(data, tmp_path / "none", tmp_path).report().startswith("memory: unknown")


@pytest.mark.slow
def test_two_processes_equal_one(data: Path, vlm_folder: Path, tmp_path: Path, plain_descent: None) -> None:
    changes = {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "validation_split": "val"}
    tune_vlm.main(settings(data, vlm_folder, tmp_path / "one", batch_size=4, **changes))
    script = tmp_path / "tune.py"
    script.write_text(WITH_SGD)
    flags = ["--data", data, "--vlm", vlm_folder, "--output-dir", tmp_path / "two", "--batch-size", "1"]
    flags += ["--gradient-accumulation-steps", "2", "--expect-processes", "2", "--report-to", "none"]
    flags += [part for name, value in changes.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert largest_difference(tmp_path / "one" / "vlm", tmp_path / "two" / "vlm") < 1e-6
    one, two = (lines(tmp_path / name / "validation.jsonl") for name in ("one", "two"))
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)
