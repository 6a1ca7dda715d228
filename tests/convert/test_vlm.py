"""A LLaVA folder of the original layout: exact, with the release's prompt and token ids, and one shard in memory."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_folder
import PIL.Image
import pytest
import released_vlm
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from lego_pipeline.cli import main
from lego_pipeline.convert import vlm as module
from lego_pipeline.convert.vlm import IMAGE_TOKEN, convert_vlm, load_tokenizer
from lego_pipeline.vlm import llava
from lego_pipeline.vlm.load import load_processor, load_vlm

LLAMA, VISION = make_folder.LLAVA["llama"], make_folder.LLAVA["vision"]
PREFIX = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the reference's form with a tiny LLaVA's config and weights, without features."""
    folder = tmp_path_factory.mktemp("source")
    make_folder.write_llava(folder, torch.Generator().manual_seed(0))
    return folder


@pytest.fixture
def original(source: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The VLM's folder, two .bin shards, and that of its vision tower."""
    return released_vlm.write_original(source, tmp_path / "original")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(("shards", "suffix"), [(2, "bin"), (3, "safetensors")])
def test_weights_are_renamed_and_not_changed(source: Path, tmp_path: Path, shards: int, suffix: str) -> None:
    folder, tower = released_vlm.write_original(source, tmp_path, shards, suffix)
    report = convert_vlm(folder, tmp_path / "vlm", vision_tower=str(tower))
    given, found = load_file(source / released_vlm.STATE_DICT), weights_of(tmp_path / "vlm")
    vocabulary = LLAMA["vocab_size"]
    for name, tensor in given.items():
        if name.startswith(PREFIX):
            ours = found["model.vision_tower." + name.removeprefix(PREFIX)].half()
        else:
            ours = found[module.new_name(name)]
        assert torch.equal(
            ours[:vocabulary] if name in ("lm_head.weight", "model.embed_tokens.weight") else ours, tensor
        )
    assert torch.equal(found["model.multi_modal_projector.linear_2.weight"], torch.eye(32).half())
    assert report.vision_difference == 0
    assert (report.image_token_id, report.num_image_tokens, report.shards) == (vocabulary, 4, shards + 1)
    assert report.parameters == sum(tensor.numel() for tensor in found.values())


def test_transformers_loads_it_whole_with_processor_and_generation_settings(
    original: tuple[Path, Path], tmp_path: Path, frame: PIL.Image.Image
) -> None:
    convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]))
    vlm, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "vlm", output_loading_info=True)
    assert not any(info.values())
    assert vlm.generation_config.suppress_tokens == [vlm.config.image_token_id]
    assert (vlm.config.vision_feature_layer, vlm.config.projector_hidden_act) == (-2, "linear")
    processor = load_processor(str(tmp_path / "vlm"))
    prompt = llava.prompt_inputs(processor, [frame], ["Why ?"])[0]
    assert (prompt["input_ids"] == vlm.config.image_token_id).sum() == 4
    assert prompt["pixel_values"].shape[-2:] == (28, 28)
    enhancement = llava.embed(vlm, processor, [frame], ["Why ?"], ["word7 word8"])[0]
    assert enhancement.image_embeds.shape == (4, 32)
    assert llava.generate(vlm, processor, [frame], ["Why ?"], max_new_tokens=4, temperature=0)


@torch.no_grad()
def test_the_image_token_is_never_the_likeliest(original: tuple[Path, Path], tmp_path: Path) -> None:
    report = convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]))
    vlm = load_vlm(str(tmp_path / "vlm"), dtype=torch.float32)
    logits = vlm.lm_head(torch.randn(500, 32, generator=torch.Generator().manual_seed(1)) * 30)
    assert (logits.argmax(-1) != report.image_token_id).all()


def test_a_dtype_is_applied_to_everything(
    original: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COPIED", 10_000)  # so that a shard is written in parts
    report = convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "vlm").values()} == {torch.bfloat16}
    assert report.shards > 3
    load_vlm(str(tmp_path / "vlm"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "pytorch_model-00001-of-00002.bin"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def test_all_problems_with_names_are_one_error(original: tuple[Path, Path], tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        gone = next(name for name in state if "q_proj" in name)
        state["model.layers.0.extra.weight"] = state.pop(gone)
        state["model.norm.weight"] = torch.ones(3)

    change_weights(original[0], change)
    with pytest.raises(ValueError, match="`checkpoint` must hold the entries that its config.json says") as raised:
        convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]))
    message = str(raised.value)
    assert "1 missing: model.layers." in message
    assert "1 unknown: model.layers.0.extra.weight" in message
    assert "1 of another shape: model.norm.weight (3,) instead of (32,)" in message
    assert not (tmp_path / "vlm").exists()


def test_vision_weights_that_differ_are_told_and_the_towers_are_taken(
    original: tuple[Path, Path], tmp_path: Path
) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        name = next(name for name in state if name.startswith(PREFIX))
        state[name] = state[name] + 1

    change_weights(original[0], change)
    report = convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]))
    assert report.vision_difference == pytest.approx(1, abs=0.01)


def test_another_vision_tower_is_refused(original: tuple[Path, Path], tmp_path: Path) -> None:
    larger = CLIPVisionConfig(**{**VISION, "image_size": 56})
    CLIPVisionModel(larger).save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="1 of another shape: .*position_embedding.weight .* instead of"):
        convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(tmp_path / "larger"))

    def change(state: dict[str, torch.Tensor]) -> None:
        state[f"{PREFIX}extra.weight"] = torch.ones(1)
        state[f"{PREFIX}embeddings.position_ids"] = torch.arange(5)[
            None
        ]  # a buffer that transformers saved until 4.31

    change_weights(original[0], change)
    with pytest.raises(ValueError, match=r"1 unknown: \S*extra.weight\. "):
        convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]))


def test_a_name_in_two_shards_is_refused(original: tuple[Path, Path], tmp_path: Path) -> None:
    other = torch.load(original[0] / "pytorch_model-00002-of-00002.bin", weights_only=True)
    name = next(name for name in other if "q_proj" in name)
    change_weights(original[0], lambda state: state.update({name: other[name] + 1}))
    with pytest.raises(ValueError, match=f"1 in two shards: {name}"):
        convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]))


def test_a_model_that_is_there_is_left_alone(original: tuple[Path, Path]) -> None:
    before = {path: path.read_bytes() for path in original[0].iterdir()}
    with pytest.raises(ValueError, match="`output` must be a new or an empty folder"):
        convert_vlm(original[0], original[0], vision_tower=str(original[1]))
    assert {path: path.read_bytes() for path in original[0].iterdir()} == before


def test_a_malicious_shard_runs_nothing(original: tuple[Path, Path], tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    shard = original[0] / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode())
    with pytest.raises(ValueError, match="reading it would use posix.system"):
        convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]))
    assert not mark.exists()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, "got mm_use_im_start_end=True"),
        ({"mm_projector_type": "mlp2x_gelu"}, "got mm_projector_type='mlp2x_gelu'"),
        ({"mm_vision_select_feature": "all"}, "`mm_vision_select_feature` must be one of patch, cls_patch"),
    ],
)
def test_another_llava_is_refused(
    original: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(original[0], **changes)
    with pytest.raises(ValueError, match=message):
        convert_vlm(original[0], tmp_path / "vlm", vision_tower=str(original[1]))


def test_missing_parts_are_named(original: tuple[Path, Path], tmp_path: Path) -> None:
    folder, tower = original
    with pytest.raises(ValueError, match="`vision_tower` must be a folder with a CLIP model"):
        convert_vlm(folder, tmp_path / "vlm", vision_tower="openai/clip-vit-large-patch14")
    for file in ("tokenizer.json", "pytorch_model-00002-of-00002.bin", "config.json"):
        broken = tmp_path / f"without_{file}"
        shutil.copytree(folder, broken)
        (broken / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"`checkpoint` must hold.*{file}"):
            convert_vlm(broken, tmp_path / "vlm", vision_tower=str(tower))


def test_the_command_converts_and_tells(
    original: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tower = original
    command = ["convert", "vlm", "--checkpoint", str(folder), "--vision-tower", str(tower)]
    assert main([*command, "--output", str(tmp_path / "a")]) == 0
    output = capsys.readouterr().out
    assert f"<image> is token {LLAMA['vocab_size']}, 4 of them for a frame" in output
    assert "equal to those of" in output
    assert main([*command, "--output", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_image_tokens"] == 4


def write_sentencepiece(folder: Path) -> Any:
    """A tokenizer.model as LLaMA has it (byte fallback, identity), and the processor of the sentencepiece library."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = ["How does the person properly open the drawer?", "[INST] <<SYS>>\nYou are a helpful language /INST"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 2048}))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_prompts_are_tokenised_in_two_pieces_as_the_release_does(tmp_path: Path) -> None:
    pieces = write_sentencepiece(tmp_path / "llama")
    tokenizer = load_tokenizer(tmp_path / "llama")
    assert len(tokenizer) == pieces.get_piece_size()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    first, second = "[INST] <<SYS>>\nYou are hé\n<</SYS>>\n\n", "\nHow does the person open it? [/INST]"
    expected = [pieces.bos_id(), *pieces.encode(first), image, image, *pieces.encode(second)]
    for read in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert read(first + IMAGE_TOKEN * 2 + second).input_ids == expected
        assert read("She opens it.", add_special_tokens=False).input_ids == pieces.encode("She opens it.")
        assert read.decode(pieces.encode("She opens the é.")) == "She opens the é."
        assert (read.pad_token, read.padding_side) == ("<unk>", "right")


def test_sentencepiece_missing_gives_the_line_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").touch()
    monkeypatch.setattr(module, "_is_installed", lambda name: name != "sentencepiece")
    with pytest.raises(ImportError, match=r'needs sentencepiece; run `pip install "lego-pipeline\[convert\]"`'):
        load_tokenizer(tmp_path)


MEASURE = """
import json, re, sys
from pathlib import Path
from lego_pipeline.convert.vlm import convert_vlm
def peak():  # not `ru_maxrss`, which starts with the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
convert_vlm(Path(sys.argv[1]), Path(sys.argv[3]), vision_tower=sys.argv[2])
print(json.dumps([before, peak()]))
"""
CONSTANT = 150 << 20  # bytes: vision tower, tokenizer, config, what Python keeps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "suffix"), [(20, "bin"), (4, "safetensors")], ids=["2-GiB-bin", "400-MiB-safetensors"]
)
def test_memory_is_one_shard(original: tuple[Path, Path], tmp_path: Path, layers: int, suffix: str) -> None:
    folder, tower = original
    width, hidden, shards = 2048, 5632, 4
    edit_config(folder, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=16)
    small = {"model.embed_tokens.weight": (LLAMA["vocab_size"], width), "lm_head.weight": (LLAMA["vocab_size"], width)}
    small |= {"model.norm.weight": (width,), "model.mm_projector.bias": (width,)}
    small |= {"model.mm_projector.weight": (width, VISION["hidden_size"])}
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    places, sizes = {}, []
    for shard in range(shards):
        shapes = dict(small) if shard == 0 else {}
        for number in range(shard, layers, shards):
            layer = f"model.layers.{number}."
            shapes |= {f"{layer}self_attn.{key}_proj.weight": (width, width) for key in "qkvo"}
            shapes |= {f"{layer}mlp.{key}_proj.weight": (hidden, width) for key in ("gate", "up")}
            shapes |= {f"{layer}mlp.down_proj.weight": (width, hidden)}
            shapes |= {f"{layer}{key}_layernorm.weight": (width,) for key in ("input", "post_attention")}
        file = folder / f"part-{shard}.{suffix}"
        tensors = {name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}
        torch.save(tensors, file) if suffix == "bin" else save_file(tensors, file)
        places |= dict.fromkeys(tensors, file.name)
        sizes.append(file.stat().st_size)
    index = "pytorch_model.bin.index.json" if suffix == "bin" else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": places}))
    command = [sys.executable, "-c", MEASURE, str(folder), str(tower), str(tmp_path / "vlm")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    before, after = json.loads(result.stdout.splitlines()[-1])
    print(f"{sum(sizes) >> 20} MiB in shards of {max(sizes) >> 20}: peak {(after - before) >> 20} MiB above imports")
    shutil.rmtree(tmp_path / "vlm")
    assert after > before  # the shards are more than what imports took, so something was measured
    assert sum(sizes) > layers * 95 << 20
    assert after - before <= 1.5 * max(sizes) + CONSTANT
