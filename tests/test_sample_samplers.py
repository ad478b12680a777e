"""FLUX.1 by other samplers: diffusers' pictures, and one program for all of them."""

import diffusers
import numpy as np
import pytest
import torch

import fluxjax
from fluxjax.config import ConfigError
from fluxjax.sample.preview import Preview
from fluxjax.sample.settings import Settings

CHOICES = {"steps": 4, "width": 96, "height": 80, "seed": 4}
SOLVERS = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pipe():
    return fluxjax.load_pipeline("tiny")


@pytest.fixture(scope="module")
def expected():
    return diffusers.FluxPipeline.from_pretrained("fluxjax/assets/tiny")


@pytest.mark.parametrize("name", SOLVERS)
def test_the_picture_is_that_of_diffusers(pipe, expected, name):
    kind, values = SOLVERS[name]
    expected.scheduler = getattr(diffusers, kind)(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True, **values
    )
    picture = expected(
        "a red circle",
        num_inference_steps=4,
        width=96,
        height=80,
        max_sequence_length=32,
        generator=torch.Generator("cpu").manual_seed(4),
        guidance_scale=pipe.defaults.guidance,
    ).images[0]
    (ours,) = pipe("a red circle", sampler=name, **CHOICES)
    distance = np.abs(np.asarray(ours, int) - np.asarray(picture, int))
    assert (distance <= 1).mean() >= 0.999
    (plain,) = pipe("a red circle", **CHOICES)
    assert np.abs(np.asarray(plain, int) - np.asarray(picture, int)).max() > 10


def test_samplers_steps_and_spacings_share_one_program(pipe):
    def programs():
        return len(pipe.executables._futures["denoise"])

    first = np.asarray(pipe("a star", sampler="heun", **CHOICES | {"steps": 8})[0])
    before = programs()
    drawn = [first]
    for choices in (
        {"sampler": "dpm++", "steps": 12},
        {"sampler": "unipc", "steps": 16},
        {"sampler": "euler", "steps": 9},
        {"sampler": "heun", "steps": 6, "sigmas": "karras"},
        {"sigmas": "beta", "steps": 10},
    ):
        drawn.append(np.asarray(pipe("a star", **CHOICES | choices)[0]))
    assert programs() == before
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)


def test_the_same_steps_by_either_program(pipe):
    (plain,) = pipe("a star", **CHOICES)
    (shared,) = pipe("a star", sampler="euler", **CHOICES)
    assert np.abs(np.asarray(plain, int) - np.asarray(shared, int)).max() <= 1


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"sampler": "ddim"}, "sampler must be one of euler, heun"),
        ({"sampler": "unipc", "sigmas": "karras"}, "no karras sigmas on a flow"),
        ({"sigmas": "lu"}, "has no lu sigmas: it has karras, exponential, beta"),
    ],
)
def test_what_a_flow_does_not_have_is_said(pipe, choices, words):
    with pytest.raises(ConfigError, match=words):
        pipe("a star", **CHOICES | choices)


def test_a_preview_is_of_the_models_own_levels(pipe):
    with pytest.raises(ConfigError, match="leave out --sampler"):
        Preview(pipe, Settings(sampler="unipc", width=96, height=80), 0, print)


def test_an_image_is_drawn_by_the_models_own_levels(pipe):
    (image,) = pipe("a star", **CHOICES)
    with pytest.raises(ConfigError, match="give the one or the other"):
        pipe("a star", image=image, sampler="unipc", **CHOICES)
