"""Packing and positions equal diffusers'."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from fluxjax.config import DEV, ConfigError
from fluxjax.config.latents import latent_size
from fluxjax.models import latents as L


def test_pack_equals_diffusers_and_unpack_inverts():
    x = np.random.default_rng(0).normal(size=(2, 16, 6, 10)).astype(np.float32)
    expected = FluxPipeline._pack_latents(torch.from_numpy(x), 2, 16, 6, 10).numpy()
    packed = L.pack(jnp.asarray(x))
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(L.unpack(packed, 6, 10), x)
    theirs = FluxPipeline._unpack_latents(torch.from_numpy(expected), 48, 80, 8).numpy()
    np.testing.assert_array_equal(theirs, x)


def test_ids_equal_diffusers():
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32).numpy()
    np.testing.assert_array_equal(L.image_ids(6, 10), expected)
    assert (np.asarray(L.image_ids(6, 10, index=1))[:, 0] == 1).all()
    assert not L.text_ids(7).any() and L.text_ids(7).shape == (7, 3)


@pytest.mark.parametrize(("width", "height", "word"), [(33, 64, "width"), (64, 0, "height")])
def test_sizes_that_no_token_fits_are_named(width, height, word):
    with pytest.raises(ConfigError, match=f"{word} must be a multiple of 16"):
        latent_size(width, height, DEV.vae)


def test_latent_size_is_rows_then_columns():
    assert latent_size(96, 64, DEV.vae) == (8, 12)
