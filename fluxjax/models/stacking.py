"""Parameters of repeated blocks: one subtree per block, or one subtree with a leading layer axis.

Scanned modules expect the stacked form; files, and modules that run block by block, the other.
Where not all blocks of a group are alike, each run of equal ones is a subtree of its own: of
`transformer_blocks`, `transformer_blocks_0_to_12`, `transformer_blocks_13_to_22` and, alone and so
without a layer axis, `transformer_blocks_23`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
_STACK = re.compile(rf"({'|'.join(GROUPS)})(?:_(\d+)_to_\d+)?")


_UNROLLED = 12  # more blocks than this are scanned, so that compiling takes seconds


def scan_by_default(blocks: int) -> bool:
    """Whether so many equal blocks are scanned where nobody says: on CPUs only many of them.

    There few blocks run 1.3 times faster if each is compiled for itself.
    """
    return blocks > _UNROLLED or jax.default_backend() != "cpu"


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
        for key, blocks in named_runs(name, [_form(block) for block in ordered]).items():
            run = [ordered[i] for i in blocks]
            stacked[key] = jax.tree.map(lambda *x: _stack(x), *run) if stack_of(key) else run[0]
    return stacked


def named_runs(group: str, kinds: Sequence[Any]) -> dict[str, range]:
    """The subtrees of a group whose blocks are of these kinds, and which blocks each holds."""
    ends = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    runs = [range(*pair) for pair in itertools.pairwise([0, *ends, len(kinds)])]
    if len(runs) == 1:
        return {group: runs[0]}
    return {
        f"{group}_{run[0]}" if len(run) == 1 else f"{group}_{run[0]}_to_{run[-1]}": run
        for run in runs
    }


def _form(block: Any) -> Any:
    leaves, structure = jax.tree.flatten(block)
    return structure, [leaf.shape for leaf in leaves]


def stack_of(key: str) -> tuple[str, int] | None:
    """The group, and the number of its first block, of a key whose leaves have a layer axis."""
    match = _STACK.fullmatch(key)
    return (match[1], int(match[2] or 0)) if match else None


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`; trees that are not stacked pass unchanged."""
    split: dict[str, Any] = {}
    for name, value in params.items():
        if (stack := stack_of(name)) and isinstance(value, Mapping):
            group, first = stack
            for i in range(jax.tree.leaves(value)[0].shape[0]):
                split[f"{group}_{first + i}"] = jax.tree.map(
                    lambda leaf, i=i: _take(leaf, i), value
                )
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
