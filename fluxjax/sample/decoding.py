"""Large pictures decoded in tiles, on one device or on all of a mesh."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fluxjax.models.autoencoder import Autoencoder, denormalize_latents
from fluxjax.parallel.tiles import tiles_on
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
    held, together = tiles_on(mesh, params)
    return decode_tiled(model, held, x, tile=tile, **together)
