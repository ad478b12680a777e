"""Latents as pictures (n, c, h, w) and as token sequences, and the positions of the tokens.

Source: diffusers `FluxPipeline._pack_latents`, `_prepare_latent_image_ids`; BFL `sampling.prepare`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from fluxjax.config.latents import PATCH


def pack(latents: Float[Array | np.ndarray, "n c h w"]) -> Float[Array | np.ndarray, "n image d"]:
    """2 x 2 latents become one token of 4 c channels (channel outermost), row by row."""
    return rearrange(latents, "n c (h p) (w q) -> n (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(
    tokens: Float[Array | np.ndarray, "n image d"], rows: int, columns: int
) -> Float[Array | np.ndarray, "n c h w"]:
    """The inverse of `pack`, for latents of `rows` x `columns`."""
    return rearrange(
        tokens, "n (h w) (c p q) -> n c (h p) (w q)", h=rows // PATCH, p=PATCH, q=PATCH
    )


def image_ids(rows: int, columns: int, *, index: int = 0) -> Float[Array, "image 3"]:
    """Positions (index, row, column) of the tokens of latents of `rows` x `columns`.

    Always float32: in bfloat16, as diffusers builds them, positions are exact only to 256.
    """
    row, column = jnp.indices((rows // PATCH, columns // PATCH), jnp.float32)
    ids = jnp.stack([jnp.full_like(row, index), row, column], axis=-1)
    return rearrange(ids, "h w axes -> (h w) axes")


def text_ids(length: int) -> Float[Array, "text 3"]:
    """Every text token stands at the origin."""
    return jnp.zeros((length, 3), jnp.float32)
