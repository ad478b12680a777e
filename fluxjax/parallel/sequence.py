"""Attention over tokens that are split over the mesh's `sequence` axis.

Each device holds its part of the text and its part of the image, one after the other. Attention
does not mind the order of tokens once each is rotated by its own position, so only attention moves
anything:

- ulysses: all-to-all from all heads of some tokens to some heads of all tokens, and back
  (Jacobs et al. 2023, DeepSpeed Ulysses). The number of heads must divide.
- ring: keys and values go round, each device keeps what its queries have seen of them
  (Liu et al. 2023, Ring attention). Any number of heads; no device sees all keys at once.
- both (Fang and Zhao 2024, USP): ulysses among neighbours, and a ring of such groups. A device
  sends less than in a ring alone, and there may be more devices than heads.

Lengths that do not divide are padded at their end. Padded keys never enter a softmax. No logits are
written: a step of the ring runs the kernels of `models.block_attention`.

Key lengths count in the joint order of tokens, not in that of the devices. They need the text last:
the padding of text that comes first lies in the middle of the joint sequence.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fluxjax.config import ConfigError
from fluxjax.config.choices import SequenceAttention
from fluxjax.models.attention import AttentionKind, Kernel, dot_product_attention
from fluxjax.models.block_attention import (
    Attended,
    attend_block,
    block_gradients,
    nothing_attended,
)

AXIS = "sequence"


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
    layout: Layout,
    heads: int,
    kind: SequenceAttention,
    implementation: AttentionKind,
    tensor: int = 1,
) -> Kernel:
    """Attention of one device's tokens, for use inside a shard_map over `sequence`.

    `implementation` is what runs on a device's heads, `tensor` over how many devices heads are
    split besides. See `group_size` for errors.
    """
    group = group_size(layout.devices, heads, kind, tensor)
    return partial(split_attention, layout=layout, group=group, implementation=implementation)


def group_size(devices: int, heads: int, kind: SequenceAttention, tensor: int = 1) -> int:
    """Devices among which ulysses shares out heads; around such groups there is a ring.

    `auto` takes the largest that divides heads, and those of one part of `tensor` where they
    divide by it. Raises ConfigError where heads or devices do not divide.
    """
    if kind == "auto":
        return math.gcd(devices, heads if heads % tensor else heads // tensor)
    if kind == "ring":
        return 1
    size = devices if kind == "ulysses" else int(kind.removeprefix("ulysses="))
    if devices % size:
        raise ConfigError(
            f"{kind} cannot be groups of sequence={devices}: {size} does not divide {devices}"
        )
    if heads % size:
        raise ConfigError(
            f"ulysses cannot split {heads} heads over {AXIS}={size}: "
            "take a number that divides, ring or auto, which takes both"
        )
    return size


def split_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b l heads k"],
    v: Float[Array, "b l heads k"],
    key_lengths: Int[Array, " b"] | None = None,
    *,
    layout: Layout,
    group: int,
    implementation: AttentionKind = "auto",
) -> Float[Array, "b l heads k"]:
    """Ulysses in groups of so many devices, and a ring of the groups.

    Raises ConfigError for key lengths where the text comes first.
    """
    layout.check_key_lengths(key_lengths)
    b, _, heads, width = q.shape
    over: Any = None  # all devices
    if group < layout.devices:
        over = np.arange(layout.devices).reshape(-1, group).tolist()
    exchange = partial(jax.lax.all_to_all, axis_name=AXIS, axis_index_groups=over, tiled=True)

    def gather(x: Array) -> Array:
        # Device s takes heads s, s + group, ...: heads that are also split over `tensor`, in
        # contiguous runs, then stay where they are.
        x = x.reshape(b, x.shape[1], heads // group, group, width)
        return exchange(x, split_axis=3, concat_axis=1)[:, :, :, 0]

    if group > 1:
        q, k, v = gather(q), gather(k), gather(v)
    attend = _all_keys if group == layout.devices else _around
    out = attend(q, k, v, key_lengths, layout, group, implementation)
    if group > 1:
        out = exchange(out[:, :, :, None], split_axis=1, concat_axis=3)
    return out.reshape(b, -1, heads, width)


def _all_keys(
    q: Array,
    k: Array,
    v: Array,
    key_lengths: Array | None,
    layout: Layout,
    group: int,
    implementation: AttentionKind,
) -> Array:
    """Of queries and keys of all devices."""
    real = layout.positions().reshape(-1) >= 0
    if key_lengths is not None:
        k, v = (layout.in_order(x, layout.text + layout.image) for x in (k, v))
    elif not real.all():
        # Keys without padding: exact, and any implementation will do.
        k, v = (jnp.take(x, np.flatnonzero(real), axis=1) for x in (k, v))
    return dot_product_attention(q, k, v, key_lengths=key_lengths, implementation=implementation)


def _around(
    q: Array,
    k: Array,
    v: Array,
    key_lengths: Array | None,
    layout: Layout,
    group: int,
    implementation: AttentionKind,
) -> Array:
    """Of queries of one group and the keys of all groups, one after the other."""
    ring = Ring(layout.devices // group, group, implementation)
    places = layout.positions().reshape(ring.groups, -1)
    padded = bool((places < 0).any())
    places = np.where(places < 0, np.iinfo(np.int32).max, places).astype(np.int32)
    if not padded and key_lengths is None:
        return ring_attention(q, k, v, None, ring)
    # In their joint order: what is seen of a group's keys is then so many from the start.
    order = jnp.asarray(np.argsort(places, axis=1, kind="stable"))[ring.here()]
    k, v = (jnp.take(x, order, axis=1) for x in (k, v))
    if key_lengths is None:
        key_lengths = jnp.full(q.shape[0], layout.text + layout.image, jnp.int32)
    seen = jnp.asarray(places)[:, None] < key_lengths[None, :, None]
    return ring_attention(q, k, v, seen.sum(axis=2, dtype=jnp.int32), ring)


class Ring(NamedTuple):
    """`groups` of so many devices; device i of a group sends to device i of the next."""

    groups: int
    group: int
    implementation: AttentionKind

    def here(self) -> Array:
        """This device's group."""
        return jax.lax.axis_index(AXIS) // self.group

    def passed_on(self, tree: Any) -> Any:
        """What the device of the group before has."""
        devices = self.groups * self.group
        steps = [(i, (i + self.group) % devices) for i in range(devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, steps), tree)

    def around(self, visit: Any, carry: Any, keys: Any) -> Any:
        """`carry = visit(carry, keys, group)` for the keys of every group, this device's first.

        The next keys are on their way meanwhile. Each device sends its own `groups` - 1 times.
        """

        def step(held: tuple[Any, Any], number: Array) -> tuple[tuple[Any, Any], None]:
            carry, keys = held
            following = self.passed_on(keys)
            return (visit(carry, keys, (self.here() - number) % self.groups), following), None

        (carry, keys), _ = jax.lax.scan(step, (carry, keys), jnp.arange(self.groups - 1))
        return visit(carry, keys, (self.here() + 1) % self.groups)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    q: Float[Array, "b l heads k"],
    k: Float[Array, "b m heads k"],
    v: Float[Array, "b m heads k"],
    key_lengths: Int[Array, "groups b"] | None,
    ring: Ring,
) -> Float[Array, "b l heads k"]:
    """softmax(q k^T / sqrt(k)) v over the keys of all groups, of each the first so many.

    Each row must have a key. Backwards keys and values go round once more, their gradients with
    them.
    """
    return _attended(q, k, v, key_lengths, ring).out.astype(q.dtype)


def _attended(q: Array, k: Array, v: Array, key_lengths: Array | None, ring: Ring) -> Attended:
    def visit(seen: Attended, keys: tuple[Array, Array], place: Array) -> Attended:
        lengths = None if key_lengths is None else key_lengths[place]
        return seen.joined(attend_block(q, *keys, lengths, ring.implementation))

    return ring.around(visit, nothing_attended(q), (k, v))


def _ring_forward(q: Array, k: Array, v: Array, key_lengths: Array | None, ring: Ring) -> Any:
    attended = _attended(q, k, v, key_lengths, ring)
    attended = attended._replace(out=attended.out.astype(q.dtype))
    return attended.out, (q, k, v, key_lengths, attended)


def _ring_backward(ring: Ring, saved: Any, grad: Array) -> tuple[Any, ...]:
    q, k, v, key_lengths, attended = saved

    def visit(gradients: Any, keys: tuple[Array, Array], place: Array) -> Any:
        dq, *dkeys = gradients
        lengths = None if key_lengths is None else key_lengths[place]
        more = block_gradients(q, *keys, lengths, attended, grad)
        dq, *dkeys = (total + one for total, one in zip((dq, *dkeys), more, strict=True))
        # They go where their keys go, and from the last group home.
        return (dq, *ring.passed_on(dkeys))

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = ring.around(visit, zeros, (k, v))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring_attention.defvjp(_ring_forward, _ring_backward)
