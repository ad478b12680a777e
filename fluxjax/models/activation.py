"""Activation functions by the names that transformers' `config.json` files use."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from fluxjax.config import Activation


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's x sigmoid(1.702 x) (openai/CLIP, model.py)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh approximation of GELU, which T5 v1.1 calls `gelu_new`."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """By the error function."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": gelu_exact,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
