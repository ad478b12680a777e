"""Parameters of repeated blocks: one subtree per block, or one subtree with a leading layer axis.

Scanned modules expect the stacked form; files, and modules that run block by block, the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.config import FluxConfig

# FLUX's two kinds of blocks, a ControlNet's ends of them, an IP-Adapter's part of each, T5's
# blocks, CLIP's layers.
GROUPS = (
    "transformer_blocks",
    "single_transformer_blocks",
    "controlnet_blocks",
    "controlnet_single_blocks",
    "ip_adapter",
    "block",
    "layers",
)
_MEMBER = re.compile(rf"({'|'.join(GROUPS)})_(\d+)")


_UNROLLED = 12  # more blocks than this are scanned, so that compiling takes seconds


def scan_by_default(config: FluxConfig) -> bool:
    """Whether a transformer's blocks are scanned where nobody says: on CPUs only many of them.

    There few blocks run 1.3 times faster if each is compiled for itself.
    """
    many = config.num_layers + config.num_single_layers > _UNROLLED
    return many or jax.default_backend() != "cpu"


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """`name_0`, `name_1`, ... become `name`, whose leaves carry a leading layer axis.

    Leaves are numpy or jax arrays or `jax.ShapeDtypeStruct`. Stacked trees pass unchanged.
    Raises ValueError if the numbers of a group are not 0 ... n - 1.
    """
    stacked: dict[str, Any] = {}
    groups: dict[str, dict[int, Any]] = {}
    for name, value in params.items():
        if match := _MEMBER.fullmatch(name):
            groups.setdefault(match[1], {})[int(match[2])] = value
        else:
            stacked[name] = stack_layers(value) if isinstance(value, Mapping) else value
    for name, members in groups.items():
        if sorted(members) != list(range(len(members))):
            raise ValueError(
                f"the layers of {name!r} must be numbered 0 to {len(members) - 1}, "
                f"got {sorted(members)}"
            )
        ordered = [members[i] for i in range(len(members))]
        stacked[name] = jax.tree.map(lambda *leaves: _stack(leaves), *ordered)
    return stacked


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`; trees that are not stacked pass unchanged."""
    split: dict[str, Any] = {}
    for name, value in params.items():
        if name in GROUPS and isinstance(value, Mapping):
            count = jax.tree.leaves(value)[0].shape[0]
            for i in range(count):
                split[f"{name}_{i}"] = jax.tree.map(lambda leaf, i=i: _take(leaf, i), value)
        else:
            split[name] = unstack_layers(value) if isinstance(value, Mapping) else value
    return split


def _stack(leaves: tuple) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    return np.stack(leaves) if isinstance(first, np.ndarray) else jnp.stack(leaves)


def _take(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[i]
