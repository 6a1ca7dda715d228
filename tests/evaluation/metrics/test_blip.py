"""Captions: the modes, the files of Salesforce's layout, and what dropout does in the paper's mode."""

import re

import numpy as np
import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from lego_pipeline.evaluation.metrics import open_metrics, preprocess
from lego_pipeline.evaluation.metrics.base import Sample
from lego_pipeline.evaluation.metrics.blip import BEGIN, SEPARATOR, load_blip, new_name, set_dropout


def opened(weights_folder, parity=None, name="blip_b", **options):
    return open_metrics([name], {"folder": weights_folder}, parity, **options)[0][0]


def test_captions_start_with_a_blank_in_the_papers_mode_and_differ_between_pictures(weights_folder, frames):
    generated = frames[0]
    captions = opened(weights_folder).captions(generated)
    assert len(set(captions)) > 1 and all(caption == caption.lstrip() for caption in captions)
    assert all(caption.startswith(" ") for caption in opened(weights_folder, "paper").captions(generated))


def test_captions_are_transformers_own(weights_folder, frames):
    metric = opened(weights_folder)
    caption = metric.captions(frames[0][:1])[0]
    prompt = metric.tokenizer("a picture of", return_tensors="pt").input_ids
    pixels = preprocess.normalised(preprocess.squeezed_by_pillow(frames[0][0].image, 32), preprocess.CLIP)
    tokens = metric.model.generate(pixels, prompt, num_beams=3, max_length=20, min_length=5)
    assert tokens.shape[1] <= 20
    assert metric.tokenizer.decode(tokens[0, 1:], skip_special_tokens=True) == f"a picture of {caption}"


def test_a_caption_depends_on_order_in_the_papers_mode_alone(weights_folder, frames):
    generated = frames[0]
    metric = opened(weights_folder)
    assert metric.captions(generated[::-1]) == metric.captions(generated)[::-1]
    paper = opened(weights_folder, "paper")
    first = paper.captions(generated)
    assert paper.captions(generated[::-1])[::-1] != first
    assert opened(weights_folder, "paper").captions(generated) == first  # seeded


def test_the_papers_mode_draws_no_numbers_from_the_users_stream(weights_folder, frames):
    torch.manual_seed(1)
    opened(weights_folder, "paper").captions(frames[0][:1])
    drawn = torch.rand(3)
    torch.manual_seed(1)
    open_metrics(["blip_b"], {"folder": weights_folder}, "paper")
    assert torch.equal(drawn, torch.rand(3))


def test_captions_are_compared_with_the_manifests_text_and_in_the_papers_mode_with_the_prompt(weights_folder, frames):
    generated, target, _ = (part[:1] for part in frames)
    default, paper = opened(weights_folder), opened(weights_folder, "paper")

    def score(metric, *texts):
        return metric.scores(generated, target, [Sample("a", *texts)])[0]

    whole = ("open drawer", None, None, "the hand open", "take cup")
    assert score(default, *whole) == score(default, "the hand open") != score(default, "take cup")
    assert score(paper, *whole) == score(paper, "take cup") != score(paper, "the hand open")
    assert score(paper, "open drawer", None, None, "the hand open") == score(paper, "the hand open")


def test_an_equal_text_scores_a_hundred(weights_folder, frames):
    metric = opened(weights_folder)
    caption = metric.captions(frames[0][:1])[0]
    assert metric.scores(frames[0][:1], frames[1][:1], [Sample("a", caption)]) == pytest.approx([100])


def test_dropout_is_on_where_the_release_left_it_on():
    model = BlipForConditionalGeneration(blip_config(width=1024, depth=3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    set_dropout(model)
    pictures = torch.rand(64, 3, 32, 32)
    texts = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        state = model.vision_model(pictures).last_hidden_state
        assert not torch.equal(state, model.vision_model(pictures).last_hidden_state)
        decode = model.text_decoder.bert
        inputs = {"input_ids": texts, "encoder_hidden_states": state[:1]}
        assert not torch.equal(decode(**inputs).last_hidden_state, decode(**inputs).last_hidden_state)
        layers = model.vision_model.encoder.layers
        hidden = torch.randn(200, 5, 1024)
        shares = [(layer.mlp(hidden).abs().sum((1, 2)) == 0).float().mean().item() for layer in layers]
    assert shares[0] == 0 and 0.01 < shares[1] < 0.1 and 0.04 < shares[2] < 0.2  # 0, 0.05, 0.1


def test_the_small_image_encoder_has_no_stochastic_depth():
    model = BlipForConditionalGeneration(blip_config(width=64, depth=2))
    set_dropout(model)
    pictures = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(*(model.vision_model(pictures).last_hidden_state for _ in range(2)))


def blip_config(width: int, depth: int) -> BlipConfig:
    vision = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": depth, "image_size": 32,
              "num_attention_heads": width // 64, "layer_norm_eps": 1e-6}  # fmt: skip
    text = {"vocab_size": BEGIN + 2, "hidden_size": 64, "encoder_hidden_size": width, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 32}  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision)


def salesforce_name(name: str) -> str:
    """The other way than `new_name`, written from the list of names in Salesforce's files."""
    for old, new in (("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
                     ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
                     ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
                     ("vision_model.post_layernorm", "visual_encoder.norm"),
                     ("vision_model.encoder.layers", "visual_encoder.blocks"),
                     ("self_attn.projection", "attn.proj"), ("self_attn.qkv", "attn.qkv"),
                     ("layer_norm", "norm")):  # fmt: skip
        name = name.replace(old, new)
    return name


def test_a_file_of_salesforces_layout_is_read(tmp_path):
    model = BlipForConditionalGeneration(blip_config(width=128, depth=2)).eval()
    state = {salesforce_name(name): value for name, value in model.state_dict().items()}
    assert "visual_encoder.blocks.1.attn.qkv.weight" in state and "text_decoder.cls.predictions.decoder.bias" in state
    assert {new_name(name) for name in state} == set(model.state_dict())
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(32)[None]
    torch.save({"model": state, "epoch": 3}, tmp_path / "model_base_caption_capfilt_large.pth")
    loaded = load_blip("blip_b", str(tmp_path / "model_base_caption_capfilt_large.pth"))
    assert loaded.config.text_config.bos_token_id == BEGIN and loaded.config.text_config.sep_token_id == SEPARATOR
    inputs = torch.rand(1, 3, 32, 32), torch.tensor([[101, 1037, 3861, 1997, 102]])
    with torch.no_grad():
        mine, theirs = (m.generate(*inputs, num_beams=3, max_length=9, min_length=5) for m in (loaded, model))
    assert torch.equal(mine, theirs)
    with torch.no_grad():
        np.testing.assert_allclose(loaded(*inputs).logits, model(*inputs).logits, atol=1e-6)


def test_another_file_is_refused_in_one_line(tmp_path, weights_folder):
    with pytest.raises(
        ValueError, match=r"`blip_l` must be a file of BLIP captioning in Salesforce's layout"
    ) as error:
        load_blip("blip_l", str(weights_folder / "squeezenet1_1-b8a52dc0.pth"))
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(f"got {tmp_path} (")):
        load_blip("blip_b", str(tmp_path))
