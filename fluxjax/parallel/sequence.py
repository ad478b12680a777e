"""Attention over tokens that are split over the mesh's `sequence` axis.

Each device holds its part of the text and its part of the image, one after the other. Attention
does not mind the order of tokens once each is rotated by its own position, so only attention moves
anything:

- ulysses: all-to-all from all heads of some tokens to some heads of all tokens, and back
  (Jacobs et al. 2023, DeepSpeed Ulysses). The number of heads must divide.
- ring: keys and values go round, each device keeps a running softmax of its own queries
  (Liu et al. 2023, Ring attention). Any number of heads; no device sees all keys at once.

Lengths that do not divide are padded at their end. Padded keys never enter a softmax.

Key lengths count in the joint order of tokens, not in that of the devices. They need the text last:
the padding of text that comes first lies in the middle of the joint sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fluxjax.config import ConfigError
from fluxjax.config.choices import SequenceAttention
from fluxjax.models.attention import AttentionKind, Kernel, dot_product_attention
from fluxjax.models.products import own_precision

AXIS = "sequence"

# Logits that a device holds at a time in the ring, of all its pictures and heads: 256 MB.
_RING_LOGITS = 2**26


class Layout(NamedTuple):
    """How a joint sequence of `text` and `image` tokens lies on `devices`.

    In it and on each device text comes first, or, with `text_last`, the image.
    """

    text: int
    image: int
    devices: int
    text_last: bool = False

    @property
    def parts(self) -> tuple[int, int]:
        """Text and image tokens on each device, padding included."""
        return -(-self.text // self.devices), -(-self.image // self.devices)

    def positions(self) -> np.ndarray:
        """(devices, tokens on each): where a token stands in the joint sequence, -1 for padding."""
        counts, parts = (self.text, self.image), self.parts
        first = 0
        columns = []
        for i in (1, 0) if self.text_last else (0, 1):
            places = np.arange(self.devices * parts[i]).reshape(self.devices, parts[i])
            columns.append(np.where(places < counts[i], first + places, -1))
            first += counts[i]
        return np.concatenate(columns, axis=1)

    def order(self) -> np.ndarray:
        """(text + image,): which of the devices' tokens, one device after the other, comes next."""
        positions = self.positions().reshape(-1)
        return np.argsort(positions, kind="stable")[np.count_nonzero(positions < 0) :]

    def in_order(self, x: Array, tokens: int) -> Array:
        """`x` (b, devices times tokens on each, ...) with its `tokens` alone, as without a mesh.

        `tokens` is `text`, `image` or, of the joint sequence, their sum.
        """
        if tokens != self.text + self.image:
            return x[:, :tokens]
        return jnp.take(x, self.order(), axis=1)

    def check_key_lengths(self, key_lengths: Array | None) -> None:
        """Raises ConfigError where key lengths cannot say what is padding."""
        if key_lengths is not None and not self.text_last:
            raise ConfigError(
                "key lengths need the text last in the joint sequence: the padding of text that "
                "comes first lies in its middle"
            )


def attention_over(
    layout: Layout, heads: int, kind: SequenceAttention, implementation: AttentionKind
) -> Kernel:
    """Attention of one device's tokens, for use inside a shard_map over `sequence`.

    `implementation` is what ulysses runs on its heads. Raises ConfigError where heads do not divide
    for ulysses; `auto` then takes the ring.
    """
    if kind == "auto":
        kind = "ring" if heads % layout.devices else "ulysses"
    if kind == "ring":
        return partial(ring_attention, layout=layout)
    if heads % layout.devices:
        raise ConfigError(
            f"ulysses cannot split {heads} heads over sequence={layout.devices}: "
            "take a number that divides, or ring"
        )
    return partial(ulysses_attention, layout=layout, implementation=implementation)


def ulysses_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b l heads k"],
    v: Float[Array, "b l heads k"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    layout: Layout,
    implementation: AttentionKind = "auto",
) -> Float[Array, "b l heads k"]:
    """Raises ConfigError for key lengths where the text comes first."""
    layout.check_key_lengths(key_lengths)
    b, _, heads, width = q.shape
    parts = layout.devices

    def gather(x: Array) -> Array:
        # Device s takes heads s, s + parts, ...: heads that are also split over `tensor`, in
        # contiguous runs, then stay where they are.
        x = x.reshape(b, x.shape[1], heads // parts, parts, width)
        x = jax.lax.all_to_all(x, AXIS, split_axis=3, concat_axis=1, tiled=True)
        return x[:, :, :, 0]

    q, k, v = gather(q), gather(k), gather(v)
    real = layout.positions().reshape(-1) >= 0
    if key_lengths is not None:
        k, v = (layout.in_order(x, layout.text + layout.image) for x in (k, v))
    elif not real.all():
        # Keys without padding: exact, and any implementation will do.
        k, v = (jnp.take(x, np.flatnonzero(real), axis=1) for x in (k, v))
    out = dot_product_attention(q, k, v, key_lengths=key_lengths, implementation=implementation)
    out = out[:, :, :, None]
    out = jax.lax.all_to_all(out, AXIS, split_axis=1, concat_axis=3, tiled=True)
    return out.reshape(b, -1, heads, width)


def ring_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b l heads k"],
    v: Float[Array, "b l heads k"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    layout: Layout,
) -> Float[Array, "b l heads k"]:
    """Logits of some queries at a time. Raises ConfigError for key lengths where text is first."""
    layout.check_key_lengths(key_lengths)
    b, length, heads, width = q.shape
    here = jax.lax.axis_index(AXIS)
    padding_bias = _padding_bias(layout.positions(), key_lengths)
    ring = [(i, (i + 1) % layout.devices) for i in range(layout.devices)]
    q, chunks = _query_chunks(q)
    size = q.shape[-3]
    # Finite, so that a block of nothing but padding leaves no NaN; the blocks after it decay it.
    lowest = jnp.finfo(jnp.float32).min / 2
    running: Any = (
        jnp.full((*chunks, b, heads, size), lowest),
        jnp.zeros((*chunks, b, heads, size)),
        jnp.zeros((*chunks, b, heads, size, width)),
    )
    for step in range(layout.devices):
        if step:
            k, v = (jax.lax.ppermute(x, AXIS, ring) for x in (k, v))
        bias = padding_bias((here - step) % layout.devices)
        if chunks:
            attend = partial(_attend_chunk, k=k, v=v, bias=bias)
            running = jax.lax.map(attend, (running, q))
        else:
            running = _attend_block(running, q, k, v, bias)
    _, total, out = running
    out = jnp.swapaxes(out / total[..., None], -3, -2).astype(q.dtype)
    if chunks:
        out = jnp.moveaxis(out, 0, 1).reshape(b, -1, heads, width)[:, :length]
    return out


def _query_chunks(q: Float[Array, "b l heads k"]) -> tuple[Array, tuple[int, ...]]:
    """`q`, or (chunks, b, queries of one, heads, k) where its logits would be too many."""
    b, length, heads, width = q.shape
    number = -(-length // max(1, _RING_LOGITS // (b * heads * length)))
    if number == 1:
        return q, ()
    size = -(-length // number)
    q = jnp.pad(q, ((0, 0), (0, number * size - length), (0, 0), (0, 0)))
    return jnp.moveaxis(q.reshape(b, number, size, heads, width), 1, 0), (number,)


def _padding_bias(
    positions: np.ndarray, key_lengths: Array | None
) -> Callable[[Array], Array | None]:
    """device -> what is added to the logits of its keys: (tokens,), (b, tokens) or nothing.

    Padding weighs nothing, not even to the last bit: exp(-inf) is 0.
    """
    real = positions >= 0
    if key_lengths is not None:
        places = np.where(real, positions, np.iinfo(np.int32).max).astype(np.int32)
        ends = key_lengths[:, None]
        return lambda device: jnp.where(jnp.asarray(places)[device][None] < ends, 0.0, -jnp.inf)
    if real.all():
        return lambda device: None
    biases = np.where(real, 0.0, -np.inf).astype(np.float32)
    return lambda device: jnp.asarray(biases)[device]


# Logits are recomputed in the backward pass; only keys and values are kept.
@jax.checkpoint
def _attend_block(running: Any, q: Array, k: Array, v: Array, bias: Array | None) -> Any:
    """(highest logit, sum of weights, weighted sum) of queries, with the keys of one more block."""
    highest, total, out = running
    scale = q.shape[-1] ** -0.5
    einsum = partial(
        jnp.einsum, precision=own_precision(q.dtype), preferred_element_type=jnp.float32
    )
    logits = einsum("blhk,bmhk->bhlm", q, k) * scale
    if bias is not None:
        logits = logits + jnp.expand_dims(bias, tuple(range(bias.ndim - 1, 3)))
    higher = jnp.maximum(highest, jax.lax.stop_gradient(logits.max(-1)))
    weights, decay = jnp.exp(logits - higher[..., None]), jnp.exp(highest - higher)
    values = einsum("bhlm,bmhk->bhlk", weights.astype(v.dtype), v)
    return higher, total * decay + weights.sum(-1), out * decay[..., None] + values


def _attend_chunk(chunk: tuple[Any, Array], k: Array, v: Array, bias: Array | None) -> Any:
    return _attend_block(*chunk, k, v, bias)
