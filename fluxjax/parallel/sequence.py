"""Attention over tokens that are split over the mesh's `sequence` axis.

Each device holds its part of the text and its part of the image, one after the other. Attention
does not mind the order of tokens once each is rotated by its own position, so only attention moves
anything:

- ulysses: all-to-all from all heads of some tokens to some heads of all tokens, and back
  (Jacobs et al. 2023, DeepSpeed Ulysses). The number of heads must divide.
- ring: keys and values go round, each device keeps a running softmax of its own queries
  (Liu et al. 2023, Ring attention). Any number of heads; no device sees all keys at once.

Lengths that do not divide are padded at their end. Padded keys never enter a softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.config import ConfigError
from fluxjax.models.attention import Attention, dot_product_attention

SequenceAttention = Literal["auto", "ulysses", "ring"]
AXIS = "sequence"


class Layout(NamedTuple):
    """How a joint sequence of `text` and `image` tokens lies on `devices`."""

    text: int
    image: int
    devices: int

    @property
    def parts(self) -> tuple[int, int]:
        """Text and image tokens on each device, padding included."""
        return -(-self.text // self.devices), -(-self.image // self.devices)

    def real(self) -> np.ndarray:
        """(devices, tokens on each): True where a token is no padding."""
        text, image = self.parts
        places = np.arange(self.devices)[:, None]
        return np.concatenate(
            [
                places * text + np.arange(text)[None] < self.text,
                places * image + np.arange(image)[None] < self.image,
            ],
            axis=1,
        )

    def in_order(self, x: Array, tokens: int) -> Array:
        """`x` (b, devices times tokens on each, ...) with its `tokens` alone, as without a mesh.

        `tokens` is `text`, `image` or, of the joint sequence, their sum: text first again.
        """
        if tokens != self.text + self.image:
            return x[:, :tokens]
        text, _ = self.parts
        real = self.real()
        places = np.arange(real.size).reshape(real.shape)
        order = [places[:, part][real[:, part]] for part in (slice(text), slice(text, None))]
        return jnp.take(x, np.concatenate(order), axis=1)


def attention_over(
    layout: Layout, heads: int, kind: SequenceAttention, implementation: Attention
) -> Callable[..., Array]:
    """`attention(q, k, v)` of one device's tokens, for use inside a shard_map over `sequence`.

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
    *,
    layout: Layout,
    implementation: Attention = "auto",
) -> Float[Array, "b l heads k"]:
    b, _, heads, width = q.shape
    parts = layout.devices

    def gather(x: Array) -> Array:
        # Device s takes heads s, s + parts, ...: heads that are also split over `tensor`, in
        # contiguous runs, then stay where they are.
        x = x.reshape(b, x.shape[1], heads // parts, parts, width)
        x = jax.lax.all_to_all(x, AXIS, split_axis=3, concat_axis=1, tiled=True)
        return x[:, :, :, 0]

    q, k, v = gather(q), gather(k), gather(v)
    real = layout.real().reshape(-1)
    if not real.all():
        # Keys without padding: exact, and any implementation will do.
        k, v = (jnp.take(x, np.flatnonzero(real), axis=1) for x in (k, v))
    out = dot_product_attention(q, k, v, implementation=implementation)[:, :, :, None]
    out = jax.lax.all_to_all(out, AXIS, split_axis=1, concat_axis=3, tiled=True)
    return out.reshape(b, -1, heads, width)


def ring_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b l heads k"],
    v: Float[Array, "b l heads k"],
    *,
    layout: Layout,
) -> Float[Array, "b l heads k"]:
    devices, real = layout.devices, layout.real()
    ring = [(i, (i + 1) % devices) for i in range(devices)]
    here = jax.lax.axis_index(AXIS)
    scale = q.shape[-1] ** -0.5

    # Logits are recomputed in the backward pass; only keys and values are kept.
    @jax.checkpoint
    def attend(running: Any, k: Array, v: Array, bias: Array | None) -> Any:
        highest, total, out = running
        logits = jnp.einsum("blhk,bmhk->bhlm", q, k, preferred_element_type=jnp.float32) * scale
        if bias is not None:
            logits = logits + bias[None, None, None, :]
        higher = jnp.maximum(highest, jax.lax.stop_gradient(logits.max(-1)))
        weights, decay = jnp.exp(logits - higher[..., None]), jnp.exp(highest - higher)
        values = jnp.einsum(
            "bhlm,bmhk->bhlk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return higher, total * decay + weights.sum(-1), out * decay[..., None] + values

    b, length, heads, width = q.shape
    # Finite, so that a block of nothing but padding leaves no NaN; the blocks after it decay it.
    lowest = jnp.finfo(jnp.float32).min / 2
    running = (
        jnp.full((b, heads, length), lowest),
        jnp.zeros((b, heads, length)),
        jnp.zeros((b, heads, length, width)),
    )
    # Padding weighs nothing, not even to the last bit: exp(-inf) is 0.
    biases = np.where(real, 0.0, -np.inf).astype(np.float32)
    for step in range(devices):
        if step:
            k, v = (jax.lax.ppermute(x, AXIS, ring) for x in (k, v))
        source = (here - step) % devices
        bias = None if real.all() else jnp.asarray(biases)[source]
        running = attend(running, k, v, bias)
    _, total, out = running
    return jnp.swapaxes(out / total[..., None], 1, 2).astype(q.dtype)
