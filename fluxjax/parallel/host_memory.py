"""Weights that lie in the host's memory and are brought to the device a layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fluxjax.models.absent import is_node
from fluxjax.models.names import flatten, is_stacked, unflatten

HOST = "pinned_host"


def streamed(template: Mapping[str, Any]) -> dict[str, Any]:
    """Shardings of a tree of parameters: the kernels of scanned blocks on the host, which `Dense`
    brings in the body of the scan, all else on the first device."""
    # A mesh of one device: of a SingleDeviceSharding shapes forget the memory when they are traced.
    mesh = Mesh(jax.devices()[:1], ("device",))

    def place(path: tuple[str, ...], leaf: Any) -> Any:
        host = is_stacked(path) and path[-1] == "kernel"
        where = NamedSharding(mesh, PartitionSpec(), memory_kind=HOST if host else None)
        return jax.tree.map(lambda _: where, leaf) if is_node(leaf) else where

    return unflatten({path: place(path, leaf) for path, leaf in flatten(template).items()})


def with_places(template: Mapping[str, Any]) -> Any:
    """The shapes of `template` with those shardings, to compile for."""

    def spec(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(spec, dict(template), streamed(template))
