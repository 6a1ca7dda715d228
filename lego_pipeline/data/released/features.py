"""The released VLM features, one `.npy` file per frame, as entries of an embedding cache.

The release keeps two arrays in float16 for a pair, both named after its start frame: F_img (N_i, D), the frame's
tokens behind the VLM's projector, and F_txt (T, D), the states that predict the tokens of the description. They are
kept under a recipe of their own and found by frame, label and description, so generating and training need no VLM.
Whether the states belong to the description can't be seen from the files: the release samples a new description when
it is run again and keeps the old states.

Letters: N_i VLM image tokens, T VLM text states, D VLM width.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from lego_pipeline.data.embedding_cache import EmbeddingCache, Recipe, imported_recipe
from lego_pipeline.data.released.pairs import FEATURES, FRAMES, Pair
from lego_pipeline.data.shards import pixel_key
from lego_pipeline.images import read_image

SHARD_ENTRIES = 64  # of the cache: 2.6 MB each at the released sizes, and what a kill costs at most


def find_recipe(pair: Pair, source: str) -> Recipe:
    """The recipe of the features that a pair's files begin.

    Args:
        pair: any one; all have these sizes.
        source: name of the VLM that made them.
    """
    num_image_tokens, dim = read_image_features(pair.files[FEATURES["image"]]).shape
    return imported_recipe(source, num_image_tokens, dim)


def import_features(pairs: Sequence[Pair], cache: EmbeddingCache, recipe: Recipe) -> int:
    """Adds the features of pairs to a cache; what it has is skipped, so a run that was killed goes on.

    Args:
        pairs: with the files of both kinds.
        cache: to be filled, and written in the end.
        recipe: of `find_recipe`.

    Returns:
        Number of entries added.

    Raises:
        ValueError: a file is no array, of another shape, or not finite; what was read before is written all the same.
    """
    cache.add_recipe(recipe)
    before = len(cache)
    try:
        for pair in tqdm(pairs, desc="import features", unit="pair", mininterval=1):
            pixels = pixel_key(read_image(pair.files[FRAMES["image_0"]]))
            frame, text = cache.keys(pixels, pair.row["action"], recipe, pair.row["description"])
            for key, kind in ((frame, "image"), (text, "text")):
                if key in cache:
                    continue
                path = pair.files[FEATURES[kind]]
                states = read_image_features(path) if kind == "image" else read_text_features(path)
                expected = (recipe.num_image_tokens if kind == "image" else len(states), recipe.vlm_dim)
                if tuple(states.shape) != expected:
                    raise ValueError(
                        f"`{path}` must hold {expected} as the others do, got {tuple(states.shape)}; it is of another "
                        "VLM, which needs a cache of its own."
                    )
                try:
                    if kind == "image":
                        cache.add_frame(key, states)
                    else:
                        cache.add_text(key, pair.row["description"], states)
                except ValueError as error:
                    raise ValueError(f"`{path}`: {error}") from error
    finally:
        cache.write()
    return len(cache) - before


def read_image_features(path: Path) -> torch.Tensor:
    """F_img (N_i, D) float32 of a file.

    Raises:
        ValueError: the file is no array of this form.
    """
    array = read_array(path)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"`{path}` must hold image features (N_i, D), got {array.shape}; extract them again.")
    return torch.from_numpy(array)


def read_text_features(path: Path) -> torch.Tensor:
    """F_txt (T, D) float32 of a file.

    A single state is stored as (D,) by the release, and older files hold (T, k, D), of which the last of k counts.

    Raises:
        ValueError: the file is no array of this form.
    """
    array = read_array(path)
    if array.ndim == 1:
        array = array[None]
    if array.ndim == 3 and array.shape[1]:
        array = array[:, -1]
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"`{path}` must hold text features (T, D), got {array.shape}; extract them again.")
    return torch.from_numpy(array)


def read_array(path: Path) -> np.ndarray:
    """The float array of an `.npy` file, as float32; nothing is unpickled.

    Raises:
        ValueError: the file is cut off, of another format, or holds objects or whole numbers.
    """
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"`{path}` must be an array of floats in NumPy's format, got: {error}; copy or extract it again."
        ) from error
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"`{path}` must hold floats, got {array.dtype}; extract it again.")
    return array.astype(np.float32)
