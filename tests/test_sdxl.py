"""Stable Diffusion XL and its refiner: the pictures of diffusers."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from stable_diffusion_folders import save_xl

import fluxjax
from fluxjax.config import ConfigError

PROMPT = "a red circle above a star!"  # "!" is what the second text encoder is padded with
OURS = {"steps": 4, "seed": 3, "guidance": 4.0}
THEIRS = {"num_inference_steps": 4, "guidance_scale": 4.0}
SIZE = {"width": 40, "height": 56}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def opened(shared, place, kind, **choices):
    folder = save_xl(place / "xl", shared / "tokenizers", **choices)
    theirs = kind.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return fluxjax.load_pipeline(folder), theirs


@pytest.fixture(scope="module")
def base(shared, tmp_path_factory):
    return opened(shared, tmp_path_factory.mktemp("base"), diffusers.StableDiffusionXLPipeline)


def assert_same(picture, pipeline, **choices):
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(PROMPT, generator=generator, **THEIRS | choices).images[0]
    a, b = (np.asarray(one, int) for one in (picture, expected))
    assert a.shape == b.shape and a.std() > 20
    assert (np.abs(a - b) <= 1).mean() >= 0.999


def test_no_negative_prompt_is_silence(base):
    ours, theirs = base
    (silent,) = ours(PROMPT, **OURS, **SIZE)
    assert_same(silent, theirs, **SIZE)
    (empty,) = ours(PROMPT, negative_prompt="", **OURS, **SIZE)
    assert np.abs(np.asarray(silent, int) - np.asarray(empty, int)).max() > 10


def test_sizes_are_told_and_the_second_prompt_is_read(base):
    ours, theirs = base
    choices = {"prompt_2": "a heart", "negative_prompt": "blue"}
    told = {"original_size": (90, 100), "crop": (7, 3), "target_size": (60, 64)}
    (picture,) = ours(PROMPT, clip_skip=1, **choices, **told, **OURS, **SIZE)
    swapped = {"original_size": (100, 90), "crops_coords_top_left": (3, 7), "target_size": (64, 60)}
    swapped |= {f"negative_{name}": pair for name, pair in swapped.items()}
    assert_same(picture, theirs, clip_skip=1, **choices, **swapped, **SIZE)
    with pytest.raises(ConfigError, match="crop must be two numbers of pixels"):
        ours(PROMPT, crop=(-1, 2), **OURS)
    with pytest.raises(ConfigError, match="original_size is told to Stable Diffusion XL alone"):
        fluxjax.load_pipeline("tiny")("a star", original_size=(64, 64))


def test_the_refiner_hears_how_beautiful_it_is(shared, tmp_path):
    """One text encoder, in the second's folder."""
    kind = diffusers.StableDiffusionXLImg2ImgPipeline
    ours, theirs = opened(shared, tmp_path, kind, refiner=True)
    colours = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    image = Image.fromarray(colours).resize((40, 56), Image.Resampling.BICUBIC)
    scores = {"aesthetic_score": 8.0, "negative_aesthetic_score": 1.0, "negative_prompt": "blue"}
    (picture,) = ours(PROMPT, image=image, strength=0.6, **scores, **OURS)
    assert_same(picture, theirs, image=image, strength=0.6, **scores)
