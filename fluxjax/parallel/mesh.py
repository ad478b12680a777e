"""The one mesh of devices: `data`, `fsdp`, `tensor` and `sequence`.

A batch is split over `data` and `fsdp`. Weights are split over `fsdp` (and gathered layer by layer
where they are used) and over `tensor` (and used in parts); the tokens of one picture are split over
`sequence`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from fluxjax.config import ConfigError
from fluxjax.parallel.mesh_shape import AXES, MeshShape, parse_mesh

BATCH = ("data", "fsdp")


def make_mesh(shape: MeshShape | str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, by default all. Raises ConfigError if they do not fit."""
    shape = parse_mesh(shape) if isinstance(shape, str) else shape
    devices = list(jax.devices() if devices is None else devices)
    rest = shape.fsdp * shape.tensor * shape.sequence
    data = shape.data or len(devices) // rest
    if data * rest != len(devices):
        wish = "data must make up to" if shape.data else "must divide"
        many = f"{len(devices)} device" + "s" * (len(devices) > 1)
        raise ConfigError(
            f"the mesh {shape} does not fit {many}: fsdp x tensor x sequence is {rest}, "
            f"which {wish} {len(devices)}{_simulate(rest * max(data, 1))}"
        )
    sizes = (data, shape.fsdp, shape.tensor, shape.sequence)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _simulate(count: int) -> str:
    """What gives a CPU so many devices."""
    if jax.default_backend() != "cpu":
        return ""
    return f" (XLA_FLAGS=--xla_force_host_platform_device_count={count} simulates {count} on a CPU)"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def batch_parts(mesh: Mesh) -> int:
    """What a batch's size must divide by to be split over `data` and `fsdp`."""
    return math.prod(mesh.shape[name] for name in BATCH)


def pad_rows(tree: Any, rows: int) -> Any:
    """Every array of `tree` made `rows` long by repeating its last row; scalars as they are."""

    def pad(x: Any) -> Any:
        missing = rows - np.shape(x)[0] if np.ndim(x) else 0
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x

    return jax.tree.map(pad, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, on devices of all processes; each fills its own.

    What lies there already stays.
    """

    def put(x: Any, sharding: Sharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def gathered(array: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def replicated(mesh: Mesh) -> NamedSharding:
    """All of an array on each device."""
    return NamedSharding(mesh, P())
