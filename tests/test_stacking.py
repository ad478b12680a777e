"""Stacked and per-layer parameter trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.models.stacking import stack_layers, unstack_layers


def tree(leaf):
    return {
        "x_embedder": {"kernel": leaf(2)},
        "transformer_blocks_0": {"attn": {"to_out_0": {"kernel": leaf(0)}}},
        "transformer_blocks_1": {"attn": {"to_out_0": {"kernel": leaf(1)}}},
        "encoder": {"block_0": {"layer_0": {"scale": leaf(3)}}, "final_layer_norm": leaf(4)},
    }


@pytest.mark.parametrize(
    "leaf",
    [
        lambda i: np.full((2, 3), i, np.float16),
        lambda i: jnp.full((2, 3), i),
        lambda i: jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
    ],
    ids=["numpy", "jax", "shape"],
)
def test_round_trip_and_idempotence(leaf):
    flat = tree(leaf)
    stacked = stack_layers(flat)
    kernel = stacked["transformer_blocks"]["attn"]["to_out_0"]["kernel"]
    assert kernel.shape == (2, 2, 3) and type(kernel) is not list
    assert stacked["encoder"]["block"]["layer_0"]["scale"].shape == (1, 2, 3)
    for again in (stack_layers(stacked), stacked):
        assert_equal(again, stacked)
    assert_equal(unstack_layers(stacked), flat)
    assert_equal(unstack_layers(flat), flat)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if not isinstance(x, jax.ShapeDtypeStruct):
            np.testing.assert_array_equal(x, y)


def test_layers_in_numeric_order():
    stacked = stack_layers({f"layers_{i}": {"bias": np.full(1, i)} for i in (10, *range(10))})
    np.testing.assert_array_equal(stacked["layers"]["bias"][:, 0], np.arange(11))


def test_a_missing_layer_is_named():
    with pytest.raises(ValueError, match=r"'layers' must be numbered 0 to 1, got \[0, 2\]"):
        stack_layers({"layers_0": {"bias": np.zeros(1)}, "layers_2": {"bias": np.zeros(1)}})
