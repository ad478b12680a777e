"""Parameter trees as checkpoints have them: their number of values, and their names and tensors."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fluxjax.checkpoint.engine import from_published, from_tree
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.networks.tables import Table


def parameter_count(tree: Any) -> int:
    """Of arrays, shapes or lazy tensors."""
    return sum(
        int(np.prod(leaf.shape, dtype=np.int64))
        for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Tensor))
    )


def to_theirs(params: Mapping[str, Any], table: Table) -> dict[str, Tensor]:
    """Our tree under the names of a table, lazy."""
    return from_published(from_tree(params), table)
