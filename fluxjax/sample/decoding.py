"""Large pictures and clips coded in tiles, on one device or on all of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fluxjax.config.tiling import Tiling
from fluxjax.models.autoencoder import Autoencoder, denormalize_latents
from fluxjax.parallel.tiles import tiles_on
from fluxjax.shapes import Params

TILE = 64
ClipLatents = Float[Array | np.ndarray, "n c t h w"]


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


def clip_decoder(
    model: Any, params: Params, tiling: Tiling, *, mesh: Mesh | None
) -> Callable[[ClipLatents], Iterator[Float[np.ndarray, "n frames height width 3"]]]:
    """What decodes latents as the transformer sees them, tile by tile: groups of frames in their
    order, see `fluxjax.models.video_tiles`. Of several processes all call this, and those that want
    frames call what it returns."""
    from fluxjax.models.video_tiles import decode_groups

    held, together = tiles_on(mesh, params)

    def groups(latents: ClipLatents) -> Iterator[Float[np.ndarray, "n frames height width 3"]]:
        x = jnp.moveaxis(jnp.asarray(latents), 1, -1).astype(jnp.float32)
        return decode_groups(model, held, x / model.config.latent_factor, tiling, **together)

    return groups


def without_first(
    count: int, groups: Iterable[Float[np.ndarray, "n _ height width 3"]]
) -> Iterator[Float[np.ndarray, "n _ height width 3"]]:
    """Groups of frames without the first so many."""
    for group in groups:
        kept = group[:, count:]
        count = max(count - group.shape[1], 0)
        if kept.size:
            yield kept


def encode_clips(
    model: Any,
    params: Params,
    clips: Float[np.ndarray, "n frames height width 3"],
    tiling: Tiling,
    noise: Float[Array | np.ndarray, "n c t h w"] | None = None,
    *,
    mesh: Mesh | None,
) -> Float[np.ndarray, "n c t h w"]:
    """Latents as the transformer sees them: of an autoencoder with a posterior its means, or with
    `noise` its samples."""
    from fluxjax.models.causal_autoencoder import posterior
    from fluxjax.models.video_tiles import encode_tiled

    held, together = tiles_on(mesh, params)
    latents: Any = encode_tiled(model, held, clips, tiling, **together)
    if latents.shape[-1] == 2 * model.config.latent_channels:
        found = posterior(latents)
        latents = found.mean
        if noise is not None:
            deviation = jnp.exp(0.5 * found.logvar)
            latents = latents + deviation * jnp.moveaxis(jnp.asarray(noise, jnp.float32), 1, -1)
    return np.moveaxis(np.asarray(latents) * np.float32(model.config.latent_factor), -1, 1)
