"""Attention behind one function, fast on each kind of device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fluxjax.config.choices import Implementation
from fluxjax.models.chunked_attention import chunked_attention
from fluxjax.models.products import own_precision

Kernel = Callable[..., Array]
"""`kernel(q, k, v, key_lengths)`; `key_lengths` may be None."""
AttentionKind = Implementation | Kernel

# Below this many logits per head one batched matmul beats the loop over heads on a CPU.
_CHUNKED_FROM = 256 * 256


_STAND_IN: ContextVar[Kernel | None] = ContextVar("stand_in", default=None)


@contextmanager
def auto_attention(function: Kernel) -> Iterator[None]:
    """Programs traced inside call `function(q, k, v, key_lengths)` where `auto` would choose."""
    token = _STAND_IN.set(function)
    try:
        yield
    finally:
        _STAND_IN.reset(token)


def has_stand_in() -> bool:
    """Whether programs traced now are only counted, see `auto_attention`."""
    return _STAND_IN.get() is not None


_SPREAD: ContextVar[Callable[..., Array] | None] = ContextVar("spread", default=None)


@contextmanager
def spread_kernels(spread: Callable[..., Array]) -> Iterator[None]:
    """Programs traced inside call `spread(kernel, q, k, v, key_lengths)` for kernels that no
    compiler splits.

    Those are chunked and splash attention, and cuDNN with key lengths; plain matmuls and cuDNN
    without are split over devices as their inputs are.
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
    key_lengths: Int[Array, " b"] | None = None,
    scale: float | None = None,
    implementation: AttentionKind = "auto",
) -> Float[Array, "b l heads k"]:
    """softmax(q k^T scale + bias) v with a float32 softmax; `scale` defaults to 1 / sqrt(k).

    `key_lengths`: row b attends to its first `key_lengths[b]` keys, all if it has no more, and
    what the others hold, if finite, changes nothing. Padding must therefore lie at the end of each
    row: in a joint sequence padded text comes last. A row of length 0 gives 0 and passes no
    gradient. Queries have no lengths: those of padding attend to the same keys as all.

    `auto` takes cuDNN flash attention on NVIDIA GPUs (Ampere or later, 16-bit types), splash
    attention on TPUs, our chunked loop on CPUs and plain matmuls for all that these do not do:
    short sequences on a CPU, and `bias` or, except for cuDNN, `causal`. An `implementation` that is
    a function is called with (q, k, v, key_lengths).
    Raises ValueError if a named implementation or a function cannot do what is asked.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    plain = not causal and bias is None
    if implementation == "auto" and plain:
        implementation = _STAND_IN.get() or implementation
    if implementation == "auto":
        implementation = fastest(q, k, causal=causal, plain=plain)
    if callable(implementation):
        if not plain or scale is not None:
            raise ValueError("attention by a function takes no bias, causal mask or scale")
        attend = implementation
    elif implementation == "xla":
        attend = partial(plain_attention, causal=causal, bias=bias, scale=factor)
    elif implementation == "cudnn" and bias is None:
        attend = partial(_cudnn_kernel, causal, factor)
        attend = attend if key_lengths is None else _spread(attend)
    elif not plain:
        raise ValueError(f"{implementation} attention takes no bias and no causal mask here")
    elif implementation == "splash":
        # Pallas is slow to import, and only TPUs need it.
        from fluxjax.models.splash_attention import splash_attention

        attend = _spread(partial(_scaled, splash_attention, factor))
    else:
        attend = _spread(partial(_scaled, chunked_attention, factor))
    if key_lengths is None:
        return attend(q, k, v, None)
    # No softmax over nothing, in no kernel; such rows are cleared afterwards.
    out = attend(q, k, v, jnp.maximum(key_lengths, 1))
    return jnp.where(key_lengths[:, None, None, None] > 0, out, jnp.zeros((), out.dtype))


def _spread(attend: Kernel) -> Kernel:
    spread = _SPREAD.get()
    return attend if spread is None else partial(spread, attend)


def _scaled(
    attend: Any, scale: float, q: Array, k: Array, v: Array, key_lengths: Array | None
) -> Array:
    # custom_vjp takes its arguments by position.
    return attend(q, k, v, key_lengths, scale)


def _cudnn_kernel(
    causal: bool, scale: float, q: Array, k: Array, v: Array, key_lengths: Array | None
) -> Array:
    if key_lengths is not None:
        key_lengths = jnp.minimum(key_lengths, k.shape[1]).astype(jnp.int32)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )


def plain_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    causal: bool = False,
    bias: Float[Array, "#b #heads l m"] | None = None,
    scale: float,
) -> Float[Array, "b l heads k"]:
    """Two matmuls around a softmax, of at least one key; what the others must equal."""
    einsum = partial(jnp.einsum, precision=own_precision(q.dtype))
    logits = einsum("blhk,bmhk->bhlm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias
    if causal:
        mask = jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None]
        logits = jnp.where(mask, logits, -jnp.inf)
    if key_lengths is not None:
        real = jnp.arange(k.shape[1])[None] < key_lengths[:, None]
        logits = jnp.where(real[:, None, None, :], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return einsum("bhlm,bmhk->blhk", weights, v)


def fastest(
    q: Array, k: Array, *, causal: bool = False, plain: bool = True
) -> Literal["cudnn", "splash", "chunked", "xla"]:
    """What `auto` takes; `plain`: neither causal nor with a bias."""
    where, sixteen_bit = platform(), q.dtype in (jnp.bfloat16, jnp.float16)
    head_dim = q.shape[-1]
    fits = sixteen_bit and head_dim % 8 == 0 and head_dim <= 128
    if where == "cuda" and (plain or causal) and fits and _ampere_or_later():
        return "cudnn"
    if where == "tpu" and plain and head_dim in (64, 128, 256):
        return "splash"
    if where == "cpu" and plain and q.shape[1] * k.shape[1] >= _CHUNKED_FROM:
        return "chunked"
    return "xla"


def platform() -> str:
    """`cpu`, `tpu`, `cuda` or another GPU's name: where a function traced now will run."""
    device = _device()
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"


def _device() -> jax.Device:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.devices(device)[0] if isinstance(device, str) else device or jax.devices()[0]


def _ampere_or_later() -> bool:
    """Whether cuDNN has flash attention for the GPU: not for a T4 or a V100."""
    return int(_device().compute_capability.split(".")[0]) >= 8
