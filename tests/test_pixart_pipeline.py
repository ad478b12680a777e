"""PixArt-alpha and PixArt-Sigma: the pictures of diffusers."""

import sys
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
from stable_diffusion_folders import save_pixart

import fluxjax
from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.config import PRESETS, ConfigError, PixArtAlphaPipelineConfig, PixArtConfig
from fluxjax.sample.pictures import in_size

PROMPT = "A red Circle above a star "
OURS: dict[str, Any] = {"steps": 5, "seed": 3, "guidance": 3.0, "max_sequence_length": 24}
THEIRS = {"num_inference_steps": 5, "guidance_scale": 3.0, "max_sequence_length": 24}
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def opened(shared, place, **choices) -> tuple[Any, Any]:
    folder = save_pixart(place / "pixart", shared / "tokenizers", **choices)
    kind = diffusers.PixArtSigmaPipeline if choices else diffusers.PixArtAlphaPipeline
    theirs = kind.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return fluxjax.load_pipeline(folder), theirs


def assert_same(pictures, theirs, prompt: Any = PROMPT, **choices):
    generator = torch.Generator().manual_seed(3)
    choices = {"clean_caption": False, **THEIRS, **choices}
    expected = theirs(prompt, generator=generator, **choices).images
    for picture, other in zip(pictures, expected, strict=True):
        a, b = (np.asarray(one, int) for one in (picture, other))
        assert a.shape == b.shape and a.std() > 20
        assert (np.abs(a - b) <= 1).mean() >= 0.999


@slow
def test_alpha_is_told_its_size(shared, tmp_path):
    ours, theirs = opened(shared, tmp_path)
    size = {"width": 40, "height": 56}  # tokens of 5 x 7
    both = [PROMPT, "a heart"]
    pictures = ours(both, negative_prompt="Fog", size_bins=False, **OURS, **size)
    choices = {"use_resolution_binning": False, "negative_prompt": "Fog", **size}
    assert_same(pictures, theirs, both, **choices)
    (plain,) = ours(PROMPT, size_bins=False, **{**OURS, "guidance": 1.0}, **size)
    alone = {"guidance_scale": 1.0, "use_resolution_binning": False, **size}
    assert_same([plain], theirs, **alone)
    for mesh in ("sequence=4,data=2",):
        there = fluxjax.load_pipeline(tmp_path / "pixart", mesh=mesh)
        for one, many in zip(
            pictures,
            there(both, negative_prompt="Fog", size_bins=False, **OURS, **size),
            strict=True,
        ):
            assert (np.abs(np.asarray(one, int) - np.asarray(many, int)) <= 1).mean() >= 0.999
    prompt, negative = "<b>A Star</b> by @me, 640x480", "fog #12 (free shipping)"
    cleaned = {"negative_prompt": negative, "clean_caption": True}
    (picture,) = ours(prompt, size_bins=False, **cleaned, **OURS, **size)
    assert_same([picture], theirs, prompt, **choices | cleaned)
    assert np.abs(np.asarray(picture, int) - np.asarray(pictures[0], int)).max() > 10


_PIECES = (
    *("A Cat", "naïve", "<b>bold</b>", "<person>", "@some_one", "http://a.b/c?d", "www:x"),
    *("shop.example.com/x_y/", "me@site.org", "IMG_0042.jpg", "photo.PNG", "10.0.0.255", "5:42 "),
    *("#12", "#1234", "#123456", "1234567", "jc6640", "jc6640vc", "6640vc231", "j2d1a2a", "a\\nb"),
    *("640x480", "12.5 × 3", "“quoted”", "‘one’", "''", '"""', "...", " . ", "a,b", "x/y", "***"),
    *(
        "&quot;",
        "&amp;amp;",
        "&lt;p&gt;",
        "&#65;",
        "漢字",
        "㊗",
        "—",
        "‑",
        "free shipping",
        "download",
    ),
    *("worldwide free shipping", "click on me", "click for more", "png image", "page 12", "a : b"),
    *(
        "this-is-my-cute_cat",
        "+",
        "-",
        "_",
        ":",
        ",",
        ".hidden",
        "(c) ®",
        "sch\u00c3\u00b6n",
        "%20",
    ),
    *("½", "~", "\n", "\t", "5kg", "x", "٣", "İ", "'", '"'),
)


def test_captions_are_cleaned_as_diffusers_does():
    """What random pieces are put together, and each of them alone."""
    from fluxjax.text.clean_caption import clean_caption

    random = np.random.default_rng(0)
    lists = [random.choice(_PIECES, random.integers(2, 9)) for _ in range(150)]
    captions = [*_PIECES, *(random.choice(["", " "]).join(one) for one in lists), "", " "]
    theirs = SimpleNamespace(bad_punct_regex=diffusers.PixArtAlphaPipeline.bad_punct_regex)
    clean = partial(diffusers.PixArtAlphaPipeline._clean_caption, theirs)
    with warnings.catch_warnings(action="ignore"):
        expected = [clean(clean(caption)) for caption in captions]
    assert [clean_caption(caption) for caption in captions] == expected
    assert sum(a != b.lower().strip() for a, b in zip(expected, captions, strict=True)) > 150


def test_cleaning_is_for_pixart_and_says_what_it_needs(monkeypatch):
    from fluxjax.text.clean_caption import clean_caption

    with pytest.raises(ConfigError, match="clean_caption is for PixArt"):
        fluxjax.load_pipeline("tiny")("a star", clean_caption=True)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(
        ConfigError, match="clean_caption needs ftfy: pip install beautifulsoup4 ft"
    ):
        clean_caption("a star")


@slow
def test_sigma_draws_in_a_size_of_its_training(shared, tmp_path):
    """By the folder's DPM++ and another sampler."""
    ours, theirs = opened(shared, tmp_path, sigma=True)
    size = {"width": 100, "height": 71}
    (picture,) = ours(PROMPT, **OURS, **size)
    assert_same([picture], theirs, **size)
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    assert_same(ours(PROMPT, sampler="euler", **OURS, **size), theirs, **size)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("PixArt-XL-2-1024-MS", "pixart-alpha"),
        ("PixArt-Sigma-XL-2-1024-MS", "pixart-sigma"),
    ],
)
def test_presets_are_the_published_folders(shared, name, preset):
    found = read_config(shared / "checkpoints" / name)
    assert found.networks["transformer"] == PRESETS[preset].networks["transformer"]
    assert found.scheduler == PRESETS[preset].scheduler and found.vae == PRESETS[preset].vae
    found.require_whole(name, text_alone=True)


def test_sizes_of_training_are_the_published_tables():
    tables = {
        32: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN,
        64: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        128: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN,
        256: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
    }
    for sample_size, table in tables.items():
        config = PixArtAlphaPipelineConfig(transformer=PixArtConfig(sample_size=sample_size))
        for ratio, (height, width) in table.items():
            asked = 1000, round(1000 * float(ratio))
            assert config.drawn_size(*asked) == (width, height)
            assert config.drawn_size(int(width), int(height)) == (width, height)
    unknown = PixArtAlphaPipelineConfig(transformer=PixArtConfig(sample_size=48))
    assert unknown.drawn_size(64, 80) == (64, 80)


def test_pictures_are_resized_as_diffusers_does():
    pictures = np.random.default_rng(0).standard_normal((2, 12, 10, 3)).astype(np.float32)
    resize = diffusers.image_processor.PixArtImageProcessor.resize_and_crop_tensor
    for width, height in ((15, 31), (7, 6), (10, 12)):
        expected = resize(torch.from_numpy(pictures).movedim(-1, 1), width, height)
        got = in_size(pictures, width, height)
        np.testing.assert_allclose(got, expected.movedim(1, -1).numpy(), atol=1e-5)
