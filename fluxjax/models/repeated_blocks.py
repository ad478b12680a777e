"""Equal blocks, one after the other: each compiled by itself, or all scanned over stacked weights.

A block is called with a carry and further arguments and returns (carry, what it keeps); its class
names in `axes` which of the arguments have a leading axis of layers. `modulation(None, vector)`,
where it has one, returns (None, what the block takes from the conditioning vector). See
`fluxjax.models.stacking` for the two forms of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.config.choices import Remat
from fluxjax.models.dense import COLLECTION
from fluxjax.models.fetched_blocks import EACH, on_host, run_fetched

BROADCAST = nn.broadcast
"""An argument that every block is given whole."""


def repeated(
    block: Any, build: Callable[[Any], nn.Module], count: int, *, scan: bool, remat: Remat
) -> Any:
    """The blocks, a list or one scanned module, for an attribute in `setup`.

    `build` makes a module of a class: `block`'s, or what scanning and rematerialising make of it.
    `remat`: what the backward pass computes again of each block: nothing, all but the dense layers'
    outputs (dots), or all (full).
    """
    axes = block.axes
    block = rematerialised(block, remat, prevent_cse=not scan)
    if not scan or count == 0:
        return [build(block) for _ in range(count)]
    shared = {
        "variable_axes": {"params": 0, COLLECTION: 0},
        "split_rngs": {"params": True},
        "length": count,
    }
    methods = {"__call__": {**shared, "in_axes": axes}}
    if hasattr(block, "modulation"):
        methods["modulation"] = {**shared, "in_axes": BROADCAST}
    scanned = nn.scan(block, methods=methods)
    scanned.block = block
    return build(scanned)


def rematerialised(block: Any, remat: Remat, *, prevent_cse: bool = True) -> Any:
    """A block's class, of which the backward pass computes that again."""
    if remat == "none":
        return block
    # Products of weights have no batch axes, those of attention do.
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(block, prevent_cse=prevent_cse, policy=saved if remat == "dots" else None)


def run(blocks: Any, carry: Any, *arguments: Any) -> tuple[Any, Any]:
    """The last carry, and what the blocks kept, each leaf with a leading axis of layers."""
    if not isinstance(blocks, Sequence):
        if any(map(on_host, jax.tree.leaves(blocks.variables))):
            return run_fetched(blocks, blocks.block, carry, *arguments)
        return blocks(carry, *arguments)
    if not blocks:
        return carry, None
    kept = []
    for i, block in enumerate(blocks):
        mine = [
            jax.tree.map(lambda leaf, i=i: leaf[i], argument) if axis == EACH else argument
            for argument, axis in zip(arguments, block.axes, strict=True)
        ]
        carry, each = block(carry, *mine)
        kept.append(each)
    return carry, _stacked(kept)


def modulations_of(blocks: Any, vector: Float[Array, "n d"]) -> Any:
    """What each block takes from the conditioning vector, with a leading axis of layers."""
    if not isinstance(blocks, Sequence):
        return blocks.modulation(None, vector)[1]
    return _stacked([block.modulation(None, vector)[1] for block in blocks]) if blocks else None


def _stacked(each: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def by_steps(modulations: Any, steps: int) -> Any:
    """Leaves (..., pictures times steps, parts, d) -> (steps, ..., pictures, parts, d).

    Pictures lie outside steps: a batch that is split over devices stays where it is.
    """

    def split(leaf: Array) -> Array:
        leaf = leaf.reshape(*leaf.shape[:-3], -1, steps, *leaf.shape[-2:])
        return jnp.moveaxis(leaf, -3, 0)

    return jax.tree.map(split, modulations)
