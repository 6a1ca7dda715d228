"""A LLaVA checkpoint of the original layout as transformers' `LlavaForConditionalGeneration`, with its processor.

The original has one linear projector, no image token in its vocabulary (the place of the frame is id -200) and the
vision tower's weights twice, in its shards and at OpenAI's. Here the projector's second layer is the identity behind a
linear activation, which is exact, and `<image>` is one more token whose rows are the means of all rows: it is never
the likeliest and generation leaves it out. Facts: `BolinLai/LEGO: vllm/llava/`.

Weights are renamed shard by shard. A shard is mapped into memory and written before the next one is opened, so that
memory holds one of them and not the model.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.generation.configuration_utils import GenerationConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from lego_pipeline.convert.checkpoint import read_tensors
from lego_pipeline.convert.layout import shown
from lego_pipeline.convert.ldm import check_output
from lego_pipeline.export import whole_folder

VISION_TOWER = "openai/clip-vit-large-patch14"
VISION = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector.linear_"
BY_TOKEN = ("model.language_model.embed_tokens.weight", "lm_head.weight")  # one row for each token
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
COPIED = 1 << 28  # bytes in new memory after which a shard of the result is written
IMAGE_TOKEN = "<image>"
STRATEGIES = {"patch": "default", "cls_patch": "full"}  # by `mm_vision_select_feature`
LLAMA_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# The conversation that the release tunes and asks with (LLaVA's "llama_2" template and its system text).
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% if loop.first %}<<SYS>>\n"
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} [/INST]{% else %}{% for part in message['content'] %} {{ part['text'] }}{% endfor %} "
    "</s>{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class VlmReport:
    """What a conversion found.

    Attributes:
        output: the folder.
        shards: weight files written.
        parameters: of the whole model.
        image_token_id, num_image_tokens: of `<image>`, and how often it stands for one frame.
        vision_difference: largest difference between the vision weights in the shards and those taken, None where the
            shards have none.
    """

    output: str
    shards: int
    parameters: int
    image_token_id: int
    num_image_tokens: int
    vision_difference: float | None


def convert_vlm(
    checkpoint: Path, output: Path, *, vision_tower: str = VISION_TOWER, dtype: torch.dtype | None = None
) -> VlmReport:
    """Converts a folder; the output folder is there as a whole or not at all.

    Args:
        checkpoint: folder of the original layout: config.json, .bin or .safetensors shards, tokenizer.
        output: new or empty folder.
        vision_tower: folder or hub name of the CLIP model whose vision tower is used, as the release does.
        dtype: of the saved weights; None keeps what each file has.

    Raises:
        FileNotFoundError: no config, or a shard is missing.
        ValueError: something is at `output`; entries that are missing, unknown, of another shape or of another vision
            tower; another kind of model; no vision tower; a file that isn't safe to read.
        ImportError: the tokenizer is a sentencepiece model and sentencepiece is missing.
    """
    check_output(output)
    settings = _read_settings(checkpoint)
    files = find_shards(checkpoint)
    tower = _load_tower(vision_tower)
    tokenizer = load_tokenizer(checkpoint)
    if len(tokenizer) > settings["vocab_size"]:
        raise ValueError(
            f"`checkpoint` must have a row for each of its tokenizer's {len(tokenizer)} tokens, got "
            f"{settings['vocab_size']}; use the tokenizer that it was tuned with."
        )
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = _config(settings, tower, tokenizer, image_token)
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in LlavaForConditionalGeneration(config).state_dict().items()}
    _check_shards(checkpoint, files, expected, settings["vocab_size"])
    processor = LlavaProcessor(
        _image_processor(vision_tower, tower),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    vision = dict(tower.state_dict())
    differences: list[float] = []
    with whole_folder(output) as unfinished:
        batches = _converted(files, vision, config, dtype, differences)
        count = _write_shards(unfinished, batches)
        config.architectures = ["LlavaForConditionalGeneration"]
        config.save_pretrained(unfinished)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[image_token],
        ).save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return VlmReport(
        output=str(output),
        shards=count,
        parameters=sum(torch.Size(shape).numel() for shape in expected.values()),
        image_token_id=image_token,
        num_image_tokens=config.image_seq_length,
        vision_difference=max(differences) if differences else None,
    )


def find_shards(folder: Path) -> list[Path]:
    """Weight files of a folder, in the order of their names.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
    """
    for name in INDICES:
        if (folder / name).is_file():
            files = [folder / file for file in sorted(set(_read_json(folder / name).get("weight_map", {}).values()))]
            break
    else:
        files = [folder / name for name in SINGLE_FILES if (folder / name).is_file()][:1]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(
            f"`checkpoint` must hold its weights, {' or '.join(SINGLE_FILES)} or shards with an index, and in "
            f"{folder} {shown(missing) if missing else 'every one of them'} is missing; download the folder again."
        )
    return files


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a LLaVA folder, with the unknown token for padding.

    The release cuts the prompt at the image and tokenises both pieces apart, each with sentencepiece's blank in front.
    That is what transformers calls `legacy`.

    Raises:
        FileNotFoundError: there is none.
        ImportError: it is a sentencepiece model and sentencepiece is missing.
    """
    own = folder / "tokenizer_config.json"
    class_name = _read_json(own).get("tokenizer_class", "") if own.is_file() else ""
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    if is_sentencepiece and not (folder / "tokenizer.json").is_file():
        lacking = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
        if lacking:
            raise ImportError(
                f"`checkpoint` has a tokenizer.model, which needs {' and '.join(lacking)}; run "
                '`pip install "lego-pipeline[convert]"`.'
            )
    elif not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"`checkpoint` must hold a tokenizer, found neither tokenizer.model nor tokenizer.json in {folder}; "
            "download the whole folder again."
        )
    if is_sentencepiece or class_name.startswith("LlamaTokenizer"):
        marks: dict[str, Any] = {
            "add_bos_token": True,
            "add_eos_token": False,
        }  # as LLaVA sets them, whatever the file says
        source: Any = LlamaTokenizer.from_pretrained(folder, legacy=True, **marks)
    else:
        source = PreTrainedTokenizerFast.from_pretrained(folder)
    # A saved LlamaTokenizer is built anew on loading, by its class's own rules; this class is read back as it is.
    return PreTrainedTokenizerFast(
        tokenizer_object=source.backend_tokenizer,
        bos_token=source.bos_token,
        eos_token=source.eos_token,
        unk_token=source.unk_token,
        pad_token=source.pad_token or source.unk_token or source.eos_token,
        model_max_length=source.model_max_length,
        padding_side="right",
    )


def new_name(name: str) -> str | None:
    """Name in transformers' LLaVA of a tensor of the original, None for one that isn't taken over."""
    if name.endswith((".rotary_emb.inv_freq", ".position_ids")):  # buffers that transformers kept until 4.31
        return None
    if name.startswith(VISION):
        return VISION + name.removeprefix(VISION).removeprefix("vision_tower.").removeprefix("vision_model.")
    if name.startswith("model.mm_projector."):
        return PROJECTOR + "1." + name.removeprefix("model.mm_projector.")
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"`checkpoint` must hold {path.name}, found none in {path.parent}; check the path.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path}` must be JSON, got: {error}; download it again.") from error


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = _read_json(folder / "config.json")
    if "mm_vision_select_layer" not in settings or "vocab_size" not in settings:
        raise ValueError(
            f"`checkpoint` must be a LLaVA folder of the original layout, got one of model_type "
            f"{settings.get('model_type')!r} without `mm_vision_select_layer` or `vocab_size`; a folder that "
            "transformers' LlavaForConditionalGeneration reads needs no conversion."
        )
    for name, value in (("mm_use_im_start_end", True), ("mm_projector_type", "mlp2x_gelu")):
        if settings.get(name) == value:
            raise ValueError(f"`checkpoint` must be LLaVA as LEGO tuned it, got {name}={value!r}; it isn't supported.")
    if settings.get("mm_vision_select_feature", "patch") not in STRATEGIES:
        raise ValueError(
            f"`mm_vision_select_feature` must be one of {', '.join(STRATEGIES)}, got "
            f"{settings['mm_vision_select_feature']!r}."
        )
    return settings


def _load_tower(name: str) -> CLIPVisionModel:
    try:
        return CLIPVisionModel.from_pretrained(name, dtype="auto").eval()
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`vision_tower` must be a folder with a CLIP model, or a hub name that can be reached, got {name!r} "
            f"({reason}); download {VISION_TOWER} where there is a network, and pass its folder."
        ) from error


def _image_processor(name: str, tower: CLIPVisionModel) -> CLIPImageProcessorPil:
    """CLIP's: short side to the tower's size, bicubic, centre crop, CLIP's mean and deviation."""
    side: Any = tower.config.image_size
    try:
        return CLIPImageProcessorPil.from_pretrained(name)
    except OSError:
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _config(settings: Mapping[str, Any], tower: CLIPVisionModel, tokenizer: Any, image_token: int) -> LlavaConfig:
    chosen = {name: settings[name] for name in LLAMA_SETTINGS if settings.get(name) is not None}
    chosen["vocab_size"] = max(settings["vocab_size"], image_token + 1)
    language = LlamaConfig(**chosen, pad_token_id=tokenizer.pad_token_id)
    vision: Any = tower.config
    patches = (vision.image_size // vision.patch_size) ** 2
    strategy: Any = STRATEGIES[settings.get("mm_vision_select_feature", "patch")]
    return LlavaConfig(
        vision_config=tower.config,
        text_config=language,
        image_token_index=image_token,
        image_seq_length=patches + (strategy == "full"),
        projector_hidden_act="linear",
        vision_feature_layer=settings["mm_vision_select_layer"],
        vision_feature_select_strategy=strategy,
    )


def _check_shards(folder: Path, files: list[Path], expected: Mapping[str, tuple[int, ...]], vocabulary: int) -> None:
    """Raises ValueError with all names that are unknown, missing, of another shape or in two shards.

    Vision weights may be missing, but those that are there have to be of the tower's shapes.
    """
    wanted = {name: shape for name, shape in expected.items() if not name.startswith(f"{PROJECTOR}2.")}
    wanted |= {name: (vocabulary, *expected[name][1:]) for name in BY_TOKEN if name in wanted}
    unknown, misshaped, twice, found = [], [], [], set()
    for file in files:
        for name, tensor in read_tensors(file).items():
            new = new_name(name)
            if new is None:
                continue
            if new in found:
                twice.append(name)
            found.add(new)
            if new not in wanted:
                unknown.append(name)
            elif tuple(tensor.shape) != wanted[new]:
                misshaped.append(f"{name} {tuple(tensor.shape)} instead of {wanted[new]}")
    missing = [_old_name(name) for name in wanted if name not in found and not name.startswith(VISION)]
    lists = {"missing": missing, "unknown": unknown, "of another shape": misshaped, "in two shards": twice}
    problems = [f"{len(names)} {kind}: {shown(names)}" for kind, names in lists.items() if names]
    if problems:
        raise ValueError(
            f"`checkpoint` must hold the entries that its config.json says and no others, got in {folder} "
            f"{'; '.join(problems)}. Download it again, or pass the folder of the whole tuned model, and the vision "
            "tower that it was tuned with."
        )


def _old_name(name: str) -> str:
    return name.replace(f"{PROJECTOR}1.", "model.mm_projector.").replace("model.language_model.", "model.")


def _converted(
    files: list[Path],
    vision: dict[str, torch.Tensor],
    config: LlavaConfig,
    dtype: torch.dtype | None,
    differences: list[float],
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of the result in the batches that are to be written, one input shard in memory at a time."""
    width = config.text_config.hidden_size
    identity = {f"{PROJECTOR}2.weight": torch.eye(width), f"{PROJECTOR}2.bias": torch.zeros(width)}
    for file in tqdm(files, "shards", disable=None):
        state = read_tensors(file)
        batch: dict[str, torch.Tensor] = {}
        copied = 0
        for name in list(state):
            tensor = state.pop(name)
            new = new_name(name)
            if new is None:
                continue
            if new.startswith(VISION):
                own = vision[new.removeprefix(VISION)]
                differences.append(float((own.to(tensor.dtype).float() - tensor.float()).abs().max()))
                continue
            if new == f"{PROJECTOR}1.weight":
                own_dtype = tensor.dtype if dtype is None else dtype
                batch |= {key: value.to(own_dtype) for key, value in identity.items()}
            if new in BY_TOKEN:
                tensor = _with_image_row(tensor, config.text_config.vocab_size)
                copied += tensor.nbytes
            if dtype is not None and tensor.dtype != dtype:
                tensor = tensor.to(dtype)
                copied += tensor.nbytes
            batch[new] = tensor.contiguous()
            if copied > COPIED:
                yield batch
                batch, copied = {}, 0
        if batch:
            yield batch
    yield {VISION + name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in vision.items()}


def _with_image_row(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(V, D) rows brought to `count`, each new one the mean of the old: its logit is never the largest."""
    mean = torch.stack([part.float().sum(0) for part in rows.split(1024)]).sum(0) / len(rows)
    return torch.cat([rows, mean.to(rows.dtype).expand(count - len(rows), -1)])


def _write_shards(folder: Path, batches: Iterator[dict[str, torch.Tensor]]) -> int:
    """Writes each batch as a shard, and their index; returns their number."""
    places: list[list[str]] = []
    total = 0
    for batch in batches:
        save_file(batch, folder / f"{len(places)}.tmp", metadata={"format": "pt"})
        places.append(list(batch))
        total += sum(tensor.nbytes for tensor in batch.values())
        batch.clear()
    names = [f"model-{number:05d}-of-{len(places):05d}.safetensors" for number in range(1, len(places) + 1)]
    for number, name in enumerate(names):
        (folder / f"{number}.tmp").rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: name for name, tensors in zip(names, places, strict=True) for tensor in tensors},
    }
    (folder / INDICES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(places)
