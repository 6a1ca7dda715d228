"""Train LEGO's latent diffusion model: UNet and projector on pairs, descriptions and embeddings (paper section 3.3).

    accelerate launch train/train_ldm.py --data DATA --cache runs/cache --pipeline START --output-dir runs/ldm

`--pipeline` is a LegoPipeline folder with the weights to start from (for SD 1.5 size: converted weights whose UNet has
the image channels appended and zeroed); VAE, text encoder and VLM stay frozen. Latents and text encodings are computed
once and held in memory; `output_dir/latents-SPLIT-KEY.safetensors` keeps the latents for the next slice, KEY standing
for the VAE, the resolution and the frames. All three projection modules are trained and averaged with the UNet, unlike
in the released code, where they are not in the optimiser; `--freeze-projections` reproduces the publication.

One CPU, one GPU or several GPUs take the same line (`accelerate config` decides). Several CPU processes:
`ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node 2 SCRIPT ...`, since accelerate's own
launcher needs MPI for that. Running the same command again goes on where the last one stopped. `output_dir/pipeline`
is a usable LegoPipeline folder after every slice.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Dataset, Image
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from lego_pipeline import LegoPipeline, images
from lego_pipeline.conditioning import drop_conditions
from lego_pipeline.config import parse_config, to_yaml
from lego_pipeline.data.boxes import box_mask
from lego_pipeline.data.embedding_cache import EmbeddingCache, model_key, write_atomically
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.training import ResumableEma, ResumableSteps

logger = logging.getLogger("train_ldm")


@dataclass(kw_only=True)
class TrainLdmConfig:
    data: Path  # manifest with image_0, image_1 and action
    pipeline: Path  # LegoPipeline folder to start from
    cache: Path | None = None  # embedding cache made by cache_embeddings.py; None: label only, no VLM parts
    output_dir: Path = Path("runs/ldm")
    split: str = "train"
    validation_split: str | None = "val"
    batch_size: int = 32  # pairs of one process and step
    max_steps: int = 20_000
    max_minutes: float = 0.0  # end this slice earlier, saved; 0 = run to max_steps
    save_every_minutes: float = 10.0
    validate_every_steps: int = 500
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant_with_warmup"  # any name of diffusers.optimization.get_scheduler
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    condition_dropout: float = 0.05  # of text only, both, image only, each
    vlm_dropout: float = 0.0  # share of samples with zeros for both VLM parts, half of them with the bare label
    freeze_projections: bool = False  # as in the released code
    timestep_sampling: str = "uniform"  # or log_normal: log sigma ~ N(log_sigma_mean, 1)
    log_sigma_mean: float = 0.8
    box_weight: float = 1.0  # of the loss inside hand and object boxes against 1 elsewhere
    mixed_precision: str = "no"  # no, fp16 or bf16
    seed: int = 0

    def __post_init__(self):
        if self.timestep_sampling not in ("uniform", "log_normal"):
            raise ValueError(f"`timestep_sampling` must be uniform or log_normal, got {self.timestep_sampling!r}.")
        for name in ("batch_size", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


class Denoiser(nn.Module):
    """What is trained: UNet and projector as one module, for gradient averaging over processes and for the EMA.

    Args:
        unet, projector: of the pipeline.
        dropout: share of samples that lose the text condition, both conditions, or the image condition, each.
    """

    def __init__(self, unet: nn.Module, projector: nn.Module, dropout: float = 0.05):
        super().__init__()
        self.unet, self.projector, self.dropout = unet, projector, dropout

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: dict[str, torch.Tensor], no_vlm: torch.Tensor
    ) -> torch.Tensor:
        """Prediction (B, c, h, w) for noisy latents (B, c, h, w); no_vlm (B,) bool."""
        image, text = batch.get("image_embeds"), batch.get("text_embeds")
        prompt = torch.where(batch["use_label"][:, None, None], batch["label_embeds"], batch["prompt_embeds"])
        condition = self.projector(prompt, image, text)
        vlm_part = torch.arange(condition.shape[1], device=condition.device) >= prompt.shape[1]
        condition = condition.masked_fill(no_vlm[:, None, None] & vlm_part[None, :, None], 0)
        condition, image_latents = drop_conditions(
            condition, batch["null_condition"], batch["image_latents"], batch["draws"], self.dropout
        )
        return self.unet(torch.cat([noisy, image_latents], 1), timesteps, condition).sample


def box_weights(boxes: list[list[dict]], height: int, width: int, weight: float) -> torch.Tensor:
    """(N, height, width) loss weights of latent cells: `weight` where a box of hand or object touches the cell."""
    return torch.stack([torch.where(box_mask(pair, height, width), weight, 1.0) for pair in boxes])


def latents_key(pipeline: LegoPipeline, rows: Dataset) -> str:
    """Key of what the VAE makes of some rows: its config and weights, the resolution, the rows' ids and frames."""
    config = {name: value for name, value in pipeline.vae.config.items() if not name.startswith("_")}
    facts = {"vae": model_key(pipeline.vae, json.dumps(config, sort_keys=True)), "side": pipeline.config.resolution}
    digest = hashlib.sha256(json.dumps(facts).encode())
    names = ("image_0", "image_1")
    encoded = rows.select_columns(["id", *names])
    for name in names:
        encoded = encoded.cast_column(name, Image(decode=False))
    for row in encoded:
        digest.update(row["id"].encode())
        for name in names:
            frame = row[name]
            if frame is not None:  # one that lacks is reported where frames are encoded
                digest.update(Path(frame["path"]).read_bytes() if frame["bytes"] is None else frame["bytes"])
    return digest.hexdigest()[:16]


class PairTensors:
    """Frozen inputs of training, computed once for every row: latents, text encodings, VLM embeddings, weights."""

    def __init__(
        self, pipeline: LegoPipeline, rows: Dataset, config: TrainLdmConfig, device: torch.device, split: str
    ):
        self.rows, self.device = rows, device
        memo = config.output_dir / f"latents-{split}-{latents_key(pipeline, rows)}.safetensors"
        if not memo.exists():
            encoded = self._encode_frames(pipeline)
            write_atomically(memo, lambda path: save_file(encoded, path))
        stored = load_file(memo)
        self.latents, self.target_std = stored["latents"], stored["target_std"]
        labels = rows["action"][:]
        descriptions = labels
        self.embeds: dict[str, torch.Tensor] = {}
        if config.cache is not None:
            known = _entries(config.cache, split)
            missing = [row_id for row_id in rows["id"][:] if row_id not in known]
            if missing:
                raise ValueError(
                    f"`cache` must hold every pair of the split {split!r}, but {config.cache} lacks {len(missing)}, "
                    f"the first is {missing[0]!r}; run `train/cache_embeddings.py` for this data again."
                )
            entries = [known[row_id] for row_id in rows["id"][:]]
            cache, fit = EmbeddingCache(config.cache), pipeline.projector.fit_text
            self.embeds["image_embeds"] = torch.stack([cache.tensor(frame) for frame, _ in entries])
            self.embeds["text_embeds"] = torch.stack([fit(cache.tensor(text)) for _, text in entries])
            descriptions = [cache.description(text) for _, text in entries]
        texts = sorted({*descriptions, *labels})
        place = {text: i for i, text in enumerate(texts)}
        with torch.no_grad():
            batches = [texts[i : i + 64] for i in range(0, len(texts), 64)]
            self.text_bank = torch.cat([pipeline.encode_prompt(batch).cpu() for batch in batches])
            self.null_condition = pipeline.projector.null_condition(pipeline.encode_prompt([""]))
        self.prompts = torch.tensor([place[text] for text in descriptions])
        self.labels = torch.tensor([place[text] for text in labels])
        boxes = zip(rows["boxes_0"][:], rows["boxes_1"][:], strict=True)
        pairs = [[*(before or []), *(after or [])] for before, after in boxes]
        self.weights = box_weights(pairs, *self.latents.shape[-2:], config.box_weight)

    @torch.no_grad()
    def _encode_frames(self, pipeline: LegoPipeline) -> dict[str, torch.Tensor]:
        """Both frames' posterior means, unscaled `latents` (N, 2, c, h, w); the target's `target_std` (N, c, h, w)."""
        means, deviations = [], []
        starts = range(0, len(self.rows), 32)
        for start in tqdm(starts, desc="encode frames", mininterval=5):
            batch = self.rows.select(range(start, min(start + 32, len(self.rows))))
            frames = images.to_frames([row[f"image_{k}"] for k in (0, 1) for row in batch])
            if start == 0:
                size = images.model_size(
                    *images.frame_size(frames[0]), pipeline.config.resolution, pipeline.vae_scale_factor
                )
            pixels = torch.stack([images.to_model_input(frame, *size) for frame in frames]).to(self.device)
            posterior = pipeline.vae.encode(pixels).latent_dist
            mean = posterior.mode().float().cpu()
            means.append(torch.stack(mean.chunk(2), 1))
            deviations.append(posterior.std.float().cpu().chunk(2)[1])
        return {"latents": torch.cat(means).contiguous(), "target_std": torch.cat(deviations).contiguous()}

    def batch(self, indices: list[int], draws: torch.Tensor, use_label: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors of some rows on the device."""
        batch = {name: tensor[indices].float() for name, tensor in self.embeds.items()}
        batch |= {
            "prompt_embeds": self.text_bank[self.prompts[indices]],
            "label_embeds": self.text_bank[self.labels[indices]],
            "image_latents": self.latents[indices, 0],
            "target": self.latents[indices, 1],
            "target_std": self.target_std[indices],
            "weights": self.weights[indices],
            "null_condition": self.null_condition,
            "draws": draws,
            "use_label": use_label,
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def _entries(cache: Path, split: str) -> dict[str, tuple[str, str]]:
    files = sorted(cache.glob(f"pairs-{split}-*.pairs"))
    if not files:
        raise FileNotFoundError(
            f"`--cache` must hold the split {split!r}, found none in {cache}; run `train/cache_embeddings.py` for it."
        )
    entries = {}
    for file in files:
        table = pq.read_table(file)
        keys = zip(table["frame_key"].to_pylist(), table["text_key"].to_pylist(), strict=True)
        entries |= dict(zip(table["id"].to_pylist(), keys, strict=True))
    return entries


def diffusion_target(
    prediction_type: str, clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """What the UNet should predict, for x_t = sqrt(alpha) clean + sqrt(1 - alpha) noise; alpha (B, 1, 1, 1)."""
    targets = {
        "epsilon": noise,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
        "sample": clean,
    }
    if prediction_type not in targets:
        raise ValueError(f"`prediction_type` must be one of {', '.join(targets)}, got {prediction_type!r}.")
    return targets[prediction_type]


def draw_timesteps(count: int, alphas_cumprod: torch.Tensor, config: TrainLdmConfig) -> torch.Tensor:
    """(count,) long timesteps, uniform or log-normal in sigma = sqrt((1 - alpha) / alpha)."""
    if config.timestep_sampling == "uniform":
        return torch.randint(len(alphas_cumprod), (count,))
    log_sigmas = 0.5 * torch.log((1 - alphas_cumprod) / alphas_cumprod)
    wished = torch.randn(count) + config.log_sigma_mean
    return (wished[:, None] - log_sigmas[None, :]).abs().argmin(1)


def main(config: TrainLdmConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    pipeline = LegoPipeline.from_pretrained(config.pipeline)
    for module in (pipeline.vae, pipeline.text_encoder, *([pipeline.vlm] if pipeline.vlm else [])):
        module.requires_grad_(False).eval()
    device = accelerator.device
    pipeline.vae.to(device), pipeline.text_encoder.to(device), pipeline.projector.to(device)
    with accelerator.main_process_first():
        train = PairTensors(pipeline, read_manifest(config.data, config.split), config, device, config.split)
        validation = None
        if config.validation_split:
            rows = read_manifest(config.data, config.validation_split)
            rows = rows.select(range(min(len(rows), 128)))
            validation = PairTensors(pipeline, rows, config, device, config.validation_split)
    denoiser = Denoiser(pipeline.unet, pipeline.projector, config.condition_dropout)
    pipeline.projector.requires_grad_(config.cache is not None and not config.freeze_projections)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=config.weight_decay)
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.max_steps
    )
    denoiser.to(device)
    ema = ResumableEma(denoiser.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    accelerator.register_for_checkpointing(ema, schedule)
    if accelerator.is_main_process:
        (config.output_dir / "config.yaml").write_text(to_yaml(config))
        count = sum(parameter.numel() for parameter in trained)
        logger.info(
            "%d pairs, latents %s, %.1f M trained parameters, %d process(es) on %s, %s, %s prediction",
            *(len(train.rows), tuple(train.latents.shape[2:]), count / 1e6, accelerator.num_processes, device),
            *(config.mixed_precision, pipeline.scheduler.config.prediction_type),
        )
    alphas_cumprod = pipeline.scheduler.alphas_cumprod.float()
    scaling_factor = pipeline.vae.config.scaling_factor

    def loss_of(
        tensors: PairTensors, indices: list[int], timesteps: torch.Tensor, draws: torch.Tensor
    ) -> torch.Tensor:
        no_vlm = torch.rand(len(indices)) < (config.vlm_dropout if model.training else 0)
        use_label = no_vlm & (torch.rand(len(indices)) < 0.5)
        batch = tensors.batch(indices, draws, use_label)
        clean = batch["target"] + batch["target_std"] * torch.randn(batch["target"].shape).to(device)
        clean = clean * scaling_factor
        noise = torch.randn(clean.shape).to(device)
        alpha = alphas_cumprod[timesteps].to(device)[:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        prediction = model(noisy, timesteps.to(device), batch, no_vlm.to(device))
        target = diffusion_target(pipeline.scheduler.config.prediction_type, clean, noise, alpha)
        error = (prediction.float() - target).square().mean(1)  # (B, h, w)
        return (error * batch["weights"]).sum() / batch["weights"].sum()

    @torch.no_grad()
    def validate(tensors: PairTensors) -> float:
        """Loss on held-out pairs with fixed noise and timesteps and without dropout."""
        model.eval()
        losses = []
        with torch.random.fork_rng(devices=[]):
            for start in range(0, len(tensors.rows), 32):
                indices = list(range(start, min(start + 32, len(tensors.rows))))
                torch.manual_seed(start)
                timesteps = draw_timesteps(len(indices), alphas_cumprod, config)
                losses.append(float(loss_of(tensors, indices, timesteps, torch.ones(len(indices)))))
        model.train()
        return sum(losses) / len(losses)

    steps = ResumableSteps(
        accelerator,
        config.output_dir,
        num_samples=len(train.rows),
        batch_size=config.batch_size,
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
        save_every_minutes=config.save_every_minutes,
        seed=config.seed,
        name="LDM",
    )
    model.train()
    for step, indices in steps:
        if validation is not None and step % config.validate_every_steps == 0 and accelerator.is_main_process:
            with open(config.output_dir / "validation.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "loss": validate(validation)}) + "\n")
        timesteps = draw_timesteps(len(indices), alphas_cumprod, config)
        loss = loss_of(train, indices, timesteps, torch.rand(len(indices)))
        steps.update(loss, trained, optimizer, schedule, config.max_grad_norm)
        ema.step(denoiser.parameters())
        steps.log(loss=loss.detach())
    if accelerator.is_main_process:
        ema.copy_to(denoiser.parameters())
        pipeline.register_to_config(vlm_dropout=config.cache is None or config.vlm_dropout > 0)
        pipeline.to("cpu").save_pretrained(config.output_dir / "pipeline")
        state = {"step": steps.step, "finished": steps.finished}
        (config.output_dir / "report.json").write_text(json.dumps(state, indent=1))
        logger.info("step %d, LegoPipeline with averaged weights in %s", steps.step, config.output_dir / "pipeline")


if __name__ == "__main__":
    main(parse_config(TrainLdmConfig, __doc__))
