"""What the converted VLM makes of the inputs in a `vllm` folder; see `released.py`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from lego_pipeline.convert.vlm import VISION, convert_vlm
from lego_pipeline.vlm import llava
from lego_pipeline.vlm.load import load_vlm

STATE_DICT, CONFIG, FEATURES = "tiny_llava_state_dict.safetensors", "tiny_llava_config.json", "vllm_features"


def read_features(folder: Path) -> dict[str, torch.Tensor]:
    """Arrays of the folder."""
    with np.load(folder / f"{FEATURES}.npz", allow_pickle=False) as archive:
        return {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}


def write_original(folder: Path, work: Path, shards: int = 2, suffix: str = "bin") -> tuple[Path, Path]:
    """The folder's VLM as the release lays it out, and its vision tower, below `work`.

    Args:
        folder: with state dict and config of the reference.
        shards, suffix: how many weight files, and of which kind, "bin" or "safetensors".
    """
    facts = json.loads((folder / CONFIG).read_text())
    original, tower = work / "llava-llama-2", work / "tower"
    original.mkdir(parents=True)
    config = {**facts["llama"], "model_type": "llava", "rope_theta": facts["rope_theta"]}
    config |= {name: value for name, value in facts.items() if name.startswith("mm_")}
    (original / "config.json").write_text(json.dumps(config | {"architectures": ["LlavaLlamaForCausalLM"]}))
    state = load_file(folder / STATE_DICT)
    names, places = list(state), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: state[name].clone() for name in names[number::shards]}
        save_shard(part, original / file)
        places |= dict.fromkeys(part, file)
    index = {"bin": "pytorch_model.bin.index.json", "safetensors": "model.safetensors.index.json"}[suffix]
    (original / index).write_text(json.dumps({"weight_map": places}))
    write_tokenizer(original, facts["llama"])
    vision = CLIPVisionModel(CLIPVisionConfig(**facts["vision"]))
    prefix = f"{VISION}vision_tower.vision_model."
    vision.load_state_dict({n.removeprefix(prefix): t.float() for n, t in state.items() if n.startswith(prefix)})
    vision.save_pretrained(tower)
    return original, tower


def save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A weight file of the kind that its suffix says."""
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)


def write_tokenizer(folder: Path, llama: dict[str, Any]) -> None:
    """One word for each row of the embedding, under the config's ids of the marks."""
    words = [f"word{i}" for i in range(llama["vocab_size"])]
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    ids = {"<s>": llama["bos_token_id"], "</s>": llama["eos_token_id"], "<unk>": llama["pad_token_id"]}
    for mark, place in ids.items():
        words[place] = mark
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)


def build_vlm(folder: Path, work: Path) -> Any:
    """The folder's VLM, converted as a user would and loaded in float32."""
    original, tower = write_original(folder, work)
    convert_vlm(original, work / "converted", vision_tower=str(tower))
    return load_vlm(str(work / "converted"), dtype=torch.float32).eval()


@torch.no_grad()
def features(vlm: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """vllm_features: embeddings, logits, the answer that the head chooses, and the loss of tuning on it."""
    ids: list[int] = []
    for token in given["prompt_ids"][0].tolist():
        ids += [vlm.config.image_token_id] * vlm.config.image_seq_length if token < 0 else [token]
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": given["pixel_values"]}
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=vlm.config.text_config.pad_token_id))
    with (
        mock.patch.object(llava, "prompt_inputs", lambda *_: [inputs]),
        mock.patch.object(llava, "answer_ids", lambda *_: given["generated_ids"].tolist()),
    ):
        enhancement = llava.embed(vlm, processor, [None], [""], [""])[0]
        batch = llava.training_batch(processor, [None], [""], [""])
    old = [i for i in range(vlm.config.text_config.vocab_size) if i != vlm.config.image_token_id]
    logits = vlm.lm_head(enhancement.text_embeds)[:, old]
    tuning = vlm(**batch).logits[:, :-1, old]
    return {
        "image_feature": enhancement.image_embeds,
        "text_feature": enhancement.text_embeds,
        "teacher_forced_rows": enhancement.text_embeds,
        "logits_first_step": logits[:1],
        "generated_ids": vlm.lm_head(enhancement.text_embeds).argmax(-1),
        "tuning_loss": torch.nn.functional.cross_entropy(tuning.flatten(0, 1), batch["labels"][:, 1:].flatten()),
    }
