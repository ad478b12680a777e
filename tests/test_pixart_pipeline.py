"""PixArt-alpha and PixArt-Sigma: the pictures of diffusers."""

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
    generator, choices = torch.Generator().manual_seed(3), {**THEIRS, **choices}
    expected = theirs(prompt, generator=generator, clean_caption=False, **choices).images
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
    with pytest.raises(ConfigError, match="of 384 pixels was trained are not known"):
        PixArtAlphaPipelineConfig(transformer=PixArtConfig(sample_size=48)).drawn_size(64, 64)


def test_pictures_are_resized_as_diffusers_does():
    pictures = np.random.default_rng(0).standard_normal((2, 12, 10, 3)).astype(np.float32)
    resize = diffusers.image_processor.PixArtImageProcessor.resize_and_crop_tensor
    for width, height in ((15, 31), (7, 6), (10, 12)):
        expected = resize(torch.from_numpy(pictures).movedim(-1, 1), width, height)
        got = in_size(pictures, width, height)
        np.testing.assert_allclose(got, expected.movedim(1, -1).numpy(), atol=1e-5)
