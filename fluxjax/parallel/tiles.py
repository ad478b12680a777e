"""Tiles of pictures and clips, one on each device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.parallel.mesh import AXES, gathered, make_mesh, replicated
from fluxjax.shapes import Params


class EachDevice(NamedTuple):
    """Tiles on all devices of a mesh, each coded where it lies: outside the partitioner, which does
    not split every kernel."""

    mesh: Mesh

    def __call__(self, tiles: Any) -> jax.Array:
        return jax.device_put(tiles, NamedSharding(self.mesh, P(AXES)))

    def code(self, function: Callable[[Any, Any], Any], params: Any, tiles: Any) -> Any:
        """`function(params, tiles)`; parameters are whole on each device."""
        where = P(AXES)
        split: Any = jax.shard_map(
            function, mesh=self.mesh, in_specs=(P(), where), out_specs=where, check_vma=False
        )
        return split(params, tiles)


def tiles_on(mesh: Mesh | None, params: Params) -> tuple[Params, dict[str, Any]]:
    """The parameters on every device of `mesh`, and how many tiles run together and what puts them
    there: the options of `models.tiled_decode` and `models.video_tiles`.

    Without a mesh the parameters as they are, and one tile after the other. Each of several
    processes works for itself, on its own devices.
    """
    if mesh is None:
        return params, {}
    if jax.process_count() > 1:
        params = jax.tree.map(gathered, params)
        mesh = make_mesh("", jax.local_devices())
    options = {"together": mesh.size, "spread": EachDevice(mesh)}
    return jax.device_put(params, replicated(mesh)), options
