"""The same values and derivatives as the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.models.bias_and_scale import add_bias, multiply_scale


def value_and_derivatives(function, *arguments):
    value, pull = jax.vjp(function, *arguments)
    weights = np.random.default_rng(1).standard_normal(value.shape).astype(value.dtype)
    return value, *pull(jnp.asarray(weights))


def close(found, wanted, bound):
    for a, b in zip(found, wanted, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@pytest.fixture
def x():
    return jnp.asarray(2 + np.random.default_rng(0).standard_normal((3, 68, 192)), jnp.float32)


@pytest.mark.parametrize(("ours", "plain"), [(add_bias, jnp.add), (multiply_scale, jnp.multiply)])
def test_bias_and_scale(x, ours, plain):
    vector = jnp.linspace(-1, 1, x.shape[-1])
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(v, np.float64)) for v in (x, vector))
        wanted = value_and_derivatives(lambda x, v: plain(x, v[None, None]), *exact)
    # Measured: at most 2.6e-7 (the sums).
    close(value_and_derivatives(ours, x, vector), wanted, 1e-6)


def test_sums_of_bfloat16_are_rounded_once(x):
    rounded = x.astype(jnp.bfloat16)
    _, _, found = value_and_derivatives(add_bias, rounded, jnp.zeros(192, jnp.bfloat16))
    weights = np.random.default_rng(1).standard_normal(x.shape).astype(jnp.bfloat16)
    wanted = weights.astype(np.float64).sum((0, 1))
    close([found], [wanted], 2**-8)
