"""Stable Diffusion 3: the pictures of diffusers."""

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from stable_diffusion_folders import save_sd3

import fluxjax
from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.config import PRESETS, ConfigError

PROMPT = "a red circle above a star!"  # "!" is what the second CLIP is padded with
OURS: dict[str, Any] = {"steps": 5, "seed": 3, "guidance": 4.0, "max_sequence_length": 24}
THEIRS: dict[str, Any] = {
    "num_inference_steps": 5,
    "guidance_scale": 4.0,
    "max_sequence_length": 24,
}
SIZE: dict[str, Any] = {"width": 40, "height": 56}  # tokens of 5 x 7
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3") / "sd3", shared / "tokenizers")


@pytest.fixture(scope="module")
def ours(folder):
    return fluxjax.load_pipeline(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return diffusers.StableDiffusion3Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def image():
    colours = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    return Image.fromarray(colours).resize((40, 56), Image.Resampling.BICUBIC)


def drawn(pipeline, prompt: Any = PROMPT, **choices) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    choices = {"generator": torch.Generator().manual_seed(3), **THEIRS, **choices}
    return pipeline(prompt, **choices).images


def assert_same(pictures, expected):
    for picture, other in zip(pictures, expected, strict=True):
        a, b = (np.asarray(one, int) for one in (picture, other))
        assert a.shape == b.shape and a.std() > 20
        assert (np.abs(a - b) <= 1).mean() >= 0.999


@slow
def test_text_alone(ours, theirs):
    """Of two prompts at once, each encoder with one of its own, too."""
    both = [PROMPT, "a heart"]
    assert_same(ours(both, **OURS, **SIZE), drawn(theirs, both, **SIZE))
    own: dict[str, Any] = {
        "prompt_2": "a heart",
        "prompt_3": "a blue box",
        "negative_prompt": "fog",
    }
    assert_same(
        ours(PROMPT, clip_skip=1, **own, **OURS, **SIZE), drawn(theirs, clip_skip=1, **own, **SIZE)
    )


@slow
def test_skip_layer_guidance(ours, theirs):
    """In some steps."""
    asked: dict[str, Any] = {
        "skip_layers": (0, 1),
        "skip_layer_scale": 3.0,
        "skip_layer_range": (0.1, 0.7),
    }
    choices = {"skip_guidance_layers": [0, 1], "skip_layer_guidance_scale": 3.0}
    choices |= {"skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.7}
    (picture,) = ours(PROMPT, **asked, **OURS, **SIZE)
    assert_same([picture], drawn(theirs, **choices, **SIZE))
    (without,) = ours(PROMPT, **OURS, **SIZE)
    assert np.abs(np.asarray(picture, int) - np.asarray(without, int)).max() > 10


@slow
def test_a_mesh_draws_the_same_picture(folder, ours):
    """With 35 tokens of picture over two devices, and some blocks left out in some steps."""
    pipe = fluxjax.load_pipeline(folder, mesh="data=2,tensor=2,sequence=2")
    guided: dict[str, Any] = {"skip_layers": (0, 1), "skip_layer_scale": 3.0}
    guided["skip_layer_range"] = (0.1, 0.7)
    for prompts, choices in (([PROMPT, "a heart"], {}), (PROMPT, guided)):
        assert_same(
            pipe(prompts, **choices, **OURS, **SIZE), ours(prompts, **choices, **OURS, **SIZE)
        )
    kernel = pipe.params("transformer")["transformer_blocks_1"]["ff"]["net_2"]["kernel"]
    assert 2 * kernel.addressable_shards[0].data.size == kernel.size


@slow
@pytest.mark.parametrize("sampler", ["heun", "dpm++", "unipc"])
def test_other_samplers_of_flows(ours, theirs, sampler):
    own = theirs.scheduler
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    kinds = {
        "heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        "dpm++": diffusers.DPMSolverMultistepScheduler(**flow),
        "unipc": diffusers.UniPCMultistepScheduler(**flow),
    }
    theirs.scheduler = kinds[sampler]
    try:
        expected = drawn(theirs, **SIZE)
    finally:
        theirs.scheduler = own
    assert_same(ours(PROMPT, sampler=sampler, **OURS, **SIZE), expected)


@slow
@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_images_and_masks(ours, theirs, image, strength):
    """diffusers decodes what it has inpainted without the autoencoder's shift, a mistake: its
    latents are decoded here."""
    kind = diffusers.StableDiffusion3Img2ImgPipeline
    pictures = ours(PROMPT, image=image, strength=strength, **OURS)
    changed: dict[str, Any] = {"image": image, "strength": strength}
    assert_same(pictures, drawn(kind(**theirs.components), **changed, **SIZE))
    mask = Image.fromarray((np.indices((56, 40))[1] > 17).astype(np.uint8) * 255)
    pictures = ours(PROMPT, image=image, mask=mask, strength=strength, **OURS)
    kind = diffusers.StableDiffusion3InpaintPipeline
    choices = {**changed, "mask_image": mask, "output_type": "latent", **SIZE}
    latents = drawn(kind(**theirs.components), **choices)
    with torch.no_grad():
        expected = theirs.vae.decode(latents / 1.5305 + 0.0609).sample
    assert_same(pictures, theirs.image_processor.postprocess(expected))


@slow
def test_without_t5_and_with_a_shift_by_size(shared, tmp_path):
    folder = save_sd3(tmp_path / "small", shared / "tokenizers", t5=False, dynamic=True)
    ours, absent = fluxjax.load_pipeline(folder), {"text_encoder_3": None, "tokenizer_3": None}
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    assert_same(ours(PROMPT, **OURS, **SIZE), drawn(theirs, **SIZE))
    with pytest.raises(ConfigError, match=r"prompt_3 is for a third text encoder, .* has 2"):
        ours(PROMPT, prompt_3="x", **OURS, **SIZE)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("stable-diffusion-3-medium-diffusers", "sd3"),
        ("stable-diffusion-3.5-medium", "sd35-medium"),
        ("stable-diffusion-3.5-large", "sd35-large"),
    ],
)
def test_presets_are_the_published_folders(shared, name, preset):
    config, found = PRESETS[preset], read_config(shared / "checkpoints" / name)
    t5 = replace(found.networks["text_encoder_3"], dense_act_fn="gelu_pytorch_tanh")  # gelu_new too
    assert replace(found, text_encoder_3=t5) == config
    config.require_whole(name, text_alone=True)


@slow
def test_mistakes_are_one_sentence(ours):
    for choices, words in (
        ({"width": 42}, "width must be a multiple of 8, got 42"),
        ({"width": 128, "height": 8}, "positions for sides of up to 96 pixels, got 128 x 8"),
        ({"eta": 0.5}, "eta is how much noise DDIM adds, and this model is a flow"),
        ({"skip_layers": (3,)}, "skip_layers must be blocks from 0 to 2"),
        ({"skip_layers": (1,), "guidance": 1.0}, "skip_layers needs guidance above 1"),
        ({"clip_skip": 3}, "clip_skip must be below CLIP's 3 layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            ours("a star", **{**OURS, **choices})
    with pytest.raises(ConfigError, match="skip_layers guides Stable Diffusion 3 alone"):
        fluxjax.load_pipeline("tiny")("a star", skip_layers=(1,))
