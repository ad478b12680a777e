"""Lazy tensors onto devices: each leaf read when its turn comes, straight into its sharding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fluxjax.checkpoint import engine, tables
from fluxjax.checkpoint.tensors import Tensor


def load_tree(
    source: Mapping[str, Tensor], table: tables.Table, template: Mapping[str, Any], *,
    dtype: Any = None, shardings: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """`engine.to_ours` onto devices. A stacked leaf is filled one layer at a time."""
    flat = engine.flatten(shardings) if isinstance(shardings, Mapping) else None

    def place(path: tuple[str, ...], tensor: Tensor) -> jax.Array:
        sharding: Any = flat[path] if flat is not None else shardings
        if sharding is None:
            return jax.numpy.asarray(np.ascontiguousarray(tensor.read()))
        if sharding.is_fully_replicated:
            return jax.device_put(np.ascontiguousarray(tensor.read()), sharding)
        return jax.make_array_from_callback(
            tensor.shape, sharding, lambda where: _read_slices(tensor, where)
        )

    return engine.to_ours(source, table, template, dtype=dtype, place=place)


def _read_slices(tensor: Tensor, where: Any) -> np.ndarray:
    if not where:
        return tensor.read()
    start, stop, _ = where[0].indices(tensor.shape[0])
    if len(where) < 3 or stop - start <= 1:
        return np.ascontiguousarray(tensor.rows(start, stop)[(slice(None), *where[1:])])
    # A stacked leaf: layer by layer, so that no more than one is held beside the result.
    return np.stack([tensor.rows(i, i + 1)[(0, *where[1:])] for i in range(start, stop)])
