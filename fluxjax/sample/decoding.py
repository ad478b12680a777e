"""Large pictures decoded in tiles, on one device or on all of a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from fluxjax.models.autoencoder import Autoencoder, denormalize_latents
from fluxjax.parallel.mesh import AXES, gathered, make_mesh, replicated
from fluxjax.shapes import Params

TILE = 64


def decode_in_tiles(
    model: Autoencoder,
    params: Params,
    latents: Float[Array | np.ndarray, "n c h w"],
    *,
    tile: int,
    mesh: Mesh | None,
) -> Float[np.ndarray, "n height width 3"]:
    """Of `tile` latents on a side: slower, with the memory of one tile on each device."""
    from fluxjax.models.tiled_decode import decode_tiled

    x = denormalize_latents(jnp.moveaxis(jnp.asarray(latents), 1, -1), model.config)
    if mesh is None:
        return decode_tiled(model, params, x, tile=tile)
    if jax.process_count() > 1:  # each process decodes for itself
        params = jax.tree.map(gathered, params)
        mesh = make_mesh("", jax.local_devices())
    held: Any = jax.device_put(params, replicated(mesh))
    place = NamedSharding(mesh, P(AXES))
    return decode_tiled(
        model,
        held,
        x,
        tile=tile,
        together=mesh.size,
        spread=lambda tiles: jax.device_put(tiles, place),
    )
