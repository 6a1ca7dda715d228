"""Descriptions and VLM embeddings on disk, found by content: what was computed once is never computed again.

Two kinds of entries in one `ShardStore`:

- **frame**: what the VLM's vision side makes of a frame *before* the VLM's projector, (N_i, K), found by the pixels
  and the weights and settings of the vision side; shared by all actions asked of a frame and by all tunings of a VLM
  whose vision side is frozen. F_img (N_i, D) is rebuilt on reading by the projector ("connector"), which is kept once
  per cache as `connector-KEY.safetensors`; at the released sizes that is 0.5 MB a frame instead of 2.6;
- **text**: a description and its states F_txt (T, D), found by the pixels, the question, every weight of the VLM, and
  how the description came about: the given text, or seed and sampling settings.

A `Recipe` names these settings. It is written beside the entries as `recipe-NAME.json`, so a reader without the VLM
finds what belongs to a frame and an action. No key holds a path, a row's id, a dtype or the version of a library.

Embeddings that others computed, such as the released LEGO's, lie under a recipe of the family "imported"
(`imported_recipe`): no VLM belongs to it, and a frame's states are F_img itself.

Letters: N_i VLM image tokens, K width of a frame's states, T VLM text states, D VLM width.
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lego_pipeline.atomic import write_atomically
from lego_pipeline.data.shards import ShardStore, content_key, pixel_key, state_dict_of
from lego_pipeline.vlm import VLM_FAMILIES
from lego_pipeline.vlm.base import DEFAULT_QUESTION, Enhancement, ask, check_question

DTYPES = ("float16", "float32", "int8")
DESCRIPTIONS = ("generate", "manifest")
IMPORTED = "imported"  # family of embeddings that come from files
FILL = "fill the cache with `train/cache_embeddings.py`"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How entries came about; made from a VLM by `lego_pipeline.enhance.make_recipe`.

    Attributes:
        family: name of the VLM's family in `VLM_FAMILIES`, or `IMPORTED`.
        vlm_key: of all its weights with adapters, its config, tokenizer and chat template.
        vision_key: of what a frame's states depend on.
        connector_key: of the VLM's projector.
        num_image_tokens, vlm_dim: N_i and D.
        question_template: with `{}` for the action.
        max_new_tokens, temperature, top_k, seed: of sampling; a sample's generator is seeded by its key.
        descriptions: "generate", or "manifest" if the cache was filled with the descriptions of the manifest.
        vlm_id: of `lego_pipeline.enhance.vlm_id`, so that a checkpoint knows embeddings of its VLM; None if unknown.
            No part of the recipe's name or of any key.
    """

    family: str
    vlm_key: str
    vision_key: str
    connector_key: str
    num_image_tokens: int
    vlm_dim: int
    question_template: str = DEFAULT_QUESTION
    max_new_tokens: int = 64
    temperature: float = 0.2
    top_k: int = 50
    seed: int = 0
    descriptions: str = "generate"
    vlm_id: str | None = field(default=None, compare=False)

    def __post_init__(self):
        check_question(self.question_template)
        if self.descriptions not in DESCRIPTIONS:
            raise ValueError(f"`descriptions` must be {' or '.join(DESCRIPTIONS)}, got {self.descriptions!r}.")

    @property
    def name(self) -> str:
        """12 hex digits that stand for all settings."""
        return content_key({name: value for name, value in asdict(self).items() if name != "vlm_id"})[:12]

    def frame_key(self, pixels: str) -> str:
        """Key of a frame's entry; `pixels` is its `pixel_key`."""
        return content_key("frame", pixels, self.vision_key)

    def text_key(self, pixels: str, action: str | None, description: str | None = None) -> str:
        """Key of a text entry.

        Args:
            pixels: `pixel_key` of the frame.
            action: label; None if only a description is known, which then stands in for it in the question.
            description: the given description; None for the sampled one.
        """
        question = ask(self.question_template, action or description or "")
        if description is not None:
            return content_key("text", pixels, question, self.vlm_key, {"given": description})
        sampling = {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "seed")}
        return content_key("text", pixels, question, self.vlm_key, sampling)


def imported_recipe(source: str, num_image_tokens: int, vlm_dim: int, **settings: Any) -> Recipe:
    """The recipe of embeddings that come from files, found by frame, action and the manifest's description.

    Args:
        source: names the VLM that made them; another name makes other entries.
        num_image_tokens, vlm_dim: N_i and D.
        **settings: `question_template`, if it is not the default.
    """
    key = content_key(IMPORTED, source)
    return Recipe(
        family=IMPORTED,
        vlm_key=key,
        vision_key=key,
        connector_key=key,
        num_image_tokens=num_image_tokens,
        vlm_dim=vlm_dim,
        descriptions="manifest",
        **settings,
    )


def sampling_seed(text_key: str) -> int:
    """Seed of a description's generator: of what it is asked and of nothing else."""
    return int(text_key[:15], 16)


class Connector(torch.nn.Module):
    """The VLM's projector alone, in float32: makes F_img of a frame's stored states.

    Args:
        family: name in `VLM_FAMILIES`, or `IMPORTED`: the states are F_img then, and the module has no part in it.
        module: as the family's `connector` gives it.
        dim: D.
    """

    def __init__(self, family: str, module: torch.nn.Module, dim: int):
        super().__init__()
        self.family, self.module, self.dim = family, module.float().eval().requires_grad_(False), dim

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """F_img (..., N_i, D) of states (..., N_i, K) float32."""
        if self.family == IMPORTED:
            return states
        return VLM_FAMILIES[self.family].image_embeds(self.module, states, self.dim)


class EmbeddingCache:
    """A cache folder opened for reading and writing; worker processes may be given it.

    Args:
        folder: made when something is written.
        prefix: of the shards that this writer makes, e.g. the process index.
        shard_size: entries per shard.
        dtype: in which new entries are stored: float16, float32, or int8 with a scale for each row. Entries of all
            three may lie in one cache; what is there is not stored again.
        recipe: name of the recipe that is meant where none is given; needed where a cache has several.

    Raises:
        ValueError: an unknown dtype, or a damaged shard.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        prefix: str = "0",
        shard_size: int = 512,
        dtype: str = "float16",
        recipe: str | None = None,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` of a cache must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        self.folder, self.dtype, self._recipe = Path(folder), dtype, recipe
        self.store = ShardStore(folder, prefix, shard_size)
        self._connectors: dict[str, Connector] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connectors": {}}

    def __contains__(self, key: str) -> bool:
        return key in self.store

    def __len__(self) -> int:
        return len(self.store)

    # --- Finding -----------------------------------------------------------------------------------------------------

    def recipes(self) -> dict[str, Recipe]:
        """All recipes that the cache was filled by, by name.

        Raises:
            ValueError: a recipe's file is not readable.
        """
        found = {}
        for file in sorted(self.folder.glob("recipe-*.json")):
            try:
                recipe = Recipe(**json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{file} must be a recipe as it was written, got: {error}; delete it and {FILL}."
                ) from error
            found[recipe.name] = recipe
        return found

    def recipe(self, name: str | None = None) -> Recipe:
        """The recipe of this name, by default the one that the cache was opened with, or the only one.

        Raises:
            FileNotFoundError: the cache has none.
            ValueError: there are several and none is named, or none has this name.
        """
        known, name = self.recipes(), name or self._recipe
        if not known:
            raise FileNotFoundError(
                f"`cache` must hold entries and their recipe, found none in {self.folder}; {FILL}."
            )
        if name is None and len(known) == 1:
            return next(iter(known.values()))
        if name not in known:
            shown = "".join(f"\n  {own}: {_distinction(recipe, known)}" for own, recipe in known.items())
            raise ValueError(
                f"`recipe` must be one of those of {self.folder}, got {name}; pass the name of one of:{shown}"
            )
        return known[name]

    def keys(
        self,
        image: PIL.Image.Image | str,
        action: str | None,
        recipe: Recipe | str | None = None,
        description: str | None = None,
    ) -> tuple[str, str]:
        """Keys of the frame entry and the text entry of a frame and an action, whether or not the cache has them.

        Args:
            image: the frame, or its `pixel_key`.
            action: label such as "open drawer".
            recipe: a recipe, the name of one, or None for the only one of the cache.
            description: of a text that was given and not sampled: needed with a recipe of the manifest's descriptions.

        Raises:
            ValueError: no description with such a recipe; see also `recipe`.
        """
        recipe = recipe if isinstance(recipe, Recipe) else self.recipe(recipe)
        if recipe.descriptions == "manifest" and description is None:
            raise ValueError(
                f"`description` must be given with recipe {recipe.name}, whose descriptions come from the manifest, "
                "got none; pass the row's description."
            )
        pixels = image if isinstance(image, str) else pixel_key(image)
        return recipe.frame_key(pixels), recipe.text_key(pixels, action, description)

    def lookup(
        self,
        image: PIL.Image.Image | str,
        action: str | None,
        recipe: Recipe | str | None = None,
        description: str | None = None,
    ) -> Enhancement | None:
        """The enhancement of a frame and an action, without any VLM; None if the cache lacks it. Args as `keys`."""
        recipe = recipe if isinstance(recipe, Recipe) else self.recipe(recipe)
        frame, text = self.keys(image, action, recipe, description)
        return self.enhancement(frame, text, recipe) if frame in self and text in self else None

    # --- Reading -----------------------------------------------------------------------------------------------------

    def enhancement(self, frame: str, text: str, recipe: Recipe) -> Enhancement:
        """The enhancement made of a frame entry and a text entry, float32 on the CPU."""
        with torch.no_grad():
            image_embeds = self.connector(recipe)(self.frame_states(frame))
        return Enhancement(self.description(text), image_embeds, self.text_embeds(text), recipe.vlm_id)

    def frame_states(self, key: str) -> torch.Tensor:
        """(N_i, K) float32 states of a frame before the VLM's projector.

        Raises:
            KeyError: the cache has no such entry.
            ValueError: its shard is damaged.
        """
        return self._read(key)

    def text_embeds(self, key: str) -> torch.Tensor:
        """(T, D) float32 states of a text entry, F_txt. Raises as `frame_states`."""
        return self._read(key)

    def description(self, key: str) -> str:
        """The description of a text entry."""
        self._check(key)
        return self.store.columns(key)["description"]

    def connector(self, recipe: Recipe) -> Connector:
        """The VLM's projector, on the CPU; read from the cache's file once.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: it is damaged.
        """
        if recipe.family == IMPORTED:
            return Connector(IMPORTED, torch.nn.Identity(), recipe.vlm_dim)
        if recipe.connector_key not in self._connectors:
            path = self._connector_path(recipe)
            if not path.is_file():
                raise FileNotFoundError(f"`cache` must hold the VLM's projector {path}, found none; {FILL}.")
            try:
                self._connectors[recipe.connector_key] = _read_connector(path, recipe)
            except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and {FILL}.") from error
        return self._connectors[recipe.connector_key]

    # --- Writing -----------------------------------------------------------------------------------------------------

    def add_recipe(self, recipe: Recipe, vlm: Any = None) -> None:
        """Writes a recipe and the projector of its VLM, if they are not there; imported embeddings have no VLM."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._connector_path(recipe)
        if recipe.family != IMPORTED and not path.exists():
            family = VLM_FAMILIES[recipe.family]
            tensors = {name: t.cpu().contiguous() for name, t in state_dict_of(family.connector(vlm)).items()}
            metadata = {"settings": json.dumps(family.connector_settings(vlm))}
            write_atomically(path, lambda file: save_file(tensors, file, metadata))
        path = self.folder / f"recipe-{recipe.name}.json"
        if not path.exists():
            write_atomically(
                path, lambda file: file.write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")
            )

    def add_frame(self, key: str, states: torch.Tensor) -> None:
        """Adds a frame's states (N_i, K) under `Recipe.frame_key`, in the cache's dtype."""
        self.store.add(key, stored(states, self.dtype), kind="frame", description=None)

    def add_text(self, key: str, description: str, text_embeds: torch.Tensor) -> None:
        """Adds a description and its states (T, D) under `Recipe.text_key`, in the cache's dtype."""
        self.store.add(key, stored(text_embeds, self.dtype), kind="text", description=description)

    def write(self) -> None:
        """Writes a shard of the entries added since the last one."""
        self.store.write()

    def refresh(self) -> None:
        """Takes up shards that other writers have finished since."""
        self.store.refresh()

    def _check(self, key: str) -> None:
        if key not in self.store:
            raise KeyError(f"no entry {key} in {self.folder}; {FILL}.")

    def _read(self, key: str) -> torch.Tensor:
        self._check(key)
        return restored(self.store.get(key))

    def _connector_path(self, recipe: Recipe) -> Path:
        return self.folder / f"connector-{recipe.connector_key}.safetensors"


def stored(states: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """States (N, D) as they are kept: as half or single precision, or as int8 with a float32 scale for each row.

    Raises:
        ValueError: a value is not finite, in the given states or in half precision.
    """
    values = states.detach().to("cpu", torch.float32)
    if dtype == "int8":
        scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127  # (N, 1)
        tensors = {"states": (values / scale).round().to(torch.int8), "scale": scale}
        is_finite = torch.isfinite(scale).all()
    else:
        tensors = {"states": values.to(getattr(torch, dtype))}
        is_finite = torch.isfinite(tensors["states"]).all()
    if not is_finite:
        raise ValueError(
            f"states must be finite numbers in {dtype}, got some up to {values.abs().max():.3g}; "
            "let the VLM compute in float32 or bfloat16, or keep the cache in float32."
        )
    return tensors


def restored(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What `stored` kept, as float32."""
    values = tensors["states"].float()
    return values * tensors["scale"] if "scale" in tensors else values


def _read_connector(path: Path, recipe: Recipe) -> Connector:
    """The projector as its settings describe it, with the weights of the file."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        settings = json.loads(file.metadata()["settings"])
    with torch.device("meta"):
        module = VLM_FAMILIES[recipe.family].build_connector(settings)
    module.load_state_dict(weights, assign=True)
    return Connector(recipe.family, module, recipe.vlm_dim)


def _distinction(recipe: Recipe, known: dict[str, Recipe]) -> str:
    """In what a recipe differs from some other one of the known."""
    differing = [
        field.name for field in fields(Recipe) if len({getattr(other, field.name) for other in known.values()}) > 1
    ]
    return ", ".join(f"{name} {getattr(recipe, name)}" for name in differing) or "the only one"
