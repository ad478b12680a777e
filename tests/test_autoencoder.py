"""The KL autoencoder against diffusers, and decoding in tiles."""

from dataclasses import replace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stable_diffusion_folders import random_vae
from torch_reference import relative_l2

from fluxjax.checkpoint.component_json import config_json, parse_config
from fluxjax.checkpoint.engine import to_ours
from fluxjax.checkpoint.pipeline_folder import load_params, read_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import DEV, AutoencoderConfig, ConfigError
from fluxjax.hub import tiny_folder
from fluxjax.models.autoencoder import Autoencoder, denormalize_latents, normalize_latents
from fluxjax.models.tiled_decode import decode_tiled
from fluxjax.networks.autoencoder import PUBLISHED
from fluxjax.train.embedded.scenes import render, sample_scenes

CONFIG = AutoencoderConfig(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=CONFIG.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "norm" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
    source = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    template = abstract_params(CONFIG)
    return theirs, to_ours(source, PUBLISHED, template)


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.moveaxis(np.asarray(x, np.float32), -1, 1))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.float().numpy(), 1, -1)


def images(seed: int = 0, height: int = 32, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)


def run(params, x, method: str, dtype=jnp.float32):
    model = Autoencoder(CONFIG, dtype=dtype)
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)


def test_equals_diffusers(networks):
    theirs, params = networks
    posterior = run(params, images(), "encode")
    with torch.no_grad():
        expected = theirs.encode(nchw(images())).latent_dist
        decoded = theirs.decode(expected.mean).sample
    assert relative_l2(posterior.mean, nhwc(expected.mean)) <= 1e-5
    assert relative_l2(posterior.logvar, nhwc(expected.logvar)) <= 1e-5
    assert relative_l2(run(params, nhwc(expected.mean), "decode"), nhwc(decoded)) <= 1e-5


def test_bfloat16_is_as_good_as_torch(networks):
    theirs, params = networks
    latents = np.random.default_rng(1).normal(size=(2, 8, 12, 16)).astype(np.float32)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    ours = run(half, latents, "decode", jnp.bfloat16).astype(jnp.float32)
    with torch.no_grad():
        exact = nhwc(theirs.decode(nchw(latents)).sample)
        rough = theirs.to(torch.bfloat16).decode(nchw(latents).bfloat16()).sample
        theirs.to(torch.float32)
    assert relative_l2(ours, exact) <= 2e-2
    assert relative_l2(ours, exact) <= 1.5 * relative_l2(nhwc(rough), exact)


@pytest.mark.slow
def test_stable_diffusions_in_bfloat16_is_as_good_as_torch():
    """With convolutions around the latents; both ways."""
    torch.manual_seed(0)
    theirs = random_vae().eval()
    values = {"latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
    config = replace(CONFIG, block_out_channels=(8, 8, 16), **values)
    source = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = to_ours(source, PUBLISHED, abstract_params(config))
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    latents = np.random.default_rng(1).normal(size=(2, 8, 12, 4)).astype(np.float32)
    model = Autoencoder(config, dtype=jnp.bfloat16)

    def ours(x, method):
        return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(half, x)

    def both(dtype):
        with torch.no_grad():
            posterior = theirs.to(dtype).encode(nchw(images()).to(dtype)).latent_dist
            return nhwc(posterior.mean), nhwc(theirs.decode(nchw(latents).to(dtype)).sample)

    exact, rough = both(torch.float32), both(torch.bfloat16)
    got = ours(images(), "encode").mean, ours(latents, "decode")
    for mine, right, low in zip(got, exact, rough, strict=True):
        assert relative_l2(mine.astype(jnp.float32), right) <= 1.5 * relative_l2(low, right)


def test_posterior_sample_has_the_posteriors_spread(networks):
    posterior = run(networks[1], images(), "encode")
    draws = jax.vmap(posterior.sample)(jax.random.split(jax.random.key(0), 4000))
    error = (draws.mean(0) - posterior.mean) / jnp.exp(0.5 * posterior.logvar)
    assert float(jnp.abs(error).max()) < 0.1  # six deviations of a mean over 4000 draws
    spread = draws.std(0) / jnp.exp(0.5 * posterior.logvar)
    assert abs(float(spread.mean()) - 1) < 0.01


def test_normalisation_is_flux_ones():
    z = jnp.array([0.1159, 1.0])
    np.testing.assert_allclose(normalize_latents(z, DEV.vae), [0.0, 0.8841 * 0.3611], rtol=1e-6)
    np.testing.assert_allclose(denormalize_latents(normalize_latents(z, DEV.vae), DEV.vae), z)


@pytest.mark.slow
def test_tiles_leave_no_seam():
    """Twelve pictures in one, so that tiles have unlike statistics, through the embedded model."""
    folder = tiny_folder()
    config = read_config(folder).vae
    params = load_params(folder, "vae", config, stacked=False, dtype=jnp.float32)
    model, side = Autoencoder(config), {"width": 128, "height": 128}
    pictures = np.asarray(render(sample_scenes(jax.random.key(5), 12, **side), **side))
    large = pictures.reshape(3, 4, 128, 128, 3).transpose(0, 2, 1, 3, 4).reshape(1, 384, 512, 3)

    def apply(x, method: str):
        return jax.jit(lambda x: model.apply({"params": params}, x, method=method))(x)

    latents = apply(large, "encode").mean
    whole = np.asarray(apply(latents, "decode"))
    step = 2 / 255  # pictures span [-1, 1]
    assert np.abs(decode_tiled(model, params, latents, tile=32) - whole).max() <= step
    # The shared statistics are what removes the seam: without them it is there.
    alone = decode_tiled(model, params, latents, tile=32, passes=0)
    assert np.abs(alone - whole).max() > 5 * step


def test_tiles_need_a_sensible_size(networks):
    with pytest.raises(ConfigError, match="at least 8 latents a side, got 7"):
        decode_tiled(Autoencoder(CONFIG), networks[1], np.zeros((1, 8, 8, 16), np.float32), tile=7)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_statistics_of_each_channel_are_refused(tmp_path, name):
    """XL's pipelines read them, and draw another picture without."""
    values = {**config_json(DEV.vae), name: [0.1] * 16}
    with pytest.raises(ConfigError, match=rf"{name}=\[0.1, .* is not supported, only None"):
        parse_config(AutoencoderConfig, values, tmp_path / "config.json")
    assert parse_config(AutoencoderConfig, {**values, name: None}, tmp_path) == DEV.vae
