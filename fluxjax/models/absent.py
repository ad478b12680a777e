"""Parameters that are not there: some are used only before the steps of a run, others only in them.

`Absent` stands in a parameter tree for one that a program does not use. It holds no array; zeros
take its place while the program is traced, and are compiled away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from fluxjax.models.quantised import Quantised


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Absent:
    """In place of a parameter that is not there, its shape."""

    shape: tuple[int, ...] = field(metadata={"static": True})


def absent(leaf: Any) -> Absent:
    """In the place of a kernel, of its codes, or of another array or its shape."""
    shape = tuple(leaf.shape)
    if isinstance(leaf, Quantised):
        shape = (*shape[:-2], shape[-1], shape[-2])
    return Absent(shape)


def is_node(leaf: Any) -> bool:
    """Whether it stands for one parameter of a tree: an `Absent`, or codes."""
    return isinstance(leaf, Absent | Quantised)


def with_zeros(params: Any) -> Any:
    """The parameters with zeros for those that are absent; to be traced."""

    def fill(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape) if isinstance(leaf, Absent) else leaf

    return jax.tree.map(fill, params, is_leaf=is_node)
