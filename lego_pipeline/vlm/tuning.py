"""Instruction tuning of a VLM of any family: which weights are trained, as a whole or by adapters, and on what loss.

Trained weights are float32 whatever the others are. The vision side stays frozen and without dropout; with adapters
(LoRA) the language model's linear layers get them, and the connector is trained as a whole.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from lego_pipeline.vlm import family_of
from lego_pipeline.vlm.base import base_model
from lego_pipeline.vlm.load import NEEDS_PEFT, load_adapter, load_vlm


def load_in_4_bits(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A VLM whose language model's linear layers are held in 4 bits (NF4, scales quantised too), all else in `dtype`.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if not is_bitsandbytes_available():
        raise ImportError('4-bit weights need bitsandbytes; run `pip install "lego-pipeline[quantization]"`.')
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    family = family_of(empty)
    whole = [*family.vision_modules(empty), *family.language_modules(empty)]
    kept = {id(module) for module in whole if module is not empty.get_decoder()}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # For 4 bits too, whatever its name.
        llm_int8_skip_modules=[name for name, module in empty.named_modules() if id(module) in kept],
    )
    return load_vlm(folder, dtype=dtype, quantization_config=quantization, device_map={"": device})


def train_whole(vlm: Any) -> Any:
    """The VLM with connector, language model and head trained."""
    vlm.requires_grad_(False)
    for module in family_of(vlm).language_modules(vlm):
        module.requires_grad_(True)
    return _in_single_precision(vlm)


def train_adapters(vlm: Any, *, rank: int, alpha: int, dropout: float, seed: int) -> Any:
    """The VLM wrapped by peft, with adapters on the language model's linear layers, and the connector trained.

    Args:
        vlm: a transformers model, in 4 bits or not.
        rank, alpha, dropout: of the adapters, which are scaled by alpha / rank.
        seed: of the adapters' first weights; with these the VLM's answers are still the old ones.

    Raises:
        ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(NEEDS_PEFT) from error
    family = family_of(vlm)
    vlm.requires_grad_(False)
    adapters = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=family.LORA_TARGETS,
        modules_to_save=family.connector_names(vlm),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(vlm, adapters)
    return _in_single_precision(wrapped)


def merge_adapter(folder: str, adapter: Path, dtype: torch.dtype) -> Any:
    """A VLM from its folder with an adapter's folder merged into its weights, all of them in `dtype`."""
    return load_adapter(load_vlm(folder, dtype=dtype), adapter).merge_and_unload().to(dtype)


def trained_parameters(vlm: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimiser gets."""
    return [parameter for parameter in vlm.parameters() if parameter.requires_grad]


def frozen_weights(vlm: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that training leaves as they are, by name: a state of a run holds the others."""
    return {name: t for name, t in vlm.state_dict(keep_vars=True).items() if not t.requires_grad}


def set_training(vlm: nn.Module) -> None:
    """Training mode for all but the vision side."""
    vlm.train()
    for module in family_of(vlm).vision_modules(vlm):
        module.eval()


def checkpoint_activations(vlm: Any) -> None:
    """Keeps only the layers' inputs for the backward pass, which computes the layers again."""
    base_model(vlm).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def answer_loss(vlm: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Cross-entropy of the answers' tokens, summed over them.

    Args:
        vlm: the VLM, wrapped by peft and accelerate or not.
        batch: of a family's `training_batch`; logits are made from the first counted token on.
        device: of the VLM.
    """
    labels = batch["labels"][:, 1:]
    first = int((labels != -100).any(0).nonzero()[0])
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    logits = vlm(**inputs, logits_to_keep=labels.shape[1] + 1 - first, use_cache=False).logits[:, :-1]
    targets = labels[:, first:].to(device)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def count_tokens(batches: Iterable[dict[str, torch.Tensor]]) -> int:
    """Tokens that the loss of some batches counts."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def _in_single_precision(vlm: Any) -> Any:
    for parameter in trained_parameters(vlm):
        parameter.data = parameter.data.float()
    return vlm
