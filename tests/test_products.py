"""The same values and derivatives as the plain formulas."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import CausalAutoencoderConfig, CLIPTextConfig, FluxConfig, T5Config
from fluxjax.config.unet import UNetConfig
from fluxjax.models.products import BFLOAT16, add_bias, affine, multiply_scale
from fluxjax.networks import NETWORKS, network_of


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


def test_bfloat16_products_round_the_operands_and_nothing_else():
    x, kernel, weights = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3), ((2, 5, 48), (48, 32), (2, 5, 32)), strict=True
        )
    )

    def loss(x, kernel, precision=BFLOAT16):
        return jnp.sum(affine(x, kernel, precision=precision) * weights)

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    exact, ours = (
        (loss(x, kernel, precision), *jax.grad(loss, (0, 1))(x, kernel, precision))
        for precision in (None, BFLOAT16)
    )
    of_rounded = (
        loss(rounded(x), rounded(kernel)),
        jnp.einsum("abn,kn->abk", rounded(weights), rounded(kernel)),
        jnp.einsum("abk,abn->kn", rounded(x), rounded(weights)),
    )
    for got, wanted, other in zip(ours, of_rounded, exact, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        assert got.dtype == jnp.float32 and not np.allclose(got, other, rtol=1e-4, atol=1e-4)


SMALL = {
    FluxConfig(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ): 30,
    T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2): 7,
    CLIPTextConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
        with_projection=True,
    ): 7,
}
"""Configurations, and how many kernels they have."""


def products_of_bfloat16(config, precision) -> int:
    """In the forward of a small network whose arrays are float32."""
    network = network_of(config)
    model, inputs = network.build(config, precision=precision), network.inputs(config)
    params = {"params": abstract_params(config)}
    text = jax.jit(model.apply).lower(params, **inputs).as_text()
    kernels = sum(path[-1].key == "kernel" for path, _ in jax.tree.leaves_with_path(params))
    assert kernels == SMALL[config]
    return len(re.findall(r"stablehlo.dot_general .* : \(tensor<[^>]*xbf16>, ", text))


@pytest.mark.parametrize("config", SMALL, ids=lambda config: type(config).__name__)
def test_every_dense_layer_takes_the_models_precision_and_no_global_setting(config):
    if jax.default_backend() != "cpu":
        pytest.skip("elsewhere the compiler rounds")
    assert products_of_bfloat16(config, BFLOAT16) == SMALL[config]
    with jax.default_matmul_precision(BFLOAT16):
        assert products_of_bfloat16(config, None) == 0


# Of its real size it takes seconds to trace; the others do not.
SMALLER = {
    UNetConfig: UNetConfig(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        transformer_layers_per_block=(1,),
        attention_head_dim=(4,),
    ),
    CausalAutoencoderConfig: CausalAutoencoderConfig(
        block_out_channels=(32,) * 4, layers_per_block=1
    ),
}


def precisions(jaxpr) -> Iterator[tuple[Any, Any]]:
    """(type, precision) of every product and convolution."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.invars[0].aval.dtype, equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from precisions(inner)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=lambda network: network.component)
def test_the_type_chooses_the_precision_and_no_global_setting(network, dtype):
    config = SMALLER.get(network.config) or network.config()
    module = network.build(config, scan_layers=True, dtype=dtype, param_dtype=dtype)
    params = abstract_params(config, stacked=bool(network.scanned))

    def run(params, inputs):
        return module.apply({"params": params}, **inputs, method=network.method)

    with jax.default_matmul_precision("bfloat16"):
        traced = jax.make_jaxpr(run)(params, network.inputs(config))
    found = set(precisions(traced.jaxpr))
    own = (lax.Precision.HIGHEST,) * 2
    found -= {(jnp.dtype(jnp.float32), own)}
    if dtype == jnp.float32:
        assert not found
    else:
        # Attention in chunks multiplies in float32 what was 16-bit, which may be rounded to it.
        default = (lax.Precision.DEFAULT,) * 2
        assert found - {(jnp.dtype(jnp.float32), default)} == {(jnp.dtype(dtype), default)}
