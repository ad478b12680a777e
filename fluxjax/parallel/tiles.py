"""Tiles of pictures and clips, one on each device."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.parallel.mesh import AXES, gathered, make_mesh, replicated
from fluxjax.shapes import Params


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
    place = NamedSharding(mesh, P(AXES))
    options = {"together": mesh.size, "spread": lambda tiles: jax.device_put(tiles, place)}
    return jax.device_put(params, replicated(mesh)), options
