"""The nodes in order, with the embedded checkpoint, and what they answer to bad input."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lego_pipeline import images
from lego_pipeline.checkpoints import FRAMES, KITCHEN
from lego_pipeline.data.manifest import read_manifest
from lego_pipeline.export import note_vlm
from lego_pipeline.lora import add_lora, export_lora, merge_lora
from lego_pipeline.pipeline_lego import LegoPipeline
from lego_pipeline.scheduler import LegoEulerAncestralScheduler
from lego_pipeline.storyboard import paint_storyboard
from lego_pipeline.vlm.base import Enhancement

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

Run = Callable[..., tuple[Any, ...]]


def image_of(*pictures: Any) -> torch.Tensor:
    """IMAGE of PIL pictures of one size."""
    return torch.stack([torch.from_numpy(np.array(images.to_rgb(picture))) for picture in pictures]).float() / 255


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    """A held-out pair of the embedded frames."""
    return read_manifest(FRAMES)[0]


@pytest.fixture(scope="module")
def frame(row: dict[str, Any]) -> torch.Tensor:
    return image_of(row["image_0"])


@pytest.fixture(scope="module")
def loaded(run_node: Run, adapter: ModuleType) -> tuple[Any, ...]:
    return run_node("LegoLoadPipeline", model=adapter.EMBEDDED, dtype="auto")


@pytest.fixture(scope="module")
def vlm(run_node: Run, adapter: ModuleType) -> Any:
    return run_node("LegoLoadVlm", model=adapter.EMBEDDED, dtype="auto")[0]


@pytest.fixture(scope="module")
def kitchen() -> LegoPipeline:
    pipe = LegoPipeline.from_pretrained(KITCHEN)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def enhancement(run_node: Run, vlm: Any, frame: torch.Tensor, row: dict[str, Any]) -> tuple[Any, ...]:
    return run_node("LegoEnhancePrompt", lego_vlm=vlm, image=frame, action=row["action"], seed=3)


# --- The stages --------------------------------------------------------------------------------------------------


def test_the_loader_tells_the_checkpoints_own_settings(loaded: tuple[Any, ...], kitchen: LegoPipeline) -> None:
    config = kitchen.config
    assert loaded[4:] == (config.num_inference_steps, config.guidance_scale, config.image_guidance_scale)


def test_descriptions_and_embeddings_are_the_pipelines(
    enhancement: tuple[Any, ...], kitchen: LegoPipeline, frame: torch.Tensor, row: dict[str, Any]
) -> None:
    expected = kitchen.enhance(frame.movedim(-1, 1), row["action"], generator=torch.Generator().manual_seed(3))[0]
    [item], text = enhancement
    assert item.description == expected.description == text
    assert torch.allclose(item.image_embeds, expected.image_embeds, atol=1e-5)
    assert torch.allclose(item.text_embeds, expected.text_embeds, atol=1e-5)


def test_an_edited_description_is_embedded_not_sampled(
    run_node: Run, vlm: Any, frame: torch.Tensor, kitchen: LegoPipeline, row: dict[str, Any]
) -> None:
    words = "The person pulls the drawer with the left hand."
    [item], text = run_node("LegoEditDescription", lego_vlm=vlm, image=frame, action=row["action"], description=words)
    expected = kitchen.enhance(frame.movedim(-1, 1), row["action"], words)[0]
    assert text == item.description == words
    assert torch.allclose(item.text_embeds, expected.text_embeds, atol=1e-5)


def test_conditions_are_the_pipelines(
    run_node: Run, loaded: tuple[Any, ...], enhancement: tuple[Any, ...], frame: torch.Tensor, kitchen: LegoPipeline
) -> None:
    _, clip, vae, handle, *_ = loaded
    empty, image_latent, size = run_node("LegoEncodeFrame", lego_pipeline=handle, vae=vae, image=frame, resolution=0)
    full, image_only, null, latent = run_node(
        "LegoEncodeCondition",
        lego_pipeline=handle,
        clip=clip,
        image_latent=image_latent,
        lego_enhancement=enhancement[0],
    )
    with torch.no_grad():
        condition, null_condition = kitchen.encode_condition(enhancement[0])
        encoded = kitchen.encode_image(frame.movedim(-1, 1) * 2 - 1)
    assert torch.allclose(full[0][0], condition, atol=1e-4)
    assert torch.allclose(image_only[0][0], null_condition, atol=1e-4) and torch.equal(null[0][0], image_only[0][0])
    assert torch.allclose(full[0][1]["concat_latent_image"], encoded, atol=1e-4)
    assert "concat_latent_image" in image_only[0][1] and "concat_latent_image" not in null[0][1]
    assert size == frame.shape[1:3]
    for zeros in (empty, latent):
        assert zeros["samples"].shape == encoded.shape and not zeros["samples"].any()


def sampled(
    run_node: Run, loaded: tuple[Any, ...], parts: tuple[Any, ...], noise: torch.Tensor, scales: tuple[float, float]
) -> torch.Tensor:
    """IMAGE from the stock sampling nodes."""
    import comfy.samplers
    import nodes
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    class Noise:
        seed = 0

        def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
            return noise.clone()

    model, _, vae, *_ = loaded
    guider = run_node(
        "LegoGuidance",
        model=model,
        condition=parts[0],
        image_only=parts[1],
        null=parts[2],
        guidance_scale=scales[0],
        image_guidance_scale=scales[1],
    )[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", loaded[4])
    with torch.inference_mode():
        latent = SamplerCustomAdvanced.execute(
            Noise(), guider, comfy.samplers.sampler_object("euler"), sigmas, parts[3]
        ).result[0]
        return nodes.VAEDecode().decode(vae, latent)[0]


def test_the_whole_graph_gives_the_pipelines_picture(
    run_node: Run, loaded: tuple[Any, ...], enhancement: tuple[Any, ...], frame: torch.Tensor, kitchen: LegoPipeline
) -> None:
    _, clip, vae, handle, *_ = loaded
    large = torch.nn.functional.interpolate(frame.movedim(-1, 1), scale_factor=1.5).movedim(1, -1)
    _, image_latent, size = run_node("LegoEncodeFrame", lego_pipeline=handle, vae=vae, image=large, resolution=0)
    parts = run_node(
        "LegoEncodeCondition",
        lego_pipeline=handle,
        clip=clip,
        image_latent=image_latent,
        lego_enhancement=enhancement[0],
    )
    noise = torch.randn(parts[3]["samples"].shape, generator=torch.Generator().manual_seed(9))
    picture = run_node("LegoRestoreSize", image=sampled(run_node, loaded, parts, noise, (1.5, 1.2)), lego_size=size)[0]
    kitchen.scheduler = LegoEulerAncestralScheduler.from_config(kitchen.scheduler.config, eta=0, conventions="comfyui")
    expected = kitchen(
        large.movedim(-1, 1),
        enhancement=enhancement[0],
        latents=noise,
        guidance_scale=1.5,
        image_guidance_scale=1.2,
        output_type="pt",
        keep_scene=False,  # that is LegoKeepScene's part
    ).images
    assert picture.shape == large.shape
    assert (picture.movedim(-1, 1) - expected).abs().max() < 2e-3


def test_a_batch_of_actions_is_one_batch_of_conditions(
    run_node: Run, loaded: tuple[Any, ...], vlm: Any, frame: torch.Tensor
) -> None:
    _, clip, vae, handle, *_ = loaded
    items, text = run_node("LegoEnhancePrompt", lego_vlm=vlm, image=frame, action="open drawer\n\ntake cup\n", seed=0)
    assert len(items) == len(text.splitlines()) == 2
    _, image_latent, _ = run_node("LegoEncodeFrame", lego_pipeline=handle, vae=vae, image=frame, resolution=0)
    parts = run_node(
        "LegoEncodeCondition", lego_pipeline=handle, clip=clip, image_latent=image_latent, lego_enhancement=items
    )
    noise = torch.randn(parts[3]["samples"].shape, generator=torch.Generator().manual_seed(9))
    both = sampled(run_node, loaded, parts, noise, (1.5, 1.0))
    assert both.shape[0] == 2
    alone = [
        [[parts[0][0][0][1:], {"concat_latent_image": image_latent["samples"]}]],
        *parts[1:3],
        {"samples": parts[3]["samples"][1:]},
    ]
    alone[1] = [[parts[1][0][0], {"concat_latent_image": image_latent["samples"]}]]
    assert (sampled(run_node, loaded, tuple(alone), noise[1:], (1.5, 1.0)) - both[1:]).abs().max() < 1e-4


def test_text_without_a_vlm(
    run_node: Run, loaded: tuple[Any, ...], frame: torch.Tensor, kitchen: LegoPipeline
) -> None:
    _, clip, vae, handle, *_ = loaded
    _, image_latent, _ = run_node("LegoEncodeFrame", lego_pipeline=handle, vae=vae, image=frame, resolution=0)
    parts = run_node(
        "LegoEncodeCondition", lego_pipeline=handle, clip=clip, image_latent=image_latent, text="open drawer"
    )
    with torch.no_grad():
        condition, _ = kitchen.encode_condition(description="open drawer")
    assert torch.allclose(parts[0][0][0], condition, atol=1e-4)


def test_a_storyboard_is_the_librarys(
    run_node: Run,
    loaded: tuple[Any, ...],
    vlm: Any,
    frame: torch.Tensor,
    adapter: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[int] = []
    monkeypatch.setattr(adapter.runtime, "progress", lambda total: lambda done, preview=None: shown.append(done))
    pictures, text = run_node(
        "LegoPaintStoryboard",
        lego_pipeline=loaded[3],
        image=frame,
        actions="open drawer\nclose drawer",
        follow="previous",
        seed=1,
        steps=2,
        guidance_scale=-1.0,
        image_guidance_scale=-1.0,
        lego_vlm=vlm,
    )
    assert pictures.shape == (2, *frame.shape[1:]) and len(text.splitlines()) == 2
    assert max(shown) > 4  # tokens of the descriptions
    pipe = LegoPipeline.from_pretrained(KITCHEN)
    generator = torch.Generator().manual_seed(1)
    panels = paint_storyboard(
        pipe, frame.movedim(-1, 1), ["open drawer", "close drawer"], generator=generator, num_inference_steps=2
    )
    expected = image_of(*(panel.image for panel in panels))
    assert (pictures - expected).abs().max() < 3 / 255


def test_the_scene_is_kept_as_the_pipeline_keeps_it(
    run_node: Run, loaded: tuple[Any, ...], frame: torch.Tensor, kitchen: LegoPipeline, row: dict[str, Any]
) -> None:
    _, _, vae, handle, *_ = loaded
    target = image_of(row["image_1"])
    _, own, size = run_node("LegoEncodeFrame", lego_pipeline=handle, vae=vae, image=frame, resolution=0)
    _, samples, _ = run_node("LegoEncodeFrame", lego_pipeline=handle, vae=vae, image=target, resolution=0)
    with torch.inference_mode():
        decoded = vae.decode(samples["samples"])
    restored = run_node("LegoRestoreSize", image=decoded, lego_size=size)[0]
    given = {"image": restored, "frame": frame, "samples": samples, "image_latent": own}
    picture = run_node("LegoKeepScene", **given, low=0.3, high=0.6)[0]
    with torch.no_grad():
        expected = kitchen.decode(
            samples["samples"] * kitchen.vae.config.scaling_factor,
            "pt",
            [(frame.shape[1], frame.shape[2])],
            [frame[0].movedim(-1, 0)],
            own["samples"],
            (0.3, 0.6),
        )
    assert (picture.movedim(-1, 1) - expected).abs().max() < 1e-3
    kept = (picture == frame).all(-1).float().mean()
    assert 0.05 < kept < 1  # of the pixels: some of the scene stays, the hands are new
    batch = {"image": restored.expand(2, -1, -1, -1), "samples": {"samples": samples["samples"].expand(2, -1, -1, -1)}}
    both = run_node("LegoKeepScene", **(given | batch), low=0.3, high=0.6)[0]
    assert torch.allclose(both, picture.expand(2, -1, -1, -1))


def test_what_does_not_belong_together_keeps_no_scene(run_node: Run, frame: torch.Tensor) -> None:
    latent, other = {"samples": torch.zeros(1, 48, 8, 8)}, {"samples": torch.zeros(1, 48, 9, 8)}
    given = {"image": frame, "frame": frame, "samples": latent, "image_latent": latent, "low": 0.3, "high": 0.6}
    for changes, message in (
        ({"low": 0.7}, "`low` must be less than `high` .0.6., got 0.7"),
        ({"image_latent": other}, "`image_latent` must be of the size of `samples`"),
        ({"image": frame.expand(3, -1, -1, -1)}, "`samples` must be as many as the pictures .3., got 1"),
        ({"frame": frame.expand(2, -1, -1, -1)}, "`frame` must be as many as the pictures .1., got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            run_node("LegoKeepScene", **(given | changes))


def test_the_grid_has_a_card_for_each_picture(run_node: Run, frame: torch.Tensor) -> None:
    grid = run_node(
        "LegoCompareGrid", image_1=frame, image_2=frame.expand(3, -1, -1, -1), titles="a\nb\nc", frame_size=64
    )[0]
    alone = run_node("LegoCompareGrid", image_1=frame, image_2=frame, frame_size=64)[0]
    assert grid.shape[0] == 1 and grid.shape[-1] == 3
    assert grid.shape[1] > alone.shape[1]


# --- Enhancements on disk ----------------------------------------------------------------------------------------


def test_a_saved_enhancement_is_loaded_without_a_vlm(
    run_node: Run, vlm: Any, frame: torch.Tensor, adapter: ModuleType, kitchen: LegoPipeline, comfyui: Path
) -> None:
    saved, text, cache = run_node(
        "LegoSaveEnhancement", lego_vlm=vlm, image=frame, action="open drawer\ntake cup", cache="first"
    )
    assert (comfyui / "output" / "lego_enhancements" / "first").is_dir()
    assert cache == "output/first" and cache in adapter.cache_folders()
    loaded, again = run_node("LegoLoadEnhancement", image=frame, action="open drawer\ntake cup", cache="output/first")
    assert text == again
    for one, other in zip(saved, loaded, strict=True):
        assert torch.equal(one.image_embeds, other.image_embeds) and torch.equal(one.text_embeds, other.text_embeds)
    picture = images.to_pil(images.to_frames(frame.movedim(-1, 1))[0])
    [mine] = kitchen.enhance(picture, "open drawer", cache=comfyui / "output" / "lego_enhancements" / "first")
    assert torch.equal(mine.text_embeds, loaded[0].text_embeds)


def test_a_description_of_ones_own_is_saved_and_found(run_node: Run, vlm: Any, frame: torch.Tensor) -> None:
    given = {"image": frame, "action": "open drawer", "description": "The person pulls it."}
    saved, *_ = run_node("LegoSaveEnhancement", lego_vlm=vlm, cache="own", **given)
    loaded, text = run_node("LegoLoadEnhancement", cache="output/own", **given)
    assert text == "The person pulls it."
    assert torch.equal(saved[0].text_embeds, loaded[0].text_embeds)


def test_what_a_cache_lacks_is_said(run_node: Run, vlm: Any, frame: torch.Tensor) -> None:
    run_node("LegoSaveEnhancement", lego_vlm=vlm, image=frame, action="open drawer", cache="small")
    with pytest.raises(ValueError, match="`cache` must hold the frame with the action 'take cup'"):
        run_node("LegoLoadEnhancement", image=frame, action="take cup", cache="output/small")


@pytest.mark.parametrize("name", ["", "..", "../up", "/tmp/elsewhere", "a/b"])
def test_a_cache_outside_its_root_is_refused(run_node: Run, vlm: Any, frame: torch.Tensor, name: str) -> None:
    with pytest.raises(ValueError, match="`cache` must be the name of a folder, got"):
        run_node("LegoSaveEnhancement", lego_vlm=vlm, image=frame, action="open drawer", cache=name)
    with pytest.raises(FileNotFoundError, match="`cache` must be one of those found"):
        run_node("LegoLoadEnhancement", image=frame, action="open drawer", cache=name)


def test_a_damaged_cache_is_named(run_node: Run, vlm: Any, frame: torch.Tensor, comfyui: Path) -> None:
    run_node("LegoSaveEnhancement", lego_vlm=vlm, image=frame, action="open drawer", cache="damaged")
    folder = comfyui / "output" / "lego_enhancements" / "damaged"
    [shard] = folder.glob("[0-9]*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=shard.name):
        run_node("LegoLoadEnhancement", image=frame, action="open drawer", cache="output/damaged")


# --- LoRA --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_lora(comfyui: Path) -> Iterator[LegoPipeline]:
    """A LoRA below models/lego as training exports it; gives the pipeline with it merged."""
    folder = comfyui / "models" / "lego" / "run" / "lora"
    pipe = LegoPipeline.from_pretrained(KITCHEN)
    add_lora(pipe.unet, rank=4, alpha=6)
    generator = torch.Generator().manual_seed(2)
    for name, weight in pipe.unet.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    export_lora(pipe.unet.state_dict(), 6, folder)
    for weight in pipe.projector.parameters():
        weight.data += 0.01
    pipe.projector.save_pretrained(folder / "projector")
    plain = LegoPipeline.from_pretrained(KITCHEN, projector=pipe.projector)
    plain.unet.load_state_dict(merge_lora(pipe.unet.state_dict(), 6))
    plain.set_progress_bar_config(disable=True)
    yield plain
    shutil.rmtree(folder)


def test_a_lora_changes_unet_and_projector(
    run_node: Run, loaded: tuple[Any, ...], trained_lora: LegoPipeline, enhancement: tuple[Any, ...]
) -> None:
    import comfy.model_management

    model, handle = run_node("LegoLoadLora", model=loaded[0], lego_pipeline=loaded[3], lora="run/lora", strength=1.0)
    noisy, t = torch.randn(1, 96, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([300.0])
    latent = {"samples": torch.zeros(1, 48, 8, 8)}
    parts = run_node(
        "LegoEncodeCondition",
        lego_pipeline=handle,
        clip=loaded[1],
        image_latent=latent,
        lego_enhancement=enhancement[0],
    )
    with torch.inference_mode():
        condition, _ = trained_lora.encode_condition(enhancement[0])
        assert torch.allclose(parts[0][0][0], condition, atol=1e-4)
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        ours = model.model.diffusion_model(noisy, t, context=condition)
        theirs = trained_lora.unet(noisy, t, condition).sample
        assert (ours - theirs).abs().max() < 1e-4
        comfy.model_management.load_models_gpu([loaded[0]], force_full_load=True)
        assert (loaded[0].model.diffusion_model(noisy, t, context=condition) - theirs).abs().max() > 1e-2


def test_comfyuis_own_loader_takes_the_exported_file(
    run_node: Run, loaded: tuple[Any, ...], trained_lora: LegoPipeline, comfyui: Path
) -> None:
    import comfy.sd
    import comfy.utils

    weights = comfy.utils.load_torch_file(str(comfyui / "models" / "lego" / "run" / "lora" / "comfyui.safetensors"))
    stock, _ = comfy.sd.load_lora_for_models(loaded[0], None, weights, 1.0, 0.0)
    ours, _ = run_node("LegoLoadLora", model=loaded[0], lego_pipeline=loaded[3], lora="run/lora", strength=1.0)
    assert stock.patches.keys() == ours.patches.keys() and len(stock.patches) > 10


def test_a_storyboard_uses_the_lora(
    run_node: Run, loaded: tuple[Any, ...], trained_lora: LegoPipeline, frame: torch.Tensor
) -> None:
    handle = run_node("LegoLoadLora", model=loaded[0], lego_pipeline=loaded[3], lora="run/lora", strength=1.0)[1]
    pictures = run_node(
        "LegoPaintStoryboard", lego_pipeline=handle, image=frame, actions="open drawer", follow="first", seed=1,
        steps=2, guidance_scale=1.0, image_guidance_scale=1.0,
    )[0]  # fmt: skip
    trained_lora.register_modules(vlm=None, vlm_processor=None)
    expected = trained_lora(
        frame.movedim(-1, 1),
        "open drawer",
        num_inference_steps=2,
        guidance_scale=1.0,
        image_guidance_scale=1.0,
        generator=torch.Generator().manual_seed(1),
    ).images
    assert (pictures - image_of(*expected)).abs().max() < 3 / 255


def test_a_lora_of_which_nothing_fits_is_refused(run_node: Run, loaded: tuple[Any, ...], comfyui: Path) -> None:
    folder = comfyui / "models" / "lego" / "foreign"
    folder.mkdir()
    try:
        for weights in (
            {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(4, 160)},
            {
                "lora_unet_other.lora_down.weight": torch.zeros(4, 8),
                "lora_unet_other.lora_up.weight": torch.zeros(8, 4),
            },
        ):
            save_file(weights, folder / "comfyui.safetensors")
            with pytest.raises(
                ValueError, match="`lora` must fit this checkpoint's UNet, got 'foreign' with . adapters"
            ):
                run_node("LegoLoadLora", model=loaded[0], lego_pipeline=loaded[3], lora="foreign", strength=1.0)
    finally:
        shutil.rmtree(folder)


# --- Cancel ------------------------------------------------------------------------------------------------------


def test_cancel_stops_within_one_token(
    run_node: Run, vlm: Any, frame: torch.Tensor, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(adapter.runtime, "stop_if_asked", stop)
    with pytest.raises(KeyboardInterrupt):
        run_node("LegoEnhancePrompt", lego_vlm=vlm, image=frame, action="open drawer", seed=0)
    assert len(calls) == 3
    assert not vlm.pipe.vlm._forward_pre_hooks


def test_cancel_stops_a_storyboard_within_one_step(
    run_node: Run, loaded: tuple[Any, ...], frame: torch.Tensor, adapter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    management = pytest.importorskip("comfy.model_management")
    calls = []

    def before_step(*_: Any) -> None:
        calls.append(1)
        management.interrupt_current_processing(len(calls) == 2)

    hook = loaded[3].pipeline().unet.register_forward_pre_hook(before_step)
    try:
        with pytest.raises(management.InterruptProcessingException):
            run_node(
                "LegoPaintStoryboard",
                lego_pipeline=loaded[3],
                image=frame,
                actions="open drawer",
                follow="first",
                seed=1,
                steps=6,
                guidance_scale=1.0,
                image_guidance_scale=1.0,
            )
    finally:
        hook.remove()
    assert len(calls) == 2


# --- Bad input ---------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_listed_names_the_folders(run_node: Run, comfyui: Path) -> None:
    for name in ("nothing", "../outside", "/etc"):
        with pytest.raises(FileNotFoundError, match="`model` must be one of those found .*kitchen.*models.lego"):
            run_node("LegoLoadPipeline", model=name, dtype="auto")
        with pytest.raises(FileNotFoundError, match="`model` must be one of those found"):
            run_node("LegoLoadVlm", model=name, dtype="auto")


@pytest.fixture
def own_folder(comfyui: Path) -> Iterator[Path]:
    """A copy of the embedded checkpoint as `own/kitchen` below models/lego."""
    folder = comfyui / "models" / "lego" / "own" / "kitchen"
    shutil.copytree(KITCHEN, folder)
    yield folder
    shutil.rmtree(folder)


def test_own_folders_are_listed_after_the_embedded_one(own_folder: Path, adapter: ModuleType) -> None:
    assert list(adapter.pipeline_folders())[:2] == [adapter.EMBEDDED, "own/kitchen"]
    assert "own/kitchen" in adapter.vlm_folders()
    assert "own/kitchen/vlm" not in adapter.vlm_folders()


def test_a_vlm_folder_of_its_own_is_loaded(run_node: Run, comfyui: Path, frame: torch.Tensor) -> None:
    folder = comfyui / "models" / "lego" / "tuned"
    shutil.copytree(KITCHEN / "vlm", folder)
    for path in (KITCHEN / "vlm_processor").iterdir():
        shutil.copy(path, folder)
    try:
        [vlm] = run_node("LegoLoadVlm", model="tuned", dtype="auto")
        assert run_node("LegoEnhancePrompt", lego_vlm=vlm, image=frame, action="open drawer", seed=0)[1]
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_corrupt_file_is_named(run_node: Run, own_folder: Path, part: str) -> None:
    path = own_folder / part
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=path.name):
        run_node("LegoLoadPipeline", model="own/kitchen", dtype="auto")


def test_weights_that_are_not_finite_are_refused(run_node: Run, own_folder: Path) -> None:
    path = own_folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`vae` must have finite weights"):
        run_node("LegoLoadPipeline", model="own/kitchen", dtype="auto")


@pytest.mark.parametrize("text", ["", "  \n \n"])
def test_an_empty_action_is_refused(run_node: Run, vlm: Any, frame: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match="`action` must have a text on at least one line"):
        run_node("LegoEnhancePrompt", lego_vlm=vlm, image=frame, action=text, seed=0)


def test_a_wrong_number_of_pictures_is_refused(
    run_node: Run, loaded: tuple[Any, ...], vlm: Any, frame: torch.Tensor
) -> None:
    two = frame.expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="image.*2"):
        run_node("LegoEnhancePrompt", lego_vlm=vlm, image=two, action="open drawer\ntake cup\nclose drawer", seed=0)
    with pytest.raises(ValueError, match="`image` must be one picture, got 2"):
        run_node(
            "LegoPaintStoryboard", lego_pipeline=loaded[3], image=two, actions="open drawer", follow="first", seed=0,
            steps=1, guidance_scale=1.0, image_guidance_scale=1.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="`image_1` must have one picture or as many as the others .3., got 2"):
        run_node("LegoCompareGrid", image_1=two, image_2=frame.expand(3, -1, -1, -1))
    latent = {"samples": torch.zeros(2, 48, 8, 8)}
    with pytest.raises(ValueError, match="`image_latent` must have one entry or as many as the other .3., got 2"):
        run_node("LegoEncodeCondition", lego_pipeline=loaded[3], clip=loaded[1], image_latent=latent, text="a\nb\nc")


def test_an_enhancement_of_another_model_is_refused(run_node: Run, loaded: tuple[Any, ...]) -> None:
    other = [Enhancement("The person opens it.", torch.zeros(4, 32), torch.zeros(3, 32))]
    latent = {"samples": torch.zeros(1, 48, 8, 8)}
    with pytest.raises(ValueError, match="use the VLM that this checkpoint was trained with"):
        run_node(
            "LegoEncodeCondition", lego_pipeline=loaded[3], clip=loaded[1], image_latent=latent, lego_enhancement=other
        )


def test_an_enhancement_of_another_vlm_of_the_same_sizes_is_refused(
    run_node: Run, own_folder: Path, comfyui: Path, frame: torch.Tensor
) -> None:
    """By the weights: of two VLMs that differ in one weight, in an enhancement made now and in a saved one."""
    note_vlm(own_folder)
    folder = comfyui / "models" / "lego" / "other"
    shutil.copytree(own_folder / "vlm", folder)
    for path in (own_folder / "vlm_processor").iterdir():
        shutil.copy(path, folder)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, clip, _, handle, *_ = run_node("LegoLoadPipeline", model="own/kitchen", dtype="auto")
    latent = {"samples": torch.zeros(1, 48, 8, 8)}
    given = {"lego_pipeline": handle, "clip": clip, "image_latent": latent}
    try:
        for name in ("own/kitchen", "other"):
            [vlm] = run_node("LegoLoadVlm", model=name, dtype="auto")
            asked = {"image": frame, "action": "open drawer"}
            described, _ = run_node("LegoEnhancePrompt", lego_vlm=vlm, seed=0, **asked)
            cache = name.replace("/", "-")
            run_node("LegoSaveEnhancement", lego_vlm=vlm, cache=cache, **asked)
            saved, _ = run_node("LegoLoadEnhancement", cache=f"output/{cache}", **asked)
            for enhancement in (described, saved):
                if name == "other":
                    with pytest.raises(ValueError, match="of another VLM of the same size"):
                        run_node("LegoEncodeCondition", lego_enhancement=enhancement, **given)
                else:
                    run_node("LegoEncodeCondition", lego_enhancement=enhancement, **given)
    finally:
        shutil.rmtree(folder)


def test_a_text_beside_an_enhancement_is_refused(
    run_node: Run, loaded: tuple[Any, ...], enhancement: tuple[Any, ...]
) -> None:
    latent = {"samples": torch.zeros(1, 48, 8, 8)}
    with pytest.raises(ValueError, match="`text` must be empty when an enhancement is connected"):
        run_node(
            "LegoEncodeCondition", lego_pipeline=loaded[3], clip=loaded[1], image_latent=latent,
            lego_enhancement=enhancement[0], text="open drawer",
        )  # fmt: skip


def test_a_picture_of_one_pixel_is_refused(run_node: Run, loaded: tuple[Any, ...], vlm: Any) -> None:
    pixel = torch.zeros(1, 1, 1, 3)
    with pytest.raises(ValueError, match="`image` must be at least 8 pixels wide and high, got 1x1"):
        run_node("LegoEncodeFrame", lego_pipeline=loaded[3], vae=loaded[2], image=pixel, resolution=0)
    with pytest.raises(ValueError, match="`image` must be at least 8 pixels wide and high, got 1x1"):
        run_node("LegoEnhancePrompt", lego_vlm=vlm, image=pixel, action="open drawer", seed=0)


def test_alpha_is_cut_off_and_large_pictures_are_resized(
    run_node: Run, loaded: tuple[Any, ...], frame: torch.Tensor
) -> None:
    def encode(image: torch.Tensor) -> torch.Tensor:
        return run_node("LegoEncodeFrame", lego_pipeline=loaded[3], vae=loaded[2], image=image, resolution=0)[1][
            "samples"
        ]

    alpha = torch.cat([frame, torch.rand(*frame.shape[:3], 1)], dim=-1)
    assert torch.equal(encode(alpha), encode(frame))
    assert encode(torch.rand(1, 1000, 8000, 3)).shape[-2:] == (3, 23)


# --- Checkpoints that ComfyUI's classes can't hold ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 16}, "`unet.norm_num_groups` must be 32 in ComfyUI, got 16"),
        ({"resnet_time_scale_shift": "scale_shift"}, "`unet.resnet_time_scale_shift` must be default"),
        ({"attention_head_dim": (4, 8)}, "one number for all levels"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "must be the down blocks in reverse"),
    ],
)
def test_an_unet_of_another_kind_is_refused(
    adapter: ModuleType, kitchen: LegoPipeline, changes: dict[str, Any], message: str
) -> None:
    class Unet:
        config = type(kitchen.unet.config)({**kitchen.unet.config, **changes})

    with pytest.raises(ValueError, match=message):
        adapter.model.unet_config(Unet)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "`scheduler.rescale_betas_zero_snr` must be off"),
        ({"prediction_type": "flow"}, "`scheduler.prediction_type` must be epsilon or v_prediction or sample"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "`scheduler.beta_schedule` must be scaled_linear or linear"),
    ],
)
def test_noise_levels_of_another_kind_are_refused(
    adapter: ModuleType, kitchen: LegoPipeline, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.model.sampling_settings({**kitchen.scheduler.config, **changes})


def test_previews_look_like_the_picture(loaded: tuple[Any, ...], row: dict[str, Any]) -> None:
    import latent_preview

    handle, vae = loaded[3], loaded[2]
    pixels = image_of(row["image_1"])
    with torch.inference_mode():
        latents = vae.encode(pixels) * handle.latent_format.scale_factor
    previewer = latent_preview.Latent2RGBPreviewer(
        handle.latent_format.latent_rgb_factors, handle.latent_format.latent_rgb_factors_bias
    )
    shown = torch.from_numpy(np.array(previewer.decode_latent_to_preview(latents))).float() / 255
    cells = torch.nn.functional.adaptive_avg_pool2d(pixels.movedim(-1, 1), shown.shape[:2])[0].movedim(0, -1)
    error = (shown - cells).square().mean() / (cells - cells.mean(dim=(0, 1))).square().mean()
    assert error < 0.1, error  # 0.036 with the embedded checkpoint of November 2026
