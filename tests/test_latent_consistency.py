"""Models that were distilled to hear their guidance and to draw in a few steps: as diffusers."""

from dataclasses import replace

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stable_diffusion_folders import save_latent_consistency
from test_stable_diffusion import PROMPT, SIZE, _quiet, assert_same, image, mask  # noqa: F401

import fluxjax
from fluxjax.config import SD15, SDXL, ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.config.stable_diffusion import LCM, LatentConsistencyConfig
from fluxjax.convert.convert import plan, run
from fluxjax.families import LATENT_CONSISTENCY, Guidance, Steps
from fluxjax.models.embeddings import guidance_sinusoid

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SMALL = LatentConsistencyConfig()


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    place = tmp_path_factory.mktemp("lcm") / "lcm"
    return save_latent_consistency(place, shared / "tokenizers")


@pytest.fixture(scope="module")
def ours(folder):
    return fluxjax.load_pipeline(folder)


@pytest.fixture(scope="module")
def expected(folder):
    return _quiet(diffusers.LatentConsistencyModelPipeline.from_pretrained(folder))


def drawn(pipeline, steps, guidance, **choices):
    generator = torch.Generator().manual_seed(3)
    choices |= {"num_inference_steps": steps, "guidance_scale": guidance}
    return pipeline(PROMPT, generator=generator, **choices).images[0]


@pytest.mark.parametrize("width", [32, 33])
def test_guidance_is_embedded_as_in_diffusers(width):
    scales = np.array([0.5, 1.0, 4.5, 8.0], np.float32)
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    theirs = embed(None, torch.from_numpy(scales) - 1, embedding_dim=width)
    np.testing.assert_allclose(guidance_sinusoid(jnp.asarray(scales), width), theirs, atol=5e-4)


@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (4, 0.8), (6, 0.3), (1, 0.1)])
def test_all_steps_are_within_the_strength(steps, strength):
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(steps, strength=strength)
    first = LATENT_CONSISTENCY.first_step(steps, strength)
    course = Steps(steps, first, strength=strength)
    ours = LATENT_CONSISTENCY.run(SMALL, course, 8, 8).schedule.times
    np.testing.assert_array_equal(ours, scheduler.timesteps.numpy())


def test_mistakes_are_one_sentence():
    family = LATENT_CONSISTENCY
    with pytest.raises(ConfigError, match="hears no negative_prompt"):
        family.scale(SMALL, Guidance(8.0, negative_prompt="blue"))
    assert family.scale(SMALL, Guidance(8.0)) is None
    with pytest.raises(ConfigError, match=r"a strength of 0.1 leaves 5 of the 50 steps"):
        family.run(SMALL, Steps(6, 6, strength=0.1), 8, 8)
    with pytest.raises(ConfigError, match=r"4 steps with a strength of 0.2 leave none"):
        family.run(SMALL, Steps(4, 4, sampler="ddim", strength=0.2), 8, 8)
    with pytest.raises(ConfigError, match="given an image and a mask"):
        family.find_task(SMALL, ("image", "mask"))
    with pytest.raises(ConfigError, match="x: a latent consistency model hears its guidance"):
        replace(SMALL, unet=SD15.unet).require_whole("x")


def test_files_without_a_scheduler_are_drawn_by_lcm():
    """Also XL's, whose class and defaults stay."""
    parts = {**SD15.networks, "unet": replace(SD15.unet, time_cond_proj_dim=256)}
    found = SD15.published(parts, "")
    assert (found.class_name, found.steps) == ("LatentConsistencyModelPipeline", 4)
    assert found.scheduler == LCM
    large = SDXL.published({**SDXL.networks, "unet": replace(SDXL.unet, time_cond_proj_dim=9)}, "")
    assert (large.class_name, large.scheduler) == (SDXL.class_name, LCM)
    own = SamplerConfig(sampler="DDIMScheduler")
    kept = SD15.published({**parts, "scheduler": own}, "")
    assert kept.class_name == SD15.class_name and kept.scheduler.sampler == own.sampler


@pytest.mark.slow
def test_the_folder_alone_decides(ours, expected):
    """Its scheduler; 4 steps with a guidance of 8.5."""
    (picture,) = ours(PROMPT, seed=3, **SIZE)
    assert_same(picture, drawn(expected, 4, 8.5, **SIZE))
    (other,) = ours(PROMPT, seed=3, guidance=1.5, **SIZE)
    assert_same(other, drawn(expected, 4, 1.5, **SIZE))
    assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() > 10


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.5, 0.2])
def test_an_image_is_drawn_anew_with_all_steps(ours, expected, image, strength):  # noqa: F811
    """Where `StableDiffusionImg2ImgPipeline` runs the last part of them."""
    asked = {"image": image, "strength": strength}
    (picture,) = ours(PROMPT, seed=3, steps=4, guidance=6.0, **asked)
    theirs = _quiet(diffusers.LatentConsistencyModelImg2ImgPipeline(**expected.components))
    assert_same(picture, drawn(theirs, 4, 6.0, **asked))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stable_diffusion_with_such_a_unet(expected, image, mask, tmp_path):  # noqa: F811
    """In the classes of diffusers that draw with any UNet, and by another sampler."""
    diffusers.StableDiffusionPipeline(
        **expected.components, requires_safety_checker=False
    ).save_pretrained(tmp_path / "sd")
    ours = fluxjax.load_pipeline(tmp_path / "sd")
    theirs = _quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd"))
    (picture,) = ours(PROMPT, seed=3, steps=4, guidance=6.0, **SIZE)
    assert_same(picture, drawn(theirs, 4, 6.0, **SIZE))
    changes = _quiet(diffusers.StableDiffusionImg2ImgPipeline(**theirs.components))
    (picture,) = ours(PROMPT, seed=3, steps=5, guidance=6.0, image=image, strength=0.5)
    assert_same(picture, drawn(changes, 5, 6.0, image=image, strength=0.5))
    paints = _quiet(diffusers.StableDiffusionInpaintPipeline(**theirs.components))
    (picture,) = ours(PROMPT, seed=3, steps=4, guidance=6.0, image=image, mask=mask)
    assert_same(picture, drawn(paints, 4, 6.0, image=image, mask_image=mask, **SIZE))
    given = theirs.scheduler.config
    for sampler, kind in {"euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler"}.items():
        theirs.scheduler = getattr(diffusers, kind).from_config(given)
        (picture,) = ours(PROMPT, seed=3, steps=4, guidance=6.0, sampler=sampler, **SIZE)
        assert_same(picture, drawn(theirs, 4, 6.0, **SIZE))


@pytest.mark.slow
def test_one_file_and_back(folder, ours, tmp_path):
    """Nothing is lost, and the file alone is known as what it is."""
    file = tmp_path / "whole.safetensors"
    run(plan(folder, file, "bfl"))
    whole = fluxjax.load_pipeline(file, text_encoders=folder)
    assert whole.config.class_name == ours.config.class_name
    pictures = [np.asarray(pipe(PROMPT, seed=3, **SIZE)[0]) for pipe in (whole, ours)]
    assert np.array_equal(*pictures)
    run(plan(file, tmp_path / "back", None))
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
