"""Computed memory: against numbers by hand, and (slow) against what a process takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.memory import StepMemory, ldm_memory, step_memory, vlm_memory
from lego_pipeline.vlm import tuning

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "train" / "configs" / "shapes"

# Largest resident set of three steps of the embedded UNet and projector, above what the libraries take. A small UNet
# first: code that is read for the first time is no memory of the model.
MEASURE = """
import gc, json, sys
from pathlib import Path
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from lego_pipeline.checkpoints import KITCHEN
from lego_pipeline.diffusion_step import Denoiser, losses_of
from lego_pipeline.projector import LegoProjector
from lego_pipeline.training import ResumableEma

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

def train(unet, projector, size, steps):
    denoiser = Denoiser(unet, projector, 0.05).train()
    optimizer, ema = torch.optim.AdamW(denoiser.parameters()), ResumableEma(denoiser.parameters())
    sizes = projector.config
    for _ in range(steps):
        latents = torch.randn(size, unet.config.out_channels, 8, 8)
        prompt = torch.randn(size, 77, sizes.cross_attention_dim)
        batch = {name: latents for name in ("noisy", "image_latents", "goal")}
        batch |= {"prompt_embeds": prompt, "null_condition": projector.null_condition(prompt[:1])}
        batch |= {"drop": torch.rand(size), "no_vlm": torch.zeros(size, dtype=torch.bool)}
        batch |= {"timestep": torch.randint(1000, (size,)), "weights": torch.ones(size, 8, 8)}
        batch["image_embeds"] = torch.randn(size, sizes.num_image_tokens, sizes.vlm_dim)
        batch["text_embeds"] = torch.randn(size, sizes.num_text_tokens, sizes.vlm_dim)
        losses_of(denoiser, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(denoiser.parameters())

config = UNet2DConditionModel.load_config(KITCHEN, subfolder="unet")
projector = LegoProjector.load_config(KITCHEN, subfolder="projector")
small = {**config, "block_out_channels": (32, 32), "attention_head_dim": 4}
train(UNet2DConditionModel.from_config(small), LegoProjector.from_config(projector), 2, 2)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = peak()
unet = UNet2DConditionModel.from_config(config)
if sys.argv[2] == "True":
    unet.enable_gradient_checkpointing()
train(unet, LegoProjector.from_config(projector), int(sys.argv[1]), 3)
print(json.dumps(peak() - before))
"""


class Chain(nn.Module):
    """Three linear layers and two activations without biases; a wide middle."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Linear(8, 100, False),
            nn.Linear(100, 100, False),
            nn.Linear(100, 8, False),
        )
        self.middle.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(functional.silu(self.middle(functional.silu(self.first(x)))))


def chain_memory(batch: int, **options) -> StepMemory:
    with torch.device("meta"):
        model = Chain()
    return step_memory(model, lambda: model(torch.empty(batch, 8, device="meta")).sum(), **options)


def test_a_steps_parts_are_those_counted_by_hand():
    parts = chain_memory(1000, average=True).parts
    trained = 4 * (8 * 100 + 100 * 8)
    assert parts["weights"] == parts["gradients"] == parts["average"] == trained
    assert parts["moments"] == 2 * trained + 2 * 4  # two weights count their steps
    assert parts["frozen"] == 4 * 100 * 100
    # Input; what both activations read; what the last layer reads. The frozen layer needs no input of its own.
    assert parts["activations"] == 4 * 1000 * (8 + 100 + 100 + 100) + 4  # and the loss


def test_the_peak_is_more_than_what_is_there_at_any_one_time_but_less_than_all():
    memory = chain_memory(1000)
    held = memory.parts["weights"] + memory.parts["frozen"] + memory.parts["moments"]
    assert memory.phase == "backward"
    assert held + memory.parts["activations"] < memory.peak < 2 * sum(memory.parts.values())


def test_half_precision_halves_activations_and_copies_the_weights():
    plain, mixed = (chain_memory(1000, mixed_precision=precision).parts for precision in ("no", "bf16"))
    copies = 2 * (100 * 100 + 100 * 8)  # the first layer's is not needed again: its input has no gradient
    halves = (plain["activations"] - 4 * 1000 * 8) / 2 + 2 * 1000 * 8
    assert mixed["activations"] == pytest.approx(halves + copies, abs=8)
    assert {name: mixed[name] for name in ("weights", "gradients", "moments")} == {
        name: plain[name] for name in ("weights", "gradients", "moments")
    }


def test_attention_grows_with_the_length_and_not_with_its_square():
    def memory(length: int) -> int:
        weights = nn.Linear(16, 16, device="meta")

        def loss() -> torch.Tensor:
            x = weights(torch.empty(1, 2, length, 16, device="meta"))
            return functional.scaled_dot_product_attention(x, x, x).sum()

        return step_memory(weights, loss).parts["activations"]

    assert memory(4000) == pytest.approx(2 * memory(2000), rel=0.01)


def test_torchs_functions_are_back_in_their_places_afterwards():
    before = functional.linear, functional.scaled_dot_product_attention
    chain_memory(1, mixed_precision="bf16")
    assert (functional.linear, functional.scaled_dot_product_attention) == before


def test_the_ldms_weights_are_those_of_its_config_files_alone(tiny_folder, make_tiny_pipeline, tmp_path):
    for name in ("unet", "vae", "text_encoder", "projector"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_folder / name / "config.json", tmp_path / name)
    pipe = make_tiny_pipeline()
    memory = ldm_memory(tmp_path, batch_size=2, resolution=32)
    trained = sum(p.nbytes for module in (pipe.unet, pipe.projector) for p in module.parameters())
    assert memory.parts["weights"] == memory.parts["gradients"] == memory.parts["average"] == trained
    frozen = [*pipe.vae.parameters(), *pipe.text_encoder.parameters()]
    assert memory.parts["frozen"] == pytest.approx(sum(p.nbytes for p in frozen), rel=0.02)  # and buffers


def test_checkpoints_save_memory_and_encoding_in_the_step_takes_some(tiny_folder):
    options = {"batch_size": 4, "resolution": 128, "lora_rank": 2}
    plain, checkpointed = (ldm_memory(tiny_folder, **options, gradient_checkpointing=on) for on in (False, True))
    assert plain.parts["moments"] < 2 * plain.parts["frozen"] / 4  # of adapters and projector
    assert checkpointed.parts["activations"] < 0.6 * plain.parts["activations"]
    assert checkpointed.peak < plain.peak
    encoding = ldm_memory(tiny_folder, **options, gradient_checkpointing=True, precompute=False)
    assert encoding.parts["weights"] == checkpointed.parts["weights"]
    assert encoding.peak > checkpointed.peak


def test_a_vlm_with_adapters_keeps_moments_of_what_is_trained(tiny_components):
    vlm = type(tiny_components["vlm"])
    with torch.device("meta"):
        tuned = tuning.train_adapters(vlm(tiny_components["vlm"].config), rank=2, alpha=4, dropout=0.0, seed=0)
    tuned.train()
    memory = vlm_memory(tuned, batch_size=2, num_image_tokens=4)
    trained = sum(p.nbytes for p in tuning.trained_parameters(tuned))
    assert memory.parts["weights"] == memory.parts["gradients"] == trained
    assert memory.parts["average"] == 0
    four_bits = vlm_memory(tuned, batch_size=2, num_image_tokens=4, is_four_bit=True)
    layers = [(name, p) for name, p in tuned.named_parameters() if "language_model.layers" in name and p.ndim == 2]
    matrices = [p for name, p in layers if "lora" not in name]
    saved = memory.parts["frozen"] - four_bits.parts["frozen"]
    assert saved == pytest.approx(sum(p.nbytes for p in matrices) * (1 - 4.127 / 32), rel=0.01)


def test_the_table_names_its_rows_and_the_peak():
    table = StepMemory(parts={"frozen": 0, "weights": 3_510_000_000}, peak=21 * 10**9, phase="AdamW").table()
    assert "trained weights                3.51 GB" in table
    assert "at most in use, AdamW         21.00 GB" in table
    assert "frozen" not in table


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is known on Linux alone")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_process_takes_what_was_computed(checkpointed: bool):
    computed = ldm_memory(KITCHEN, batch_size=32, gradient_checkpointing=checkpointed)
    expected = computed.peak - computed.parts["frozen"]  # VAE and text encoder don't take part here
    # What is freed goes back to the system at once, so that a peak is what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, "32", str(checkpointed)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=0.15)
