"""One model in every form that is read draws the same picture; half a model is named."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_pipeline import random_pipeline  # noqa: F401

import fluxjax
from fluxjax.config import ConfigError
from fluxjax.convert import convert
from fluxjax.hub import tiny_folder

CHOSEN = {"width": 64, "height": 64, "steps": 3, "max_sequence_length": 16, "seed": 1}


@pytest.fixture(scope="module")
def forms(random_pipeline, tmp_path_factory):  # noqa: F811
    """The folders of the same model: diffusers', BFL's files, Orbax."""
    folders = {"diffusers": random_pipeline}
    for form in ("bfl", "orbax"):
        folders[form] = tmp_path_factory.mktemp("forms") / form
        convert.run(convert.plan(random_pipeline, folders[form], form))
    return folders


@pytest.mark.slow
def test_every_form_draws_the_same_picture(forms):
    bfl = forms["bfl"]
    first = fluxjax.load_pipeline(forms["diffusers"])
    expected = np.asarray(first("a red circle", **CHOSEN)[0])
    for arguments in (
        {"model": forms["orbax"]},
        {"model": bfl},
        {
            "model": bfl / "flux1-dev.safetensors",
            "text_encoders": bfl,
            "vae": bfl / "ae.safetensors",
        },
        {
            "model": bfl / "flux1-dev.safetensors",
            "text_encoders": forms["diffusers"],
            "vae": forms["diffusers"] / "vae",
        },
    ):
        pipe = fluxjax.load_pipeline(**arguments)
        pipe.executables = first.executables  # the same networks: nothing to compile again
        got = np.asarray(pipe("a red circle", **CHOSEN)[0])
        np.testing.assert_array_equal(got, expected, err_msg=str(arguments))


def test_what_a_single_file_lacks_is_named(forms, tmp_path):
    bfl = forms["bfl"]
    flux, vae = bfl / "flux1-dev.safetensors", bfl / "ae.safetensors"
    for arguments, words in (
        ((flux, None, None), "needs text encoders"),
        ((flux, bfl, None), "needs a vae"),
        ((vae, bfl, vae), "holds no transformer but vae"),
        (
            (flux, bfl, flux),
            "expected the autoencoder, but these are tensors of the FLUX transformer",
        ),
        ((flux, tmp_path, vae), "text_encoder"),
        ((flux, tmp_path / "none", vae), "text encoders are a folder, and .*none is not there"),
        ((flux, vae, vae), "text encoders are a folder, and .*ae.safetensors is a file"),
        ((bfl, bfl, None), "is none"),
    ):
        model, text_encoders, autoencoder = arguments
        with pytest.raises((ConfigError, FileNotFoundError), match=words):
            fluxjax.load_pipeline(model, text_encoders=text_encoders, vae=autoencoder)


def test_another_autoencoder_is_taken_in_place_of_the_models_own(tmp_path):
    """A folder, one with the original code's file beside, and that file, which says no scale."""
    folder, own_folder = tmp_path / "vae", tiny_folder().with_name("tiny-sd")
    shutil.copytree(own_folder / "vae", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] += 0.25
    save_file(tensors, file)
    shutil.copyfile(file, folder / "sdxl_vae.safetensors")
    for vae, apart in ((folder, 0.25), (folder / "sdxl_vae.safetensors", 0.25), (own_folder, 0.0)):
        pipe, own = fluxjax.load_pipeline("tiny-sd", vae=vae), fluxjax.load_pipeline("tiny-sd")
        biases = [
            np.asarray(one.params("vae")["decoder"]["conv_out"]["bias"]) for one in (pipe, own)
        ]
        np.testing.assert_allclose(biases[0] - biases[1], apart, atol=2e-3)  # float16
        assert pipe.config == own.config and pipe.sources.vae is not None
    clips = tiny_folder().with_name("tiny-video") / "vae"
    with pytest.raises(ConfigError, match=r"HunyuanVideo.*, 16 latent channels .*; needed: auto"):
        fluxjax.load_pipeline("tiny-sd", vae=clips)
