"""Stable Diffusion: the pictures of diffusers, by any sampler, from text, images and masks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from stable_diffusion_folders import NOISE, save_inpainting, save_stable_diffusion
from test_lora_unet import kohya
from test_sample import compilations

import fluxjax
from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.config import SD15, SD21, SDXL, SDXL_REFINER, ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.convert.convert import plan, run
from fluxjax.families import STABLE_DIFFUSION
from fluxjax.families.stable_diffusion import first_step
from fluxjax.models.autoencoder import normalize_latents
from fluxjax.sample.__main__ import main
from fluxjax.sample.reference import pixels
from fluxjax.sample.settings import Settings

PROMPT = "a red circle above a star"
OURS = {"steps": 6, "seed": 3, "guidance": 4.0, "negative_prompt": "blue"}
THEIRS = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": "blue"}
SIZE = {"width": 40, "height": 56}  # latents of 10 x 14, of which the UNet sees halves of 5 and 7
DPM = "DPMSolverMultistepScheduler"
SAMPLERS = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": (DPM, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++sde": (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++3m": (DPM, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "lcm": ("LCMScheduler", {}),
}
COMMANDS = {
    "ddpm --spacing trailing": {"timestep_spacing": "trailing"},
    "ddim --spacing linspace": {"timestep_spacing": "linspace"},
    "pndm --spacing trailing": {"timestep_spacing": "trailing"},
    "euler --spacing leading --sigmas exponential": {
        "timestep_spacing": "leading",
        "use_exponential_sigmas": True,
    },
    "euler-a --spacing trailing": {"timestep_spacing": "trailing"},
    "heun --spacing linspace --sigmas karras": {
        "timestep_spacing": "linspace",
        "use_karras_sigmas": True,
    },
    "dpm++ --sigmas karras": {"use_karras_sigmas": True},
    "dpm++3m --spacing leading --sigmas beta": {
        "timestep_spacing": "leading",
        "use_beta_sigmas": True,
    },
    "dpm++sde --spacing trailing": {"timestep_spacing": "trailing"},
    "unipc --spacing linspace --sigmas karras": {
        "timestep_spacing": "linspace",
        "use_karras_sigmas": True,
    },
    "lcm": {},
}
ADAPTED = {
    "lora_unet": (
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.attentions.0.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    ),
    "lora_te": ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc2"),
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    return save_stable_diffusion(tmp_path_factory.mktemp("sd") / "sd", shared / "tokenizers")


@pytest.fixture(scope="module")
def ours(folder):
    return fluxjax.load_pipeline(folder)


@pytest.fixture(scope="module")
def inpainting(shared, tmp_path_factory):
    folder = save_inpainting(tmp_path_factory.mktemp("sd") / "inpaint", shared / "tokenizers")
    return folder, fluxjax.load_pipeline(folder)


@pytest.fixture(scope="module")
def expected(folder):
    return _quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder))


@pytest.fixture(scope="module")
def image():
    colours = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    return Image.fromarray(colours).resize((40, 56), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask():
    return Image.fromarray((np.indices((56, 40))[1] > 17).astype(np.uint8) * 255)


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, sampler=None, **choices):
    """By diffusers, with its own scheduler or another one that is made of it."""
    own = pipeline.scheduler
    if sampler is not None:
        kind, values = sampler
        pipeline.scheduler = getattr(diffusers, kind).from_config(own.config, **values)
    try:
        generator = torch.Generator().manual_seed(3)
        return pipeline(**{"prompt": PROMPT, "generator": generator, **THEIRS, **choices}).images[0]
    finally:
        pipeline.scheduler = own


def assert_same(picture, expected):
    a, b = (np.asarray(one, int) for one in (picture, expected))
    assert a.shape == b.shape and a.std() > 20
    assert (np.abs(a - b) <= 1).mean() >= 0.999


@pytest.mark.slow
def test_the_folder_alone_decides(ours, expected):
    """Its scheduler, its guidance."""
    theirs = {"num_inference_steps": 5, **SIZE}
    picture = expected(PROMPT, generator=torch.Generator().manual_seed(3), **theirs).images[0]
    assert_same(ours(PROMPT, steps=5, seed=3, **SIZE)[0], picture)


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("euler-a", "dpm++")))
        for name in SAMPLERS
    ],
)
def test_every_sampler_draws_the_picture_of_diffusers(ours, expected, sampler):
    (picture,) = ours(PROMPT, sampler=sampler, **OURS, **SIZE)
    assert_same(picture, drawn(expected, SAMPLERS[sampler], **SIZE))


def test_what_is_asked_of_the_sampler(ours, expected):
    ddim = SAMPLERS["ddim"]
    (noisy,) = ours(PROMPT, sampler="ddim", eta=0.7, **OURS, **SIZE)
    assert_same(noisy, drawn(expected, ddim, eta=0.7, **SIZE))
    spaced = ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "use_karras_sigmas": True})
    (karras,) = ours(PROMPT, sampler="euler", spacing="trailing", sigmas="karras", **OURS, **SIZE)
    assert_same(karras, drawn(expected, spaced, **SIZE))


@pytest.mark.slow
def test_guidance_is_rescaled_or_absent(ours, expected):
    (rescaled,) = ours(PROMPT, guidance_rescale=0.7, **OURS, **SIZE)
    assert_same(rescaled, drawn(expected, guidance_rescale=0.7, **SIZE))
    (alone,) = ours(PROMPT, steps=6, seed=3, guidance=1.0, **SIZE)
    assert_same(alone, drawn(expected, guidance_scale=1.0, negative_prompt=None, **SIZE))
    assert np.abs(np.asarray(alone, int) - np.asarray(rescaled, int)).max() > 10


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["pndm", "heun", "euler-a"])
def test_an_image_is_drawn_anew(ours, expected, image, sampler):
    pipeline = _quiet(diffusers.StableDiffusionImg2ImgPipeline(**expected.components))
    (picture,) = ours(PROMPT, image=image, strength=0.6, sampler=sampler, **OURS)
    assert_same(picture, drawn(pipeline, SAMPLERS[sampler], image=image, strength=0.6))


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_any_unet_inpaints(ours, expected, image, mask, sampler, strength, monkeypatch):
    """By PNDM where the file says that it starts with Runge-Kutta: it does not where it paints."""
    said = replace(ours.config.scheduler, skip_prk_steps=False)
    monkeypatch.setattr(ours, "config", replace(ours.config, scheduler=said))
    pipeline = _quiet(diffusers.StableDiffusionInpaintPipeline(**expected.components))
    choices = {"image": image, "strength": strength}
    (picture,) = ours(PROMPT, mask=mask, sampler=sampler, **choices, **OURS)
    theirs = drawn(pipeline, SAMPLERS[sampler], mask_image=mask, **choices, **SIZE)
    assert_same(picture, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_models_see_the_mask(inpainting, image, mask, strength):
    """A second UNet, which predicts v; OpenCLIP's text encoder and padding."""
    folder, ours = inpainting
    pipeline = _quiet(diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder))
    choices = {"image": image, "strength": strength}
    (picture,) = ours(PROMPT, mask=mask, **choices, **OURS)
    assert_same(picture, drawn(pipeline, mask_image=mask, **choices, **SIZE))

    states: dict[int, np.ndarray] = {}
    chosen = {"mask": mask, "noise_mask": True, **choices, **OURS}
    (kept,) = ours(PROMPT, **chosen, on_step=states.__setitem__)
    mean, _ = ours.encode_posterior(pixels(image, *image.size))
    latents, own = states[max(states)], np.asarray(normalize_latents(mean, ours.config.vae))
    np.testing.assert_array_equal(latents[..., :4], own[..., :4])  # the next is half black
    assert np.abs(latents - own)[..., 4:].mean(axis=(0, 1, 2)).min() > 0.1
    assert np.abs(np.asarray(kept, int) - np.asarray(picture, int)).mean() > 1
    task = ours.family.find_task(ours.config, {"image", "mask"})
    assert task.with_noise_mask().drawn(strength) == task.drawn(strength), "of the same noise"


@pytest.mark.slow
def test_a_mesh_draws_the_same_pictures(folder, ours):
    """Three of them, which are filled up to as many as there are devices."""
    pipe, asked = (
        fluxjax.load_pipeline(folder, mesh="data=2,fsdp=4"),
        OURS | SIZE | {"seed": [3, 4, 5]},
    )
    for picture, one in zip(
        pipe([PROMPT, "a heart", ""], **asked), ours([PROMPT, "a heart", ""], **asked), strict=True
    ):
        assert_same(picture, one)
    kernel = pipe.params("unet")["conv_in"]["kernel"]
    widest = pipe.params("unet")["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert widest.addressable_shards[0].data.size < widest.size and kernel.size
    with pytest.raises(ConfigError, match="the tokens of a UNet are not split"):
        fluxjax.load_pipeline(folder, mesh="sequence=2")


def test_last_layers_of_clip_are_left_out(ours, expected):
    """By hand: transformers no longer has what diffusers asks for here."""
    ids = expected.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    clip = expected.text_encoder
    with torch.no_grad():
        states = clip(ids, output_hidden_states=True).hidden_states[-2]
        embedded = clip.final_layer_norm(states)
        negative, _ = expected.encode_prompt("blue", "cpu", 1, False)
    choices = {"prompt": None, "negative_prompt": None, "negative_prompt_embeds": negative}
    (picture,) = ours(PROMPT, clip_skip=1, **OURS, **SIZE)
    assert_same(picture, drawn(expected, prompt_embeds=embedded, **choices, **SIZE))


@pytest.mark.slow
def test_samplers_and_their_levels_through_the_command(
    folder, ours, expected, tmp_path, monkeypatch
):
    """By one program: Heun runs the UNet twice a step, and so takes fewer steps of the same bucket.
    The folder's DDPM and DDIM clamp, as diffusers has it where a file does not say."""
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    monkeypatch.setattr("fluxjax.sample.loading.load_pipeline", lambda model, **choices: ours)
    asked = ["--model", str(folder), "--seed", "3", "--guidance", "4", "--negative-prompt", "blue"]
    asked += ["--width", "40", "--height", "56", "--no-record"]

    def draw(text: str, out: Path, steps: int) -> None:
        options = [*asked, "--out", str(out), "--steps", str(steps), *text.split()]
        assert main([PROMPT, *options]) == 0

    draw("", tmp_path / "first.png", 6)
    with compilations() as seen:
        for text, values in COMMANDS.items():
            out, (kind, own) = tmp_path / f"{text}.png", SAMPLERS[text.split()[0]]
            steps = 4 if text.startswith("heun") else 6
            draw(f"--sampler {text}", out, steps)
            theirs = drawn(expected, (kind, own | values), num_inference_steps=steps, **SIZE)
            assert_same(Image.open(out), theirs)
        for text, steps in (("--sampler ddim --eta 0.5", 5), ("--guidance 6 --seed 4", 7)):
            draw(text, tmp_path / "other.png", steps)
    assert not seen


@pytest.mark.slow
def test_the_command_draws_with_a_lora_of_kohya(folder, ours, tmp_path, monkeypatch):
    """Convolutions, linear layers and the text encoder, by diffusers with what they add."""
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    torch.manual_seed(1)
    theirs = _quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    parts, file = (("lora_unet", theirs.unet), ("lora_te", theirs.text_encoder)), {}
    for prefix, network in parts:
        weights = dict(network.named_parameters())
        for module in ADAPTED[prefix]:
            name = next(n for n in weights if n.endswith(f"{module}.weight"))
            named = module if prefix == "lora_unet" else f"text_model.{module}"
            added, deltas = kohya(prefix, {named: weights[name].detach()}, 1.0)
            file |= added
            with torch.no_grad():
                weights[name].add_(0.7 * deltas[f"{named}.weight"])
    save_file(file, tmp_path / "kohya.safetensors")
    options = ["--model", str(folder), "--lora", f"{tmp_path / 'kohya.safetensors'}:0.7"]
    options += ["--seed", "3", "--steps", "6", "--guidance", "4", "--negative-prompt", "blue"]
    options += ["--width", "40", "--height", "56", "--out", str(tmp_path / "a.png")]
    assert main([PROMPT, *options]) == 0
    picture = Image.open(tmp_path / "a.png")
    assert_same(picture, drawn(theirs, **SIZE))
    (without,) = ours(PROMPT, **OURS, **SIZE)
    assert np.abs(np.asarray(picture, int) - np.asarray(without, int)).max() > 10
    assert 'Lora hashes: "kohya: ' in picture.info["parameters"]


@pytest.mark.slow
def test_the_command_repeats_a_picture(folder, ours, tmp_path, monkeypatch):
    """Options of these families, and a record that has all of them."""
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    monkeypatch.setattr("fluxjax.sample.loading.load_pipeline", lambda model, **choices: ours)
    first, again = (tmp_path / name for name in ("0.png", "1.png"))
    choices = {"sampler": "ddim", "spacing": "trailing", "eta": "0.5", "guidance": "4"}
    choices |= {"guidance-rescale": "0.2", "clip-skip": "1", "steps": "6", "width": "40"}
    options = [text for name, value in choices.items() for text in (f"--{name}", value)]
    assert main(["a star", "--model", str(folder), "--out", str(first), *options]) == 0
    assert main(["--like", str(first), "--out", str(again)]) == 0
    pictures = [Image.open(path) for path in (first, again)]
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(pictures[1]))
    words = "Steps: 6, Sampler: DDIM, Schedule type: Automatic, CFG scale: 4, Seed: "
    assert words in pictures[0].info["parameters"]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("stable-diffusion-v1-5", SD15),
        ("stable-diffusion-2-1", SD21),
        ("stable-diffusion-xl-base-1.0", SDXL),
    ],
)
def test_presets_are_the_published_folders(shared, name, config):
    assert read_config(shared / "checkpoints" / name) == config
    config.require_whole(name, text_alone=True)


@pytest.mark.parametrize(
    ("name", "config", "changed"),
    [
        ("stable-diffusion-inpainting", SD15, {"in_channels": 9}),
        ("stable-diffusion-2-inpainting", SD21, {"in_channels": 9, "sample_size": 64}),
        ("stable-diffusion-xl-refiner-1.0", SDXL_REFINER, {}),
    ],
)
def test_other_published_folders_are_whole_models(shared, name, config, changed):
    found = read_config(shared / "checkpoints" / name)
    assert found.unet == replace(config.unet, **changed) and found.vae == config.vae
    text = [found.networks[name] for name in found.text_encoders]
    assert text == [config.networks[name] for name in config.text_encoders]
    assert found.inpaints == bool(changed)
    found.require_whole(name)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("sampler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_old_scheduler_files_are_corrected_as_diffusers_does(sampler):
    """Which says nothing of it where it opens a folder."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "feature_extractor"))
    parts |= {"safety_checker": None, "requires_safety_checker": False}
    inpainting = replace(SD15, unet=replace(SD15.unet, in_channels=9))
    kinds = {SD15: "StableDiffusionPipeline", inpainting: "StableDiffusionInpaintPipeline"}
    for config, kind in kinds.items():
        scheduler = getattr(diffusers, sampler)()
        theirs = getattr(diffusers, kind)(**parts, scheduler=scheduler).scheduler.config
        file = SamplerConfig(sampler=sampler)
        ours = config.published({**config.networks, "scheduler": file}, "").scheduler
        for name in ("steps_offset", "clip_sample", "skip_prk_steps"):
            assert ours.given(name) == theirs.get(name), name
    assert SDXL.published({**SDXL.networks, "scheduler": file}, "").scheduler == file


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pndm_paints_without_runge_kutta_as_in_diffusers():
    """Whatever the file says, by a UNet that has learnt it and by any other; XL's has its way."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "feature_extractor"))
    parts |= {"safety_checker": None, "requires_safety_checker": False}
    said = {**NOISE, "skip_prk_steps": False}
    del said["clip_sample"]
    kind: Any = diffusers.StableDiffusionInpaintPipeline
    theirs = kind(**parts, scheduler=diffusers.PNDMScheduler(**said)).scheduler
    theirs.set_timesteps(7)
    ddim = SamplerConfig(sampler="DDIMScheduler", **said)
    painting = Settings(steps=7).course(first_step, paints=True)._replace(sampler="pndm")
    inpainting = replace(SD15.unet, in_channels=9)
    for config in (replace(SD15, scheduler=ddim), replace(SD15, unet=inpainting, scheduler=ddim)):
        times = STABLE_DIFFUSION.run(config, painting, 8, 8).schedule.times
        assert times.tolist() == theirs.timesteps.tolist()
        file = Settings(steps=7, mask="mask.png", sampler="pndm").course(first_step)
        assert STABLE_DIFFUSION.run(config, file, 8, 8).schedule.times.tolist() == times.tolist()
        whole = painting._replace(paints=False)
        assert len(STABLE_DIFFUSION.run(config, whole, 8, 8).schedule.times) == 7 + 9
    xl = replace(SDXL, scheduler=ddim)
    assert len(STABLE_DIFFUSION.run(xl, painting, 8, 8).schedule.times) == 7 + 9


def test_a_folder_comes_back_from_orbax(folder, tmp_path):
    for source, place, form in ((folder, "orbax", "orbax"), (tmp_path / "orbax", "back", None)):
        run(plan(source, tmp_path / place, form))
    for file in folder.rglob("*"):
        back = tmp_path / "back" / file.relative_to(folder)
        assert file.is_dir() or file.read_bytes() == back.read_bytes(), file
    with pytest.raises(ConfigError, match=r"the UNet of .* has no file of its own beside others"):
        plan(folder, tmp_path / "original", "bfl")


def test_mistakes_are_one_sentence(ours):
    for choices, words in (
        ({"true_cfg": 2.0}, "guidance is this one's scale"),
        ({"true_cfg": 0.5}, "guidance is this one's scale"),
        ({"guidance": 1.0, "guidance_rescale": 0.5}, "guidance_rescale is of .* which is off"),
        ({"negative_aesthetic_score": 1.0}, "negative_aesthetic_score is told to .* refiner alone"),
        ({"size_bins": False}, "size_bins are PixArt's"),
        ({"negative_prompt": "blue", "guidance": 1.0}, "negative_prompt needs guidance above 1"),
        ({"width": 42}, "width must be a multiple of 4"),
        ({"prompt_2": "x"}, "prompt_2 is for a second text encoder"),
        ({"eta": 0.5}, "eta is how much noise DDIM adds, and this is PNDMScheduler"),
        ({"max_sequence_length": 99}, "77"),
        ({"clip_skip": 3}, "clip_skip"),
    ):
        with pytest.raises(ConfigError, match=words):
            ours("a star", steps=2, **choices)


@pytest.mark.slow
def test_one_file_draws_what_its_folder_draws(folder, ours, tmp_path):
    """In its original code's names, with the tokenizer of a folder."""
    file = tmp_path / "whole.safetensors"
    run(plan(folder, file, "bfl"))
    whole = fluxjax.load_pipeline(file, text_encoders=folder)
    pictures = [np.asarray(pipe(PROMPT, **OURS, **SIZE)[0]) for pipe in (whole, ours)]
    assert np.array_equal(*pictures)
