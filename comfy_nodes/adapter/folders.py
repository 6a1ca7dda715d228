"""ComfyUI's folders: where checkpoints, LoRAs and caches are, and where something may be written."""

import os
from pathlib import Path

import folder_paths

from lego_pipeline.checkpoints import KITCHEN

EMBEDDED = "kitchen (embedded)"
FOLDER_NAME = "lego"
CACHE_FOLDER = "lego_enhancements"  # below ComfyUI's output and input folders
METRICS_FOLDER = "lego_metrics"  # weights of metrics, beside the models
PAIRS_FOLDER = "lego_pairs"  # below ComfyUI's output folder
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
LORA_FILE = "comfyui.safetensors"  # as `lego_pipeline.lora.export_lora` names it


def register_folder() -> None:
    """Makes `models/lego` and `models/lego_metrics` model folders; those of extra_model_paths.yaml stay first."""
    for name in (FOLDER_NAME, METRICS_FOLDER):
        folder_paths.add_model_folder_path(name, os.path.join(folder_paths.models_dir, name))


def pipeline_folders() -> dict[str, Path]:
    """LegoPipeline folders by the name that the loader shows, the embedded checkpoint first."""
    return {EMBEDDED: KITCHEN, **_folders_with("model_index.json")}


def vlm_folders() -> dict[str, Path]:
    """Folders that hold a VLM: LegoPipeline folders with one, and transformers folders of a known family."""
    found = {name: path for name, path in pipeline_folders().items() if (path / "vlm" / "config.json").is_file()}
    plain = {
        name: path
        for name, path in _folders_with("config.json").items()
        if (path / "processor_config.json").is_file() or (path / "preprocessor_config.json").is_file()
    }
    return {**found, **plain}


def lora_folders() -> dict[str, Path]:
    """Folders of LoRAs as the training script exports them, below models/lego and models/loras."""
    return {**_folders_with(LORA_FILE, "loras"), **_folders_with(LORA_FILE)}


def metrics_folder() -> Path | None:
    """The first folder of weights of metrics that is there, None if there is none."""
    return next((path for path in map(Path, folder_paths.get_folder_paths(METRICS_FOLDER)) if path.is_dir()), None)


def cache_folders() -> dict[str, Path]:
    """Embedding caches below the output folder, the input folder and models/lego."""
    found = {}
    for kind, root in (("output", folder_paths.get_output_directory()), ("input", folder_paths.get_input_directory())):
        for place in sorted(Path(root, CACHE_FOLDER).glob("*/")):
            if any(place.glob("recipe-*.json")):
                found[f"{kind}/{place.name}"] = place
    for root in folder_paths.get_folder_paths(FOLDER_NAME):
        for recipe in sorted(Path(root).glob("**/recipe-*.json")):
            found.setdefault(f"models/{recipe.parent.relative_to(root).as_posix()}", recipe.parent)
    return found


def cache_to_write(name: str) -> Path:
    """The folder below the output folder of a cache of this name.

    Raises:
        ValueError: the name would leave that folder.
    """
    return _folder_to_write(name, "cache", CACHE_FOLDER)


def pairs_to_write(name: str) -> Path:
    """The folder below the output folder of curated pairs of this name.

    Raises:
        ValueError: the name would leave that folder.
    """
    return _folder_to_write(name, "name", PAIRS_FOLDER)


def _folder_to_write(name: str, kind: str, parent: str) -> Path:
    root = Path(folder_paths.get_output_directory(), parent).resolve()
    folder = (root / name.strip()).resolve()
    if not name.strip() or folder.parent != root:
        raise ValueError(
            f"`{kind}` must be the name of a folder, got {name!r}; it is made below output/{parent}, so write a "
            "plain name such as kitchen."
        )
    return folder


def video_folders() -> dict[str, Path]:
    """Folders with videos, the input folder and those below it, by the name that a node shows."""
    root = Path(folder_paths.get_input_directory())
    return {_shown(path, root): path for path, names in _walk(root) if any(_is_video(name) for name in names)}


def annotation_files() -> dict[str, Path]:
    """CSV and JSON files in the input folder and below it, by the name that a node shows."""
    root = Path(folder_paths.get_input_directory())
    found = [path / name for path, names in _walk(root) for name in names if name.lower().endswith((".csv", ".json"))]
    return {_shown(path, root): path for path in found}


def _walk(root: Path) -> list[tuple[Path, list[str]]]:
    return sorted((Path(place), sorted(names)) for place, _, names in os.walk(root, followlinks=True))


def _shown(path: Path, root: Path) -> str:
    return (Path("input") / path.relative_to(root)).as_posix()


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


def folder_of(name: str, folders: dict[str, Path], kind: str = "model") -> Path:
    """The folder behind a listed name; nothing but listed names is opened.

    Raises:
        FileNotFoundError: the name isn't in the list.
    """
    if name not in folders:
        roots = ", ".join(folder_paths.get_folder_paths(FOLDER_NAME))
        known = ", ".join(folders) or "none"
        places = {
            "model": f"put a folder written by `LegoPipeline.save_pretrained` into {roots}, or name its place under "
            f"`{FOLDER_NAME}:` in extra_model_paths.yaml",
            "cache": "make one with LEGO Save Enhancement",
            "lora": f"put the `lora` folder of a training run into {roots}",
            "videos": f"put a folder of videos into {folder_paths.get_input_directory()}",
            "annotations": f"put a CSV or JSON file into {folder_paths.get_input_directory()}",
        }
        raise FileNotFoundError(
            f"`{kind}` must be one of those found ({known}), got {name!r}; {places[kind]}, and press R."
        )
    return folders[name]


def state_of(folder: Path | None, pattern: str) -> str:
    """Names, sizes and times of a folder's files; changes when they change, so that a node runs again."""
    files = [] if folder is None else sorted(folder.glob(pattern))
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _folders_with(file_name: str, kind: str = FOLDER_NAME) -> dict[str, Path]:
    """Folders below the paths of a kind that hold a file, by their relative path; not what is inside of those."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths(kind):
        for place, folders, files in os.walk(root, followlinks=True):
            if file_name in files and place != root:
                found.setdefault(os.path.relpath(place, root).replace(os.sep, "/"), Path(place))
            if "model_index.json" in files or file_name in files:
                folders.clear()
    return dict(sorted(found.items()))
