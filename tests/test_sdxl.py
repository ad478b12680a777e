"""Stable Diffusion XL, its refiner, and both in one run: the pictures of diffusers."""

from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from stable_diffusion_folders import save_stable_diffusion, save_xl

import fluxjax
from fluxjax.config import DEV, SD15, SDXL, SDXL_REFINER, ConfigError
from fluxjax.convert.convert import plan, run
from fluxjax.families import STABLE_DIFFUSION_XL, Told
from fluxjax.sample.__main__ import main
from fluxjax.sample.memory_estimate import weight_bytes

PROMPT = "a red circle above a star!"  # "!" is what the second text encoder is padded with
OURS = {"steps": 4, "seed": 3, "guidance": 4.0}
THEIRS = {"num_inference_steps": 4, "guidance_scale": 4.0}
SIZE = {"width": 40, "height": 56}
SAMPLERS = {"euler-a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler"}
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def opened(shared, place, kind, **choices):
    folder = save_xl(place / "xl", shared / "tokenizers", **choices)
    theirs = kind.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return fluxjax.load_pipeline(folder), theirs


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory):
    return opened(shared, tmp_path_factory.mktemp("base"), diffusers.StableDiffusionXLPipeline)


@pytest.fixture(scope="module")
def refiner(shared, tmp_path_factory):
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    return opened(shared, tmp_path_factory.mktemp("refiner"), kind, refiner=True)


@pytest.fixture(scope="module")
def both(base, refiner):
    (first, _), (second, _) = base, refiner
    return fluxjax.load_pipeline(first.sources.model, refiner=second.sources.model)


@pytest.fixture(scope="module")
def image():
    colours = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    return Image.fromarray(colours).resize((40, 56), Image.Resampling.BICUBIC)


def assert_same(picture, pipeline, **choices):
    generator = torch.Generator().manual_seed(3)
    assert_equal([picture], pipeline(PROMPT, generator=generator, **THEIRS | choices).images)


def assert_equal(pictures, expected):
    for picture, other in zip(pictures, expected, strict=True):
        a, b = (np.asarray(one, int) for one in (picture, other))
        assert a.shape == b.shape and a.std() > 20
        assert (np.abs(a - b) <= 1).mean() >= 0.999


@slow
def test_no_negative_prompt_is_silence(base):
    ours, theirs = base
    (silent,) = ours(PROMPT, **OURS, **SIZE)
    assert_same(silent, theirs, **SIZE)
    (empty,) = ours(PROMPT, negative_prompt="", **OURS, **SIZE)
    assert np.abs(np.asarray(silent, int) - np.asarray(empty, int)).max() > 10


@slow
def test_sizes_are_told_and_the_second_prompt_is_read(base):
    ours, theirs = base
    choices = {"prompt_2": "a heart", "negative_prompt": "blue"}
    told = {"original_size": (90, 100), "crop": (7, 3), "target_size": (60, 64)}
    (picture,) = ours(PROMPT, clip_skip=1, **choices, **told, **OURS, **SIZE)
    swapped = {"original_size": (100, 90), "crops_coords_top_left": (3, 7), "target_size": (64, 60)}
    assert_same(picture, theirs, clip_skip=1, **choices, **swapped, **SIZE)
    other = {"original_size": (30, 20), "crop": (1, 9), "target_size": (50, 40)}
    other = told | {f"negative_{name}": pair for name, pair in other.items()}
    (picture,) = ours(PROMPT, **choices, **other, **OURS, **SIZE)
    swapped |= {"negative_original_size": (20, 30), "negative_crops_coords_top_left": (9, 1)}
    assert_same(picture, theirs, **choices, **swapped, negative_target_size=(40, 50), **SIZE)
    # Beside negative sizes the negative crop is nowhere, and not the prompt's.
    two = {f"negative_{name}": (30, 20) for name in ("original_size", "target_size")}
    (picture,) = ours(PROMPT, crop=(7, 3), **two, **OURS, **SIZE)
    two = {name: pair[::-1] for name, pair in two.items()}
    assert_same(picture, theirs, crops_coords_top_left=(3, 7), **two, **SIZE)
    with pytest.raises(ConfigError, match="crop must be two numbers of pixels"):
        ours(PROMPT, crop=(-1, 2), **OURS)
    with pytest.raises(ConfigError, match="size is of classifier-free guidance, which is off"):
        ours(PROMPT, **two, **{**OURS, "guidance": 1.0})
    with pytest.raises(ConfigError, match="original_size is told to Stable Diffusion XL alone"):
        fluxjax.load_pipeline("tiny")("a star", original_size=(64, 64))


@slow
def test_the_refiner_hears_how_beautiful_it_is(refiner, image):
    """One text encoder, in the second's folder. The prompt's crop is not the negative one's."""
    ours, theirs = refiner
    scores = {"aesthetic_score": 8.0, "negative_aesthetic_score": 1.0, "negative_prompt": "blue"}
    (picture,) = ours(PROMPT, image=image, strength=0.6, crop=(90, 50), **scores, **OURS)
    scores["crops_coords_top_left"] = (50, 90)
    assert_same(picture, theirs, image=image, strength=0.6, **scores)
    with pytest.raises(ConfigError, match="target_size is told to XL's base model"):
        ours(PROMPT, image=image, target_size=(9, 9), **OURS)


NEGATIVE = {"negative_original_size": (5, 6), "negative_target_size": (7, 8)}
CROP = {"negative_crop": (9, 4)}


@pytest.mark.parametrize(
    ("config", "changed", "given", "expected"),
    [
        (SDXL, False, {}, [20, 10, 2, 1, 40, 30]),
        (SDXL, False, NEGATIVE, [6, 5, 0, 0, 8, 7]),
        (SDXL, False, NEGATIVE | CROP, [6, 5, 4, 9, 8, 7]),
        (SDXL, True, {"negative_original_size": (5, 6)}, [6, 5, 2, 1, 40, 30]),
        (SDXL, True, NEGATIVE, [6, 5, 2, 1, 8, 7]),
        (SDXL_REFINER, True, {}, [20, 10, 0, 0, 2.5]),
        (SDXL_REFINER, True, CROP, [20, 10, 4, 9, 2.5]),
        (SDXL, False, CROP, "negative_crop only beside them"),
        (SDXL, False, {"negative_target_size": (7, 8)}, "are told together"),
        (SDXL, True, NEGATIVE | CROP, "negative_crop is not heard where an image is drawn anew"),
    ],
)
def test_negative_sizes_are_heard_as_in_diffusers(config, changed, given, expected):
    """Each of its three pipelines has another way with what is left out. What it takes and does
    not hear is refused."""
    positive = {"original_size": (10, 20), "crop": (1, 2)}
    if config is SDXL:
        positive["target_size"] = (30, 40)
    told = Told((64, 64), **positive, aesthetic_score=2.5, negative=True, changed=changed, **given)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            STABLE_DIFFUSION_XL.sizes(config, told)
    else:
        assert STABLE_DIFFUSION_XL.sizes(config, told).tolist() == expected


@slow
@pytest.mark.parametrize("own", [True, False])
def test_inpainting(shared, tmp_path, base, image, own):
    """By a model of its own, whose guidance is 7.5 unless asked otherwise, and by any other."""
    kind, asked = diffusers.StableDiffusionXLInpaintPipeline, {"steps": 4, "seed": 3}
    if own:
        ours, theirs = opened(shared, tmp_path, kind, inpainting=True)
    else:
        ours, theirs, asked = base[0], kind(**base[1].components), {**asked, "guidance": 7.5}
    theirs.set_progress_bar_config(disable=True)
    mask = Image.fromarray((np.indices((56, 40))[1] > 17).astype(np.uint8) * 255)
    (picture,) = ours(PROMPT, image=image, mask=mask, **asked)
    generator, size = torch.Generator().manual_seed(3), {"num_inference_steps": 4, **SIZE}
    expected = theirs(PROMPT, image=image, mask_image=mask, generator=generator, **size)
    assert_equal([picture], expected.images)


def drawn_by_two(base, refiner, start, sampler=None, **choices):
    """By diffusers' two pipelines, one after the other, with one generator."""
    generator, own = torch.Generator().manual_seed(3), [one.scheduler for one in (base, refiner)]
    first = {"denoising_end": start, "output_type": "latent"}
    try:
        for pipeline in (base, refiner) if sampler else ():
            kind = getattr(diffusers, SAMPLERS[sampler])
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        latents = base(PROMPT, generator=generator, **first, **THEIRS | choices).images
        for name in ("width", "height", "image", "strength", "prompt_2"):
            choices.pop(name, None)
        second = {"denoising_start": start, "image": latents}
        return refiner(PROMPT, generator=generator, **second, **THEIRS | choices).images
    finally:
        base.scheduler, refiner.scheduler = own


@slow
@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
def test_base_and_refiner_in_one_run(base, refiner, both, sampler):
    """The noise of the refiner's steps comes after that of the base model's; of Heun's steps one is
    cut in two, as diffusers cuts it."""
    theirs = base[1], refiner[1]
    pictures = both(PROMPT, refiner_start=0.5, sampler=sampler, **OURS, **SIZE)
    assert_equal(pictures, drawn_by_two(*theirs, 0.5, sampler, **SIZE))
    (alone,) = base[0](PROMPT, sampler=sampler, **OURS, **SIZE)
    assert np.abs(np.asarray(alone, int) - np.asarray(pictures[0], int)).max() > 10


@slow
def test_a_refiner_hears_what_the_base_model_hears(base, refiner, both, image):
    """But for the second prompt; steps are counted over both, and an image is the base model's."""
    theirs, seen = (base[1], refiner[1]), []
    said = {"negative_prompt": "blue", "aesthetic_score": 9.0, "original_size": (70, 80)}
    pictures = both(
        PROMPT,
        prompt_2="a heart",
        number=2,
        on_step=lambda step, latents: seen.append((step, latents.shape)),
        **said,
        **OURS,
        **SIZE,
    )
    assert seen == [(step, (2, 4, 14, 10)) for step in (1, 2, 3, 4)]
    said |= {"original_size": (80, 70)}
    score = said.pop("aesthetic_score")
    refine = theirs[1].__call__

    class Scored:
        """The base pipeline of diffusers takes no score."""

        scheduler = theirs[1].scheduler

        def __call__(self, *args, **choices):
            return refine(*args, aesthetic_score=score, **choices)

    two = {"prompt_2": "a heart", "num_images_per_prompt": 2}
    assert_equal(pictures, drawn_by_two(theirs[0], Scored(), 0.8, **two, **said, **SIZE))
    (changed,) = both(PROMPT, image=image, strength=0.8, refiner_start=0.5, **OURS)
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    starts = kind(**theirs[0].components)
    starts.set_progress_bar_config(disable=True)
    expected = drawn_by_two(starts, theirs[1], 0.5, image=image, strength=0.8)
    assert_equal([changed], expected)


@slow
def test_the_command_draws_with_a_refiner_and_repeats_it(both, tmp_path, monkeypatch, capsys):
    asked = []

    def load(model, **choices):
        asked.append(choices["refiner"])
        return both

    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    monkeypatch.setattr("fluxjax.sample.loading.load_pipeline", load)
    folders = [both.sources.model, both.sources.refiner]
    options = [f"--model={folders[0]}", f"--refiner={folders[1]}", "--refiner-start=0.5"]
    options += ["--steps=4", "--seed=3", "--guidance=4", "--width=40", "--height=56"]
    assert main([PROMPT, *options, "-n", "2", "--out", str(tmp_path / "two")]) == 0
    first, second = sorted((tmp_path / "two").iterdir())
    assert second.name.endswith("-4.png")
    again = tmp_path / "again.png"
    assert main(["--like", str(first), "--out", str(again)]) == 0
    (expected,) = both(PROMPT, refiner_start=0.5, **OURS, **SIZE)
    for path in (first, again):
        with Image.open(path) as picture:
            assert "Refiner: xl, Refiner switch at: 0.5" in picture.info["parameters"]
            assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert asked == [folders[1]] * 2
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a star", "refiner_start": 0.1}')
    with pytest.raises(ConfigError, match=r"line 1: a refiner that starts at 0.1 of 4 steps"):
        main(["--prompts", str(lines), *options[:2], *options[3:]])


@slow
@pytest.mark.parametrize(
    ("option", "within", "share"),
    [("--mesh=data=2,fsdp=4", 1, 0.999), ("--quantise=int8", 13, 0.97)],
)
def test_both_on_a_mesh_and_in_codes(both, tmp_path, monkeypatch, option, within, share):
    """The refiner from a single file in its original names, whose tokenizer is the base model's."""
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    loaded, load = [], fluxjax.load_pipeline
    monkeypatch.setattr(
        "fluxjax.sample.loading.load_pipeline",
        lambda *given, **choices: loaded.append(load(*given, **choices)) or loaded[-1],
    )
    file = tmp_path / "refiner.safetensors"
    run(plan(Path(both.sources.refiner), file, "bfl"))
    asked = [f"--model={both.sources.model}", f"--refiner={file}", "--refiner-start=0.5", option]
    asked += ["--steps=4", "--seed=3", "--guidance=4", "--width=40", "--height=56"]
    assert main([PROMPT, *asked, "-n", "2", "--out", str(tmp_path / "two")]) == 0
    expected = [both(PROMPT, refiner_start=0.5, **OURS | SIZE | {"seed": i})[0] for i in (3, 4)]
    for path, picture in zip(sorted((tmp_path / "two").iterdir()), expected, strict=True):
        apart = np.abs(np.asarray(Image.open(path), int) - np.asarray(picture, int))
        assert (apart <= within).mean() >= share
    refiner, base = loaded
    for pipe in (base, refiner):
        kernel = pipe.params("unet")["mid_block"]["resnets_0"]["conv1"]["kernel"]
        split = 4 * kernel.addressable_shards[0].data.size == kernel.size
        assert split == (within == 1)
        assert ("unet" in pipe.executables.quantised) == (within > 1)


@slow
def test_offload_has_one_of_both_on_the_device(both):
    names = {"model": both.sources.model, "refiner": both.sources.refiner}
    apart = fluxjax.load_pipeline(**names, offload=True)
    assert weight_bytes(apart) < 0.8 * weight_bytes(fluxjax.load_pipeline(**names))
    pictures = [pipe(PROMPT, **OURS, **SIZE)[0] for pipe in (apart, both)]
    assert np.array_equal(*map(np.asarray, pictures))
    assert not any(map(apart.is_loaded, apart.config.components))
    refiner = apart.refiner.pipe
    assert not any(map(refiner.is_loaded, refiner.config.components))


def test_wrong_pairs_are_one_sentence():
    SDXL.require_refiner(SDXL_REFINER, "refiner")
    SDXL.require_refiner(SDXL, "refiner")
    scaled = replace(SDXL_REFINER, vae=replace(SDXL.vae, scaling_factor=0.5))
    masks = replace(SDXL, unet=replace(SDXL.unet, in_channels=9))
    for first, second, words in (
        (DEV, SDXL_REFINER, "a refiner goes on with what Stable Diffusion XL draws, and FluxPipe"),
        (SD15, SDXL_REFINER, "a refiner goes on with what Stable Diffusion XL draws, and StableDi"),
        (SDXL, SD15, "a refiner of Stable Diffusion XL is one itself, not StableDiffusionPipeline"),
        (SDXL, masks, "its refiner paints masks anew"),
        (masks, SDXL_REFINER, "the base model paints masks anew"),
        (SDXL, scaled, "its autoencoder's scaling_factor is 0.5, and the base model's 0.13025"),
    ):
        with pytest.raises(ConfigError, match=f"refiner: .*{words}"):
            first.require_refiner(second, "refiner")


@slow
def test_mistakes_about_refiners_are_one_sentence(shared, both, base, image, tmp_path):
    for pipe, choices, words in (
        (base[0], {"refiner_start": 0.5}, "refiner_start says where a refiner takes over: give"),
        (both, {"refiner_start": 1.0}, "refiner_start must be above 0 and below 1, got 1.0"),
        (both, {"refiner_start": 0.1}, "a refiner that starts at 0.1 of 4 steps leaves the base"),
        (both, {"image": image, "mask": image}, "from an image, not a mask"),
        (both, {"denoising_start": 0.5}, "denoising_start is called refiner_start here"),
    ):
        with pytest.raises(ConfigError, match=words):
            pipe(PROMPT, **choices, **OURS)
    small = save_stable_diffusion(tmp_path / "small", shared / "tokenizers")
    with pytest.raises(ConfigError, match="small: a refiner of Stable Diffusion XL is one itself"):
        fluxjax.load_pipeline(both.sources.model, refiner=small)
