"""FLUX.1 by other samplers: diffusers' pictures, and one program for all of them."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

import fluxjax
from fluxjax.config import ConfigError
from fluxjax.sample.preview import Preview

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_same_steps_by_either_program(pipe):
    (plain,) = pipe("a star", **CHOICES)
    (shared,) = pipe("a star", sampler="euler", **CHOICES)
    assert np.abs(np.asarray(plain, int) - np.asarray(shared, int)).max() <= 1


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"sampler": "ddim"}, "'ddim' is no sampler of a flow: there are euler, heun"),
        ({"sampler": "unipc", "sigmas": "karras"}, "no karras sigmas on a flow"),
        ({"sigmas": "lu"}, "has no lu sigmas: it has karras, exponential, beta"),
    ],
)
def test_what_a_flow_does_not_have_is_said(pipe, choices, words):
    with pytest.raises(ConfigError, match=words):
        pipe("a star", **CHOICES | choices)


@pytest.mark.slow
def test_previews_of_another_sampler_come_to_its_picture(pipe):
    """Heun's half steps end where they began: of them nothing is shown."""
    settings = replace(pipe.defaults, **CHOICES, prompt="a star", sampler="heun")
    shown: list[tuple[int, np.ndarray]] = []
    preview = Preview(pipe, settings, 4, lambda *seen: shown.append(seen), decoder=True)
    (picture,) = pipe.draw(settings, on_step=preview)
    assert [step for step, _ in shown] == [1, 3, 5, 7]
    np.testing.assert_array_equal(shown[-1][1][0], picture)


@pytest.mark.slow
def test_an_image_is_drawn_by_any_sampler(pipe):
    (image,) = pipe("a star", **CHOICES)
    drawn = [
        np.asarray(pipe("a red circle", image=image, sampler=name, strength=0.9, **CHOICES)[0], int)
        for name in ("euler", "unipc", None)
    ]
    assert np.abs(drawn[0] - drawn[2]).max() <= 1, "the model's own is Euler's"
    assert np.abs(drawn[0] - drawn[1]).max() > 1
