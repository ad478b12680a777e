"""Attention behind one function, fast on each kind of device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.models.chunked_attention import chunked_attention

Implementation = Literal["auto", "xla", "cudnn", "splash", "chunked"]
Attention = Implementation | Callable[..., Array]

# Below this many logits per head one batched matmul beats the loop over heads on a CPU.
_CHUNKED_FROM = 256 * 256


_STAND_IN: ContextVar[Callable[..., Array] | None] = ContextVar("stand_in", default=None)


@contextmanager
def auto_attention(function: Callable[..., Array]) -> Iterator[None]:
    """Programs traced inside call `function(q, k, v)` where `auto` would choose, without a mask."""
    token = _STAND_IN.set(function)
    try:
        yield
    finally:
        _STAND_IN.reset(token)


_SPREAD: ContextVar[Callable[..., Array] | None] = ContextVar("spread", default=None)


@contextmanager
def spread_kernels(spread: Callable[..., Array]) -> Iterator[None]:
    """Programs traced inside call `spread(kernel, q, k, v)` for kernels that no compiler splits.

    Those are chunked and splash attention; plain matmuls and cuDNN are split over devices as their
    inputs are.
    """
    token = _SPREAD.set(spread)
    try:
        yield
    finally:
        _SPREAD.reset(token)


def dot_product_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    *,
    causal: bool = False,
    bias: Float[Array, "#b #heads l m"] | None = None,
    scale: float | None = None,
    implementation: Attention = "auto",
) -> Float[Array, "b l heads k"]:
    """softmax(q k^T scale + bias) v with a float32 softmax; `scale` defaults to 1 / sqrt(k).

    `auto` takes cuDNN flash attention on NVIDIA GPUs (16-bit types), splash attention on TPUs, our
    chunked loop on CPUs and plain matmuls for all that these do not do: short sequences on a CPU,
    and `bias` or, except for cuDNN, `causal`.
    Raises ValueError if a named implementation cannot do what is asked. An `implementation` that is
    a function is called with (q, k, v).
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    plain = not causal and bias is None
    if implementation == "auto" and plain:
        implementation = _STAND_IN.get() or implementation
    if callable(implementation):
        return implementation(q, k, v)
    if implementation == "auto":
        implementation = _fastest(q, k, causal=causal, plain=plain)
    if implementation == "xla":
        return plain_attention(q, k, v, causal=causal, bias=bias, scale=factor)
    if implementation == "cudnn" and bias is None:
        return jax.nn.dot_product_attention(
            q, k, v, scale=factor, is_causal=causal, implementation="cudnn"
        )
    if not plain:
        raise ValueError(f"{implementation} attention takes no bias and no causal mask here")
    if implementation == "splash":
        # Pallas is slow to import, and only TPUs need it.
        from fluxjax.models.splash_attention import splash_attention as kernel
    else:
        kernel = chunked_attention
    attend: Any = kernel
    spread = _SPREAD.get()
    if spread is None:
        return attend(q, k, v, factor)
    return spread(partial(_scaled, attend, factor), q, k, v)


def _scaled(attend: Callable[..., Array], scale: float, q: Array, k: Array, v: Array) -> Array:
    # custom_vjp takes its arguments by position.
    return attend(q, k, v, scale)


def plain_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    *,
    causal: bool = False,
    bias: Float[Array, "#b #heads l m"] | None = None,
    scale: float,
) -> Float[Array, "b l heads k"]:
    """Two matmuls around a softmax; the reference of the others."""
    logits = jnp.einsum("blhk,bmhk->bhlm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    if causal:
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None]
        logits = jnp.where(mask, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhlm,bmhk->blhk", weights, v)


def _fastest(q: Array, k: Array, *, causal: bool, plain: bool) -> Implementation:
    platform, sixteen_bit = _platform(), q.dtype in (jnp.bfloat16, jnp.float16)
    head_dim = q.shape[-1]
    if platform == "cuda" and (plain or causal) and sixteen_bit and head_dim % 8 == 0:
        return "cudnn" if head_dim <= 128 else "xla"
    if platform == "tpu" and plain and head_dim in (64, 128, 256):
        return "splash"
    if platform == "cpu" and plain and q.shape[1] * k.shape[1] >= _CHUNKED_FROM:
        return "chunked"
    return "xla"


def _platform() -> str:
    """`cpu`, `tpu`, `cuda` or another GPU's name: where a function traced now will run."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    device = jax.devices(device)[0] if isinstance(device, str) else device or jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"
