"""What training of the diffusion model starts from: a folder of one of three kinds, as a LegoPipeline."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers.modeling_utils import PreTrainedModel

from lego_pipeline.data.embedding_cache import Recipe
from lego_pipeline.data.shards import model_key
from lego_pipeline.diffusion_step import SAMPLING
from lego_pipeline.enhance import make_recipe
from lego_pipeline.export import VlmFiles, find_vlm
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.stable_diffusion import lego_from_stable_diffusion, pipeline_class
from lego_pipeline.vlm import family_of
from lego_pipeline.vlm.load import load_vlm


@dataclass(kw_only=True)
class Start:
    """A loaded start.

    Attributes:
        kind: class that the folder was saved from.
        pipeline: in float32, without a VLM; all that is saved with it is settled.
        vlm_files: of the VLM that belongs to it, or None.
        vlm: loaded and frozen, where it has to run.
    """

    kind: str
    pipeline: LegoPipeline
    vlm_files: VlmFiles | None
    vlm: PreTrainedModel | None

    def frozen_keys(self, trained: Collection[str]) -> dict[str, str]:
        """Keys of all weights that a run takes from here in every slice, so that a changed one is noticed.

        Args:
            trained: components all of whose weights the run's states hold, and which are left out.
        """
        names = {"vae", "text_encoder", "unet", "projector"} - set(trained)
        keys = {f"weights of {name}": model_key(getattr(self.pipeline, name)) for name in sorted(names)}
        if self.vlm is not None and self.vlm_files is not None:
            keys["weights of vlm"] = make_recipe(self.vlm, self.vlm_files.processor).vlm_key
        return keys


def load_start(
    folder: Path,
    *,
    recipe: Recipe | None = None,
    vlm_folder: Path | None = None,
    runs_vlm: bool = False,
    vlm_dtype: torch.dtype = torch.float32,
    resolution: int | None = None,
    prediction_type: str | None = None,
    seed: int = 0,
) -> Start:
    """Loads a LegoPipeline, InstructPix2Pix or Stable Diffusion 1.x folder for training.

    A fresh projector gets the sizes of the recipe, of the VLM that runs, or the released ones. The pipeline takes over
    the recipe's question and sampling, so that later it asks as the cache was asked.

    Args:
        folder: in diffusers' layout.
        recipe: of the embeddings that will be trained on.
        vlm_folder: of a VLM that takes the place of the pipeline's own.
        runs_vlm: load the VLM.
        vlm_dtype: of its weights.
        resolution: side in pixels of the square whose area is trained at; None leaves it.
        prediction_type: of UNet and scheduler; None leaves it.
        seed: of a fresh projector.

    Raises:
        FileNotFoundError: no pipeline or no VLM there.
        ValueError: no VLM to run; a recipe that doesn't fit the projector, or is of another VLM than the pipeline's;
            a pipeline of another kind.
    """
    name = pipeline_class(folder)
    files, vlm = find_vlm(folder, vlm_folder), None
    if runs_vlm:
        if files is None:
            raise ValueError(
                "`embeddings` on_the_fly needs a VLM, got a pipeline without; pass the folder of `--vlm`."
            )
        vlm = load_vlm(str(files.folder), dtype=vlm_dtype).eval().requires_grad_(False)
    sizes: dict[str, Any] = {}
    if recipe is not None:
        sizes = {"vlm_dim": recipe.vlm_dim, "num_image_tokens": recipe.num_image_tokens}
    elif vlm is not None and files is not None:
        tokens, dim = family_of(vlm).sizes(vlm, files.processor)
        sizes = {"vlm_dim": dim, "num_image_tokens": tokens}
    if name == LegoPipeline.__name__:
        pipeline = LegoPipeline.from_pretrained(folder, vlm=None, vlm_processor=None)
    else:
        pipeline = lego_from_stable_diffusion(folder, **sizes, seed=seed)
    found = {key: pipeline.projector.config[key] for key in sizes}
    if found != sizes:
        source = "cache" if recipe is not None else "vlm"
        raise ValueError(
            f"`{source}` must fit the projector's {found}, got {sizes}; take the VLM it was trained with."
        )
    if recipe is not None:
        if files is not None:
            _check_vlm(files, recipe)
        settings = SAMPLING if recipe.descriptions == "generate" else ("question_template",)
        pipeline.register_to_config(**{key: getattr(recipe, key) for key in settings})
    if resolution is not None:
        pipeline.register_to_config(resolution=resolution)
    scheduler: Any = pipeline.scheduler
    if prediction_type not in (None, scheduler.config.prediction_type):
        kind = type(scheduler)
        if prediction_type == "sample" and kind is EulerAncestralDiscreteScheduler:
            kind = EulerDiscreteScheduler  # the ancestral one doesn't know clean latents as prediction
        pipeline.register_modules(scheduler=kind.from_config(scheduler.config, prediction_type=prediction_type))
    pipeline.set_progress_bar_config(disable=True)
    return Start(kind=name, pipeline=pipeline, vlm_files=files, vlm=vlm)


def _check_vlm(files: VlmFiles, recipe: Recipe) -> None:
    """Refuses a cache of another VLM than the one that will be exported; read by the main process, known to all.

    A cache filled in half precision has the key of the rounded weights, so these are tried too.
    """
    is_own = False
    if PartialState().is_main_process:
        loaded = (load_vlm(str(files.folder), dtype=dtype) for dtype in ("auto", torch.bfloat16, torch.float16))
        is_own = any(make_recipe(vlm, files.processor).vlm_key == recipe.vlm_key for vlm in loaded)
    if not broadcast_object_list([is_own])[0]:
        raise ValueError(
            f"`cache` must be filled by the VLM that is exported, got recipe {recipe.name} of another one than "
            f"{files.folder}; pass the folder of the VLM that filled the cache by `--vlm`."
        )
