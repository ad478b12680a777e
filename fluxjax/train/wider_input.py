"""A transformer's first layer with more inputs than its weights have: those begin at zero, so that
the model draws as before until it has learnt to read them.

As FLUX.1 Control's LoRA does it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fluxjax.models.names import flatten, unflatten
from fluxjax.networks import network_of
from fluxjax.train.step import Tree


def added_inputs(base: Any, config: Any) -> dict[str, int]:
    """How many the first layer gets, by its name; empty where it gets none."""
    layer, field = network_of(config).widened
    if not layer:
        return {}
    more = getattr(config, field) - getattr(base, field)
    return {layer: more} if more else {}


def widen(params: Tree, base: Any, config: Any) -> Tree:
    """`params` of `base` with rows of zeros below the first layer's kernel, as `config` has it."""
    flat = flatten(params)
    for layer, more in added_inputs(base, config).items():
        kernel = flat[layer, "kernel"]
        rows = partial(jnp.pad, pad_width=((0, more), (0, 0)))
        # On a mesh its rows are whole on each device, so that there may be more of them.
        flat[layer, "kernel"] = jax.jit(rows, out_shardings=kernel.sharding)(kernel)
    return unflatten(flat)
