"""Lazy tensors onto devices: each leaf read when its turn comes, straight into its sharding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.finite import only_finite
from fluxjax.checkpoint.mapped_memory import contiguous
from fluxjax.checkpoint.quantised.quantise import quantised
from fluxjax.checkpoint.tensors import Tensor, astype
from fluxjax.models.names import is_stacked, published_name
from fluxjax.models.quantised import Quantised
from fluxjax.models.stacking import GROUPS
from fluxjax.networks.tables import Table

_AT_ONCE = 2**24  # bytes of a stacked leaf below which layer by layer is not worth it


def load_tree(
    source: Mapping[str, Tensor],
    table: Table,
    template: Mapping[str, Any],
    *,
    dtype: Any = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """`engine.to_ours` onto devices. A stacked leaf that is split is filled layer by layer.

    The host then holds no more than one layer, or one leaf that is not stacked, and its parts.
    Raises ConfigError naming a tensor with NaN or infinite values, in `dtype` if that is given.
    """
    cast = source
    if dtype is not None:
        cast = {name: astype(tensor, np.dtype(dtype)) for name, tensor in source.items()}
    finite = {name: only_finite(tensor, name) for name, tensor in cast.items()}
    flat = engine.flatten(shardings) if isinstance(shardings, Mapping) else None

    def place(path: tuple[str, ...], tensor: Tensor) -> jax.Array:
        sharding: Any = flat[path] if flat is not None else shardings
        if sharding is None:
            return jax.numpy.asarray(contiguous(tensor.read()))
        stacked = any(key in GROUPS for key in path)
        if stacked and tensor.nbytes > _AT_ONCE and _layers_are_whole(sharding):
            return _fill(tensor, sharding)
        return _put(tensor.read(), sharding)

    return engine.to_ours(finite, table, template, place=place)


def load_quantised(
    source: Mapping[str, Tensor],
    table: Table,
    template: Mapping[str, Any],
    kind: str,
    *,
    dtype: Any = None,
    sharding: Sharding | None = None,
) -> dict[str, Any]:
    """`load_tree` onto one device; matrices that are codes in `template` (`quantised_template`) are
    quantised as they are read. Codes that a file has of that very kind and form are taken.
    """
    flat = engine.flatten(template)
    codes = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Quantised)}
    rest = engine.unflatten({path: leaf for path, leaf in flat.items() if path not in codes})
    names: dict[tuple[str, ...], list[str]] = {path: [] for path in codes}
    for path, leaf in codes.items():
        stacked = is_stacked(path)
        for layer in range(leaf.shape[0]) if stacked else (None,):
            names[path].append(published_name(path, layer))
    taken = {name for each in names.values() for name in each}
    plain = {name: tensor for name, tensor in source.items() if name not in taken}
    loaded = engine.flatten(load_tree(plain, table, rest, dtype=dtype, shardings=sharding))
    for path, leaf in codes.items():
        packed = [_packed(source[name], name, leaf, kind) for name in names[path]]
        parts = {part: [one.parts[part] for one in packed] for part in leaf.parts}
        loaded[path] = Quantised(
            leaf.kind,
            {
                part: jax.device_put(
                    contiguous((engine.stack(each) if is_stacked(path) else each[0]).read()),
                    sharding,
                )
                for part, each in parts.items()
            },
        )
    return engine.unflatten(loaded)


def _packed(tensor: Tensor, name: str, leaf: Quantised, kind: str) -> Quantised:
    """Raises ConfigError, naming the tensor, for values that are not finite."""
    wanted = {part: (shape.shape[-2:], shape.dtype) for part, shape in leaf.parts.items()}
    packed = tensor.packed
    there = packed and {part: (each.shape, each.dtype) for part, each in packed.parts.items()}
    if packed is not None and packed.kind == leaf.kind and there == wanted:
        for _ in only_finite(tensor, name).blocks():
            pass
        return packed
    made = quantised(only_finite(replace(tensor, packed=None), name), kind)
    assert made is not None and made.packed is not None  # or the template would have no codes here
    return made.packed


def _layers_are_whole(sharding: Sharding) -> bool:
    """Several devices, none of which splits the first axis."""
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return False
    return not sharding.spec or sharding.spec[0] is None


def _put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    if len(sharding.device_set) == 1:
        return jax.device_put(contiguous(array), sharding)
    # One device after the other: their parts do not all lie on the host at once.
    parts = [
        jax.device_put(contiguous(array[where]), device).block_until_ready()
        for device, where in sharding.addressable_devices_indices_map(array.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def _fill(tensor: Tensor, sharding: NamedSharding) -> jax.Array:
    """Row by row of the first axis: each is read once and goes to the devices before the next."""
    row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    leaf = _zeros(tensor.shape, tensor.dtype, sharding)()
    for i in range(tensor.shape[0]):
        part = _put(tensor.rows(i, i + 1)[0], row)
        # Waited for, or the parts of many rows would pile up.
        leaf = _write(leaf, part, np.int32(i)).block_until_ready()
    return leaf


@cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@jax.jit(donate_argnums=0)
def _write(leaf: jax.Array, row: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, row, i, 0)
