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
from fluxjax.checkpoint.finite import only_finite, only_finite_codes
from fluxjax.checkpoint.mapped_memory import contiguous
from fluxjax.checkpoint.quantised.parts import codes_of, form_of
from fluxjax.checkpoint.quantised.quantise import quantised
from fluxjax.checkpoint.tensors import Tensor, astype
from fluxjax.models.absent import Absent
from fluxjax.models.names import is_stacked, published_name
from fluxjax.models.quantised import Quantised
from fluxjax.networks.tables import Table
from fluxjax.quantised_kinds import DYNAMIC

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
    Matrices that are codes in `template` (see `templates`) are kept so: a file's own codes are
    taken, others are made as they are read. What is absent in it is not read. In both cases
    `source` has the published names.
    Raises ConfigError naming a tensor with NaN or infinite values, in `dtype` if that is given.
    """
    flat = engine.flatten(template)
    codes = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Quantised)}
    gone = {path: leaf for path, leaf in flat.items() if isinstance(leaf, Absent)}
    if codes or gone:
        apart = codes.keys() | gone.keys()
        template = engine.unflatten({p: leaf for p, leaf in flat.items() if p not in apart})
    names = {path: _names(path, leaf) for path, leaf in (codes | gone).items()}
    taken = {name for each in names.values() for name in each}
    plain = {name: tensor for name, tensor in source.items() if name not in taken}
    if dtype is not None:
        plain = {name: astype(tensor, np.dtype(dtype)) for name, tensor in plain.items()}
    finite = {name: only_finite(tensor, name) for name, tensor in plain.items()}
    where = engine.flatten(shardings) if isinstance(shardings, Mapping) else None

    def place(path: tuple[str, ...], tensor: Tensor) -> jax.Array:
        return _place(path, tensor, shardings if where is None else where[path])

    loaded = engine.to_ours(finite, table, template, place=place)
    if not (codes or gone):
        return loaded
    loaded = engine.flatten(loaded) | gone
    for path, leaf in codes.items():
        sharding = shardings if where is None else where[path]
        packed = [_packed(source[name], name, leaf) for name in names[path]]
        loaded[path] = _place_codes(path, leaf, packed, sharding)
    return engine.unflatten(loaded)


def _place(path: tuple[str, ...], tensor: Tensor, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.numpy.asarray(contiguous(tensor.read()))
    if is_stacked(path) and tensor.nbytes > _AT_ONCE and _layers_are_whole(sharding):
        return _fill(tensor, sharding)
    return _put(tensor.read(), sharding)


def _names(path: tuple[str, ...], leaf: Quantised | Absent) -> list[str]:
    """The published names of a leaf's layers."""
    layers = range(leaf.shape[0]) if is_stacked(path) else (None,)
    return [published_name(path, layer) for layer in layers]


def _place_codes(
    path: tuple[str, ...], leaf: Quantised, packed: list[Quantised], sharding: Any
) -> Quantised:
    """`sharding`: one for all, or a `Quantised` with one for each part."""
    parts: dict[str, Any] = {}
    for part in leaf.parts:
        each = [one.parts[part] for one in packed]
        tensor = engine.stack(each) if is_stacked(path) else each[0]
        own = sharding.parts[part] if isinstance(sharding, Quantised) else sharding
        parts[part] = _place(path, tensor, own)
    return Quantised(leaf.kind, parts)


def _packed(tensor: Tensor, name: str, leaf: Quantised) -> Quantised:
    """Raises ConfigError, naming the tensor, for values that are not finite."""
    packed, kind = codes_of(tensor), DYNAMIC.get(leaf.kind, leaf.kind)
    if packed is not None and form_of(packed) == form_of(Quantised(kind, leaf.parts)):
        return only_finite_codes(packed, name)
    made = quantised(only_finite(replace(tensor, packed=None), name), kind, name)
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
