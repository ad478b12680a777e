"""Noise equals PyTorch's CPU generator for every path it has, and stands alone."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fluxjax.config import ConfigError
from fluxjax.sample.noise import TorchGenerator, draw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUND = {"float32": 2e-6, "bfloat16": 2**-6, "float16": 2**-9}  # one unit in the last place


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5, 2**64 - 1])
def test_every_path_equals_torch(seed, dtype):
    """Consecutive draws of one generator: blocks of 16, a tail, the scalar path with its spare."""
    theirs, ours = torch.Generator().manual_seed(seed), TorchGenerator(seed)
    for count in (16, 37, 3, 5, 1, 40, 1024, 15, 33):
        expected = torch.randn(count, generator=theirs, dtype=DTYPES[dtype]).float().numpy()
        got = ours.randn((count,), jnp.dtype(dtype)).astype(np.float32)
        np.testing.assert_allclose(got, expected, rtol=0, atol=BOUND[dtype])


def test_large_latents_equal_torch():
    shape = (2, 16, 128, 128)
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(7)).numpy()
    got = np.asarray(draw(7, shape))
    assert got.shape == shape and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_bfloat16_is_the_same_number_nearly_always():
    shape = (1, 16, 64, 64)
    generator = torch.Generator().manual_seed(3)
    expected = torch.randn(shape, generator=generator, dtype=torch.bfloat16).float().numpy()
    got = np.asarray(draw(3, shape, dtype=jnp.bfloat16), np.float32)
    assert (got == expected).mean() > 0.9999


def test_seeds_per_picture_are_the_single_draws():
    batch = draw([5, 9], (2, 4, 8, 8))
    np.testing.assert_array_equal(batch[1:], draw(9, (1, 4, 8, 8)))
    assert not np.allclose(draw(5, (2, 4, 8, 8))[1], batch[1])


def test_jax_noise_uses_all_64_bits():
    shape = (1, 4, 64, 64)
    low, high = draw(1, shape, kind="jax"), draw(2**32 + 1, shape, kind="jax")
    assert not np.allclose(low, high)
    assert abs(float(low.mean())) < 0.03 and abs(float(low.std()) - 1) < 0.03


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_named(seed):
    with pytest.raises(ConfigError, match=str(seed)):
        draw(seed, (1, 4, 8, 8))


def test_wrong_number_of_seeds():
    with pytest.raises(ConfigError, match="2 pictures need 2 seeds, got 1"):
        draw([1], (2, 4, 8, 8))
