"""Keys and values that are computed once per call: exact, restored afterwards, out of the way of other processors."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from lego_pipeline.attention import KeyValueMemory, ReusingAttnProcessor, is_compiled, reuse_keys_values


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(3, 12, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(3, 20, 32, generator=generator),
    }


def cross_attention(unet) -> list[Attention]:
    return [layer for layer in unet.modules() if isinstance(layer, Attention) and layer.is_cross_attention]


def run(unet, inputs, timestep=500) -> torch.Tensor:
    return unet(inputs["sample"], timestep, inputs["encoder_hidden_states"]).sample


def count_projections(unet) -> list[str]:
    calls: list[str] = []
    for layer in cross_attention(unet):
        layer.to_k.register_forward_hook(lambda *_: calls.append("k"))
    return calls


def test_a_step_that_fills_the_memory_and_one_that_reads_it_are_bit_equal_to_plain(tiny_pipeline, inputs):
    unet = tiny_pipeline.unet
    plain = [run(unet, inputs, timestep) for timestep in (900, 100)]
    with reuse_keys_values(unet) as memory:
        memory.plan = ("C", "M", "U")
        reused = [run(unet, inputs, timestep) for timestep in (900, 100)]
    assert all(torch.equal(a, b) for a, b in zip(plain, reused, strict=True))


def test_keys_are_projected_in_the_first_step_only(tiny_pipeline, inputs):
    calls = count_projections(tiny_pipeline.unet)
    with reuse_keys_values(tiny_pipeline.unet) as memory:
        memory.plan = ("C", "M", "U")
        for timestep in (900, 500, 100):
            run(tiny_pipeline.unet, inputs, timestep)
    assert len(calls) == len(cross_attention(tiny_pipeline.unet)) > 0


def test_the_first_passes_of_a_known_plan_are_a_slice_of_it(tiny_pipeline, inputs):
    first = {name: value[:1] for name, value in inputs.items()}
    plain = run(tiny_pipeline.unet, first)
    calls = count_projections(tiny_pipeline.unet)
    with reuse_keys_values(tiny_pipeline.unet) as memory:
        memory.plan = ("C", "M", "U")
        run(tiny_pipeline.unet, inputs)
        filled = len(calls)
        memory.plan = ("C",)
        torch.testing.assert_close(run(tiny_pipeline.unet, first), plain, atol=1e-6, rtol=0)
        assert len(calls) == filled


def test_a_longer_plan_after_a_shorter_one_is_computed_anew(tiny_pipeline, inputs):
    plain = run(tiny_pipeline.unet, inputs)
    with reuse_keys_values(tiny_pipeline.unet) as memory:
        memory.plan = ("C",)
        run(tiny_pipeline.unet, {name: value[:1] for name, value in inputs.items()})
        memory.plan = ("C", "M", "U")
        torch.testing.assert_close(run(tiny_pipeline.unet, inputs), plain, atol=1e-6, rtol=0)


def test_a_cleared_memory_takes_the_new_condition(tiny_pipeline, inputs):
    other = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
    plain = run(tiny_pipeline.unet, other)
    with reuse_keys_values(tiny_pipeline.unet) as memory:
        memory.plan = ("C",)
        run(tiny_pipeline.unet, inputs)
        memory.clear()
        assert torch.equal(run(tiny_pipeline.unet, other), plain)


def test_the_old_processors_come_back_after_an_exception(tiny_pipeline):
    before = tiny_pipeline.unet.attn_processors
    with pytest.raises(RuntimeError, match="stop"), reuse_keys_values(tiny_pipeline.unet):
        assert any(isinstance(p, ReusingAttnProcessor) for p in tiny_pipeline.unet.attn_processors.values())
        raise RuntimeError("stop")
    after = tiny_pipeline.unet.attn_processors
    assert all(after[name] is before[name] for name in before)


def test_a_processor_that_somebody_set_stays(tiny_pipeline):
    tiny_pipeline.unet.set_attn_processor(AttnProcessor())
    with reuse_keys_values(tiny_pipeline.unet):
        assert {type(p) for p in tiny_pipeline.unet.attn_processors.values()} == {AttnProcessor}


def test_self_attention_keeps_its_processor(tiny_pipeline):
    with reuse_keys_values(tiny_pipeline.unet):
        for name, processor in tiny_pipeline.unet.attn_processors.items():
            assert type(processor) is (AttnProcessor2_0 if "attn1" in name else ReusingAttnProcessor)


def test_an_encoder_mask_acts_as_in_the_plain_processor(tiny_pipeline, inputs):
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[:, 7:] = False

    def masked() -> torch.Tensor:
        return tiny_pipeline.unet(**inputs, timestep=500, encoder_attention_mask=mask).sample

    plain = masked()
    with reuse_keys_values(tiny_pipeline.unet) as memory:
        memory.plan = ("C",)
        assert torch.equal(masked(), plain)


def test_a_compiled_unet_is_left_alone(tiny_pipeline):
    compiled = torch.compile(tiny_pipeline.unet, backend="eager")
    assert is_compiled(compiled) and not is_compiled(tiny_pipeline.unet)
    with reuse_keys_values(compiled):
        assert {type(p) for p in tiny_pipeline.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_a_unet_compiled_in_place_counts_as_compiled(tiny_pipeline):
    tiny_pipeline.unet.mid_block.compile(backend="eager")
    assert is_compiled(tiny_pipeline.unet)


def test_an_empty_memory_knows_nothing(tiny_pipeline):
    memory = KeyValueMemory()
    memory.plan = ("C",)
    assert memory.read(cross_attention(tiny_pipeline.unet)[0]) is None
