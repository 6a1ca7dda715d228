"""Where the weights of metrics are: what each is called, where it can be had, and finding it. Nothing is fetched here.

A hub name is fetched by its library when it is passed, and only then.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lego_pipeline.loading import is_local

RELEASED = "from bolinlai/LEGO-Metrics on the Hugging Face hub"
TORCHVISION = "from the address torchvision.models.{}_Weights.IMAGENET1K_V1.url"
FOLDER = "folder"  # key of a folder in which all are looked for by their usual names


@dataclass(frozen=True)
class Weight:
    """Weights that a metric needs.

    Attributes:
        files: usual names of the file or folder.
        source: where it can be had, after "get it".
        hub: name on the model hub that can be passed instead of a path, "" if none.
    """

    files: tuple[str, ...]
    source: str
    hub: str = ""


WEIGHTS: dict[str, Weight] = {
    "egovlp": Weight(("egovlp.pth", "epic_mir_plus.pth"), f"{RELEASED} (the first for Ego4D, the second for Epic)"),
    "distilbert": Weight(("distilbert-base-uncased",), RELEASED, "distilbert/distilbert-base-uncased"),
    "clip": Weight(("clip-vit-large-patch14",), "from the Hugging Face hub", "openai/clip-vit-large-patch14"),
    "inception": Weight(
        ("pt_inception-2015-12-05-6726825d.pth",), "from the release fid_weights of mseitzer/pytorch-fid on GitHub"
    ),
    "lpips_squeeze": Weight(("squeezenet1_1-b8a52dc0.pth",), TORCHVISION.format("SqueezeNet1_1")),
    "lpips_vgg": Weight(("vgg16-397923af.pth",), TORCHVISION.format("VGG16")),
    "lpips_alex": Weight(("alexnet-owt-7be5be79.pth",), TORCHVISION.format("AlexNet")),
    "blip_b": Weight(
        ("model_base_caption_capfilt_large.pth", "blip-image-captioning-base"),
        RELEASED,
        "Salesforce/blip-image-captioning-base",
    ),
    "blip_l": Weight(
        ("model_large_caption.pth", "blip-image-captioning-large"), RELEASED, "Salesforce/blip-image-captioning-large"
    ),
    "hand_detector": Weight(
        ("hand_detector",), "with `python -m examples.kitchen.hand_detector --output-dir runs/hand_detector`"
    ),
}


def check_names(weights: Mapping[str, Path | str]) -> None:
    """Raises ValueError for a name that no metric knows, or a path where nothing is."""
    for name, place in weights.items():
        if name not in WEIGHTS and name != FOLDER:
            raise ValueError(f"`weights` must be of {', '.join(WEIGHTS)} or {FOLDER}, got {name!r}; correct the name.")
        is_path = isinstance(place, Path) or name == FOLDER or not WEIGHTS[name].hub or is_local(place)
        if is_path and not Path(place).expanduser().exists():
            raise ValueError(f"`weights` {name} must be a file or folder that is there, got {place}; check the path.")


def find(name: str, weights: Mapping[str, Path | str]) -> Path | str | None:
    """Path or hub name of weights: as given, else by their usual names in the given folder, else None.

    Raises:
        ValueError: the folder has several that differ in meaning.
    """
    if name in weights:
        place = weights[name]
        path = Path(place).expanduser()
        return path if path.exists() else str(place)
    if FOLDER not in weights:
        return None
    folder = Path(weights[FOLDER]).expanduser()
    usual = [folder / file for file in WEIGHTS[name].files]
    places = [path for file in usual for path in (file, file.with_suffix(".safetensors"))]
    found = [path for path in places if path.exists()]
    if name == "egovlp" and len(found) > 1:
        raise ValueError(
            f"`weights` must say which EgoVLP is meant, found {', '.join(path.name for path in found)} in {folder}; "
            f"pass egovlp={found[0]} for Ego4D or egovlp={found[-1]} for Epic Kitchens."
        )
    return found[0] if found else None


def how_to_get(name: str) -> str:
    """One sentence for weights that are missing."""
    weight = WEIGHTS[name]
    hub = f", or {name}={weight.hub} to have it fetched" if weight.hub else ""
    return f"get {' or '.join(weight.files)} {weight.source} and pass the weights {name}=PATH{hub}"
