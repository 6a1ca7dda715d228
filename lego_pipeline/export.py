"""A trained LegoPipeline as a folder: whole or absent, the frozen VLM linked, with a model card for the hub."""

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from transformers.processing_utils import ProcessorMixin

from lego_pipeline import loading
from lego_pipeline.atomic import write_text
from lego_pipeline.enhance import vlm_id
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.vlm.load import load_processor

WEIGHTS = ("*.safetensors", "*.bin")
VLM_FILES = ("config.json", "generation_config.json", "*.index.json")
USAGE = """```python
from lego_pipeline import LegoPipeline
from PIL import Image

pipe = LegoPipeline.from_pretrained("FOLDER")
pipe(Image.open("frame.png"), action="open drawer").images[0].save("action.png")
```"""


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """A folder to write into that takes its name `folder` at the end, so that a kill leaves none half written.

    A folder that has the name already stays as it is until then, and if writing fails. Two hidden names beside it are
    ours, `.FOLDER.lego-unfinished` and `.FOLDER.lego-old`; what lies there is taken for the rest of a killed run.

    Raises:
        OSError: it can't be written; the message says what to do.
    """
    unfinished, old = (folder.with_name(f".{folder.name}.lego-{state}") for state in ("unfinished", "old"))
    if old.exists() and not folder.exists():  # killed between the two renames
        old.rename(folder)
    for left_over in (unfinished, old):
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished)
        raise OSError(
            f"{folder} could not be written ({error}); free some space and run the same command again."
        ) from error
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class VlmFiles:
    """A frozen VLM that goes into exported folders as it is.

    Attributes:
        folder: of its config and weights, as transformers saves them.
        processor: loaded.
    """

    folder: Path
    processor: ProcessorMixin

    def put_into(self, pipeline_folder: Path) -> None:
        """Adds VLM and processor to a saved pipeline; weights are hard links where the file system allows."""
        target = pipeline_folder / "vlm"
        target.mkdir()
        for pattern in VLM_FILES:
            for file in self.folder.glob(pattern):
                shutil.copyfile(file, target / file.name)
        for pattern in WEIGHTS:
            for file in self.folder.glob(pattern):
                try:
                    os.link(file.resolve(), target / file.name)
                except OSError:
                    shutil.copyfile(file, target / file.name)
        self.processor.save_pretrained(pipeline_folder / "vlm_processor")
        path = pipeline_folder / "model_index.json"
        index = json.loads(path.read_text(encoding="utf-8"))
        architecture = json.loads((target / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        index["vlm"] = ["transformers", architecture]
        index["vlm_processor"] = ["transformers", type(self.processor).__name__]
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        loading.finish_folder(pipeline_folder)


def find_vlm(pipeline_folder: Path, vlm_folder: Path | None = None) -> VlmFiles | None:
    """The VLM of a pipeline folder, or another one; None if there is none.

    Args:
        pipeline_folder: of any pipeline; only a LegoPipeline has a VLM.
        vlm_folder: model and processor in one folder, taken instead.

    Raises:
        FileNotFoundError: no model there, or one without weights.
        ValueError: its weights are cut off, or there is no processor.
    """
    index = json.loads((pipeline_folder / "model_index.json").read_text(encoding="utf-8"))
    if vlm_folder is None and (index.get("vlm") or [None])[0] is None:
        return None
    folder = vlm_folder or pipeline_folder / "vlm"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"`vlm` must be a whole model as transformers saves it, found no config.json in {folder}; "
            "of a folder with an adapter alone, merge it first."
        )
    loading.check_component(folder)
    processor = load_processor(str(vlm_folder or pipeline_folder / "vlm_processor"))
    return VlmFiles(folder=folder, processor=processor)


def save_trained(
    folder: Path,
    pipeline: LegoPipeline,
    unet_state: Mapping[str, torch.Tensor],
    projector_state: Mapping[str, torch.Tensor],
    *,
    vlm: VlmFiles | None,
    card: str,
) -> None:
    """Writes a pipeline with other weights of UNet and projector; `pipeline` itself is left as it is.

    Args:
        folder: replaced as a whole.
        pipeline: whose other components and settings are taken.
        unet_state, projector_state: complete state dicts, without adapters.
        vlm: put in, or None.
        card: text of README.md.
    """
    trained = {
        "unet": with_weights(pipeline.unet, unet_state),
        "projector": with_weights(pipeline.projector, projector_state),
    }
    components: dict[str, Any] = {**pipeline.components, **trained, "vlm": None, "vlm_processor": None}
    settings: dict[str, Any] = {
        name: pipeline.config[name] for name in LegoPipeline._get_signature_keys(LegoPipeline)[1]
    }
    with whole_folder(folder) as unfinished:
        LegoPipeline(**components, **settings).save_pretrained(unfinished)
        if vlm is not None:
            vlm.put_into(unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")


def note_vlm(folder: Path) -> str | None:
    """Writes into a saved pipeline that its projector belongs to the VLM beside it, for enhancements to be compared.

    Training notes the VLM that it has. Saved in another number format a VLM has other weights, and another id.

    Args:
        folder: of a LegoPipeline with its VLM.

    Returns:
        The VLM's id (`lego_pipeline.enhance.vlm_id`); None if it has none.

    Raises:
        ValueError: the pipeline has no VLM.
    """
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "scheduler", "projector"))
    pipeline = LegoPipeline.from_pretrained(folder, **others)
    if pipeline.vlm is None:
        raise ValueError(f"`folder` must be a LegoPipeline with its VLM, got {folder} without; save it with one.")
    found = vlm_id(pipeline.vlm, pipeline.vlm_processor)
    path = folder / "projector" / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), "vlm_id": found}
    write_text(path, json.dumps(config, indent=2) + "\n")
    return found


def with_weights(model: Any, state: Mapping[str, torch.Tensor]) -> Any:
    """A model of the same config around the given tensors, which are not copied."""
    with torch.device("meta"):
        # Without diffusers' list of what a config file left out, which it would build by default even where changed.
        config = {name: value for name, value in model.config.items() if name != "_use_default_values"}
        copy = type(model).from_config(config)
    copy.load_state_dict(state, assign=True)
    return copy


def model_card(title: str, *, base_model: str, facts: Mapping[str, Any], settings: str) -> str:
    """README.md of a trained folder, with front matter for the model hub; the licence is left to who publishes it.

    Args:
        title: of the card.
        base_model: name of what training started from.
        facts: what the table says: data, steps, samples, losses.
        settings: of training, as YAML.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["lego-pipeline", "egocentric", "action-frame-generation", "instruct-pix2pix"],
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return CARD.format(front=data.to_yaml(), title=title, usage=USAGE, rows=rows, settings=settings.strip())


CARD = """---
{front}
---

# {title}

Generates the frame of an action from an egocentric frame and the action's name. A LegoPipeline: the method is LEGO
(Lai et al., ECCV 2024).

{usage}

## Training

| | |
|---|---|
{rows}

Settings of `train/train_ldm.py`:

```yaml
{settings}
```

## Licence

Not stated yet: the weights that training started from and the data decide. Add `license:` to the lines at the top.
"""
