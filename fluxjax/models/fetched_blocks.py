"""Blocks whose kernels lie in the host's memory, stacked: each is fetched while the one before it
computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

EACH = 0
"""An argument of blocks with a leading axis of layers."""


def on_host(leaf: Any) -> bool:
    """Whether an array lies in the host's memory, also while it is traced."""
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def fetched(leaf: Any) -> Any:
    """An array on the device, copied there if it lies in the host's memory."""
    return jax.device_put(leaf, jax.memory.Space.Device) if on_host(leaf) else leaf


def run_fetched(
    blocks: nn.Module, block: type[nn.Module], carry: Any, *arguments: Any
) -> tuple[Any, Any]:
    """What `blocks`, scanned instances of `block`, return; two blocks' kernels are on the device.

    A turn of the loop runs two blocks: while the first computes with the kernels that the turn
    before it fetched, those of the second arrive, and then, in the place of the first's, those of
    the next turn. With one block in a turn XLA has a single place for the kernels that are carried:
    it begins the copy when they have been used.
    """
    leaves, structure = jax.tree.flatten(dict(blocks.variables))
    axes: Sequence[Any] = getattr(block, "axes")  # noqa: B009
    one, count = _single(blocks, block), leaves[0].shape[0]

    def compute(i: Any, held: dict[int, Any], carry: Any) -> tuple[Any, Any]:
        mine = [held[j] if j in held else _layer(leaf, i) for j, leaf in enumerate(leaves)]
        pairs = zip(arguments, axes, strict=True)
        given = [_layer(argument, i) if axis == EACH else argument for argument, axis in pairs]
        return one.apply(jax.tree.unflatten(structure, mine), carry, *given)

    def fetch(i: Any) -> dict[int, Any]:
        return {j: fetched(_layer(leaves[j], i)) for j in read}

    def turn(state: tuple[Any, dict[int, Any]], i: Any) -> tuple[Any, Any]:
        carry, held = state
        second = fetch(i + 1)
        carry, kept = compute(i, held, carry)
        coming = fetch(i + 2)
        carry, kept_second = compute(i + 1, second, carry)
        return (carry, coming), _stacked([kept, kept_second])

    shapes = {
        j: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        for j, leaf in enumerate(leaves)
        if on_host(leaf)
    }
    read = _read(lambda held: compute(0, held, carry), shapes)
    in_turns = (count - 1) // 2 * 2
    (carry, held), kept = lax.scan(turn, (carry, fetch(0)), jnp.arange(0, in_turns, 2))
    each = [jax.tree.map(lambda leaf: leaf.reshape(in_turns, *leaf.shape[2:]), kept)]
    for i in range(in_turns, count):
        coming = fetch(i + 1) if i + 1 < count else {}
        carry, kept = compute(i, held, carry)
        held = coming
        each.append(_stacked([kept]))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *each)


def _single(blocks: nn.Module, block: type[nn.Module]) -> nn.Module:
    options = {field.name: getattr(blocks, field.name) for field in dataclasses.fields(blocks)}
    return block(**{**options, "parent": None, "name": None})


def _stacked(each: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _layer(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)


def _read(function: Callable[[dict[int, Any]], Any], shapes: dict[int, Any]) -> list[int]:
    """Those of its arrays that the function reads: a block's call reads no kernels of its
    modulation."""
    traced = jax.make_jaxpr(function)(shapes).jaxpr
    read = {id(variable) for step in traced.eqns for variable in step.invars}
    return [j for j, variable in zip(shapes, traced.invars, strict=True) if id(variable) in read]
