"""How much memory a training step needs, computed without weights or data before anything is loaded.

Models are built on the meta device from their config files alone, and one step runs there: forward, backward and
AdamW. Tensors have shapes and no contents, so seconds on a CPU suffice for 7 B parameters. Every storage that an
operation makes is counted while it is alive, hence the activations that are kept for the backward pass, checkpointed
or not, and temporary tensors too.

Two things differ between devices and are imitated: attention keeps no matrix of weights, as in the fused kernels of
CPU and GPU, and mixed precision casts as on a GPU. Not in it: what CUDA takes for itself (context, libraries, parts of
the allocator that lie idle, work space of convolutions; 1 to 2 GB), the buckets in which several processes exchange
gradients (as much as these again), and loading.

Letters: B samples, L tokens, N_i VLM image tokens, D VLM width, K width of a frame's states.
"""

import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from lego_pipeline.diffusion_step import Denoiser, losses_of
from lego_pipeline.distillation import ADAPTED, Student
from lego_pipeline.export import with_weights
from lego_pipeline.lora import add_lora
from lego_pipeline.projector import LegoProjector
from lego_pipeline.stable_diffusion import widen_input
from lego_pipeline.vlm.base import base_model

GIGABYTE = 10**9
FOUR_BITS = 4.127 / 8  # bytes of a number: 4 bits, an 8-bit scale for 64 of them, a 32-bit one for 256 of these
ROWS = {
    "frozen": "frozen weights",
    "weights": "trained weights",
    "average": "averaged weights",
    "moments": "AdamW's moments",
    "gradients": "gradients",
    "activations": "kept for the backward pass",
}
# What the models here call of torch, by what CUDA's autocast computes in half and what in single precision.
HALF = ("linear", "conv2d", "scaled_dot_product_attention")
SINGLE = ("group_norm", "layer_norm", "cross_entropy")


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one process on one device.

    Attributes:
        parts: by the names of `ROWS`. Activations are what the forward pass leaves for the backward pass.
        peak: at most in use at a time, in forward, backward and AdamW. Less than all parts together, where
            activations go while gradients come; or more, by temporary tensors.
        phase: in which that is.
    """

    parts: Mapping[str, int]
    peak: int
    phase: str

    def table(self) -> str:
        """Lines of text, in GB of 10^9 bytes."""
        lines = [f"{ROWS[name]:<28} {size / GIGABYTE:6.2f} GB" for name, size in self.parts.items() if size]
        return "\n".join(
            [
                "memory of one process, computed:",
                *lines,
                f"{'at most in use, ' + self.phase:<28} {self.peak / GIGABYTE:6.2f} GB",
                "and 1 to 2 GB that CUDA takes for itself, on a GPU",
            ]
        )


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive: those it was shown, and those made inside the mode."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, weakref.finalize] = {}
        self.now = self.peak = 0

    def show(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.now += size
            self.peak = max(self.peak, self.now)
            self.alive[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.show(leaf)
        return result


class _Device:
    """What meta tensors lack: fused attention, and CUDA's autocast to `dtype`, None for none.

    Within `imitated`, torch's functions are replaced; modes of torch would be left in the backward pass, where
    checkpoints call them. Autocast keeps the half-precision copy of a weight to the end of the forward pass.
    """

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype
        self.copies: dict[int, torch.Tensor] | None = {}

    @contextmanager
    def imitated(self) -> Generator[None]:
        names = ("scaled_dot_product_attention",) if self.dtype is None else (*HALF, *SINGLE)
        originals = {name: getattr(functional, name) for name in names}
        replacements = {**originals, "scaled_dot_product_attention": _fused_attention}
        for name in names:
            setattr(functional, name, self._cast(replacements[name], self._single if name in SINGLE else self._half))
        try:
            yield
        finally:
            for name, function in originals.items():
                setattr(functional, name, function)

    def end_forward(self) -> None:
        self.copies = None

    def _cast(self, function: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

        return call

    def _half(self, value: Any) -> Any:
        if self.dtype is None or not torch.is_tensor(value) or not value.is_floating_point():
            return value
        if value.dtype == self.dtype:
            return value
        if not isinstance(value, nn.Parameter) or self.copies is None:
            return value.to(self.dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(self.dtype)
        return self.copies[id(value)]

    def _single(self, value: Any) -> Any:
        is_half = torch.is_tensor(value) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if is_half else value


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Keeps query, key, value, result and one number for each query; the CPU's kernel, the GPU's keep the same."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(repeats, -3) for tensor in (key, value))
    mask = None if attn_mask is None else attn_mask.to(query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )[0]


def step_memory(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    *,
    frozen: Iterable[nn.Module] = (),
    average: bool = False,
    mixed_precision: str = "no",
) -> StepMemory:
    """Memory of one optimiser step, after the first, when AdamW has its moments.

    Args:
        model: on the meta device, in training mode; what requires gradients is trained.
        loss: makes the scalar loss, on the meta device.
        frozen: further modules that lie on the device.
        average: whether averaged weights are kept.
        mixed_precision: no, fp16 or bf16.
    """
    live = _LiveBytes()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [tensor for module in (model, *frozen) for tensor in (*module.parameters(), *module.buffers())]
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[mixed_precision]
    peaks: dict[str, int] = {}

    def added(tensors: Iterable[torch.Tensor]) -> int:
        before = live.now
        for tensor in tensors:
            live.show(tensor)
        return live.now - before

    parts = {"weights": added(trained), "frozen": added(others)}
    with live:
        optimizer = torch.optim.AdamW(
            trained, foreach=False
        )  # on a GPU the scripts take the fused one, without temporary tensors
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        start = live.now
        optimizer.step()
        parts["moments"] = live.now - start
        optimizer.zero_grad()
        start = live.now
        shadow = [parameter.detach().clone() for parameter in trained] if average else []
        parts["average"] = live.now - start
        start = live.peak = live.now
        device = _Device(dtype)
        with device.imitated():
            value = loss()
            device.end_forward()
            parts["activations"] = live.now - start
            peaks["forward"], live.peak = live.peak, live.now
            value.backward()
        del value
        for parameter in trained:  # what this loss didn't reach
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        peaks["backward"], live.peak = live.peak, live.now
        parts["gradients"] = live.now - start
        optimizer.step()
        peaks["AdamW"] = live.peak
        del shadow
    phase = max(peaks, key=lambda name: peaks[name])
    return StepMemory(parts={name: parts[name] for name in ROWS}, peak=peaks[phase], phase=phase)


def ldm_memory(
    folder: str | Path,
    *,
    batch_size: int,
    resolution: int | None = None,
    vlm_sizes: tuple[int, int] | None = None,
    trains_projector: bool = True,
    lora_rank: int = 0,
    gradient_checkpointing: bool = False,
    mixed_precision: str = "no",
    average: bool = True,
    precompute: bool = True,
) -> StepMemory:
    """Memory of a step of `train/train_ldm.py`, with the VLM's embeddings from a cache.

    Args:
        folder: in diffusers' layout, or a repository of the model hub: LegoPipeline, InstructPix2Pix or Stable
            Diffusion 1.x. Only its `config.json` files are read, and `model_index.json` if it is there.
        batch_size: of one micro-batch.
        resolution: side in pixels; None = the pipeline's, or 256.
        vlm_sizes: (N_i, D) where the folder has no projector; None = the released 256 and 5120.
        trains_projector: whether VLM embeddings are used and the projector is trained.
        lora_rank: of adapters trained instead of the UNet; 0 = all weights.
        gradient_checkpointing: of the UNet.
        mixed_precision, average: see `step_memory`.
        precompute: False if VAE and text encoder run in the step.

    Raises:
        OSError: a config is missing.
    """
    vae, text_encoder, unet, projector = _ldm_models(folder, vlm_sizes)
    if lora_rank:
        with torch.device("meta"):
            add_lora(unet, lora_rank, lora_rank)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    projector.requires_grad_(trains_projector)
    denoiser = Denoiser(unet, projector, 0.05).train()
    side = _side(folder, vae, resolution)
    channels, sizes = vae.config["latent_channels"], projector.config

    def loss() -> torch.Tensor:
        with torch.device("meta"):
            latents = torch.empty(batch_size, channels, side, side)
            prompt = torch.empty(batch_size, text_encoder.config.max_position_embeddings, sizes["cross_attention_dim"])
            batch: dict[str, Any] = {name: latents for name in ("noisy", "image_latents", "goal")}
            batch |= {"prompt_embeds": prompt, "null_condition": projector.null_condition(prompt[:1])}
            batch |= {name: torch.empty(batch_size) for name in ("drop", "timestep")}
            batch |= {"no_vlm": torch.empty(batch_size, dtype=torch.bool), "weights": latents[:, 0]}
            if trains_projector:
                batch["image_embeds"] = torch.empty(batch_size, sizes["num_image_tokens"], sizes["vlm_dim"])
                batch["text_embeds"] = torch.empty(batch_size, sizes["num_text_tokens"], sizes["vlm_dim"])
            if not precompute:
                with torch.no_grad():
                    vae.encode(torch.empty(2 * batch_size, 3, *(2 * [resolution or _resolution(folder)])))
                    text_encoder(torch.empty(batch_size, prompt.shape[1], dtype=torch.long))
            return losses_of(denoiser, batch).mean()

    return step_memory(
        denoiser,
        loss,
        frozen=[vae, text_encoder],
        average=average,
        mixed_precision=mixed_precision,
    )


def distillation_memory(
    folder: str | Path,
    *,
    batch_size: int,
    resolution: int | None = None,
    lora_rank: int = 64,
    gradient_checkpointing: bool = False,
    mixed_precision: str = "no",
    average: bool = True,
) -> StepMemory:
    """Memory of a step of `train/distill_ldm.py` with a teacher of three passes.

    Args:
        folder, batch_size, resolution, mixed_precision, average: see `ldm_memory`.
        lora_rank: of the student's adapters.
        gradient_checkpointing: of the student.

    Raises:
        OSError: a config is missing.
    """
    vae, text_encoder, unet, projector = _ldm_models(folder, None)
    teacher = with_weights(unet, unet.state_dict()).requires_grad_(False)  # the same memory
    with torch.device("meta"):
        add_lora(unet, lora_rank, lora_rank, targets=ADAPTED)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    student, side = Student(unet).train(), _side(folder, vae, resolution)
    channels, sizes = vae.config["latent_channels"], projector.config
    length = text_encoder.config.max_position_embeddings + sizes["num_image_tokens"] + sizes["num_text_tokens"]

    def loss() -> torch.Tensor:
        with torch.device("meta"):
            latents = torch.empty(batch_size, channels, side, side)
            timestep, condition = (
                torch.empty(batch_size),
                torch.empty(batch_size, length, sizes["cross_attention_dim"]),
            )
            with torch.no_grad():
                stacked = torch.empty(3 * batch_size, 2 * channels, side, side)
                teacher(stacked, timestep.repeat(3), condition.repeat(3, 1, 1))
                aim = teacher(stacked[:batch_size], timestep, condition).sample  # instead of the average
            return (student(latents, timestep, condition, latents) - aim).mean()

    return step_memory(
        student,
        loss,
        frozen=[teacher, vae, text_encoder, projector],
        average=average,
        mixed_precision=mixed_precision,
    )


def _ldm_models(folder: str | Path, vlm_sizes: tuple[int, int] | None) -> tuple[Any, Any, Any, LegoProjector]:
    """VAE, text encoder, UNet and projector on the meta device."""
    with torch.device("meta"):
        vae = _from_config(AutoencoderKL, folder, "vae")
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))
        unet = _from_config(UNet2DConditionModel, folder, "unet")
        if unet.config["in_channels"] == vae.config["latent_channels"]:
            widen_input(unet, 2 * vae.config["latent_channels"])
        return vae, text_encoder, unet, _projector(folder, unet.config["cross_attention_dim"], vlm_sizes)


def _side(folder: str | Path, vae: Any, resolution: int | None) -> int:
    """Of the latents, in cells."""
    return (resolution or _resolution(folder)) // 2 ** (len(vae.config["block_out_channels"]) - 1)


def _from_config(kind: Any, folder: str | Path, component: str) -> Any:
    return kind.from_config(kind.load_config(folder, subfolder=component))


def _projector(folder: str | Path, width: int, vlm_sizes: tuple[int, int] | None) -> LegoProjector:
    try:
        return _from_config(LegoProjector, folder, "projector")
    except OSError:
        tokens, dim = vlm_sizes or (256, 5120)
        return LegoProjector(vlm_dim=dim, num_image_tokens=tokens, cross_attention_dim=width)


def _resolution(folder: str | Path) -> int:
    try:
        config: Any = DiffusionPipeline.load_config(folder)
    except OSError:
        return 256
    return config.get("resolution", 256)


def vlm_memory(
    vlm: Any,
    *,
    batch_size: int,
    num_image_tokens: int,
    num_text_tokens: int = 128,
    num_answer_tokens: int = 64,
    mixed_precision: str = "no",
    is_four_bit: bool = False,
) -> StepMemory:
    """Memory of a step of `train/tune_vlm.py`.

    Args:
        vlm: on the meta device, in training mode, wrapped by peft or not; what requires gradients is trained.
        batch_size: of one micro-batch.
        num_image_tokens: N_i.
        num_text_tokens: of question and answer, the longest of a batch.
        num_answer_tokens: those for which logits are made.
        mixed_precision: see `step_memory`.
        is_four_bit: whether the language model's frozen matrices are held in 4 bits (QLoRA).
    """
    base = base_model(vlm)
    decoder, head, width = base.get_decoder(), base.get_output_embeddings(), base.config.text_config.hidden_size

    def loss() -> torch.Tensor:
        with torch.device("meta"):
            # The frame's part comes out of the projector, which is trained, so gradients go down to the first layer.
            frame = torch.empty(batch_size, num_image_tokens, width, dtype=decoder.dtype, requires_grad=True)
            text = base.get_input_embeddings()(torch.empty(batch_size, num_text_tokens, dtype=torch.long))
            length = num_image_tokens + num_text_tokens
            mask = torch.empty(batch_size, 1, length, length, dtype=torch.bool)  # of rows padded to one length
            states = decoder(
                inputs_embeds=torch.cat([frame, text], 1), attention_mask=mask, use_cache=False
            ).last_hidden_state
            logits = head(states[:, -num_answer_tokens:]).float().flatten(0, 1)
            targets = torch.empty(len(logits), dtype=torch.long)
            return functional.cross_entropy(logits, targets, reduction="sum")

    memory = step_memory(vlm, loss, mixed_precision=mixed_precision)
    if not is_four_bit:
        return memory
    embedding = base.get_input_embeddings().weight
    matrices = [p for p in decoder.parameters() if p.ndim == 2 and not p.requires_grad and p is not embedding]
    saved = sum(p.nbytes - int(p.numel() * FOUR_BITS) for p in matrices)
    largest = max(p.nbytes for p in matrices)  # one at a time is made whole again
    parts = {**memory.parts, "frozen": memory.parts["frozen"] - saved}
    return StepMemory(parts=parts, peak=memory.peak - saved + largest, phase=memory.phase)
