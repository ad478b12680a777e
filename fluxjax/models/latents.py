"""Latents as pictures (n, c, h, w) or videos (n, c, frames, h, w) and as token sequences, and the
positions of the tokens.

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


def pack_video(
    latents: Float[Array | np.ndarray, "n c frames h w"], patch: int = PATCH
) -> Float[Array | np.ndarray, "n image d"]:
    """`patch` x `patch` latents of a frame become one token, frame by frame, each as in `pack`."""
    return rearrange(latents, "n c f (h p) (w q) -> n (f h w) (c p q)", p=patch, q=patch)


def unpack_video(
    tokens: Float[Array | np.ndarray, "n image d"], rows: int, columns: int, patch: int = PATCH
) -> Float[Array | np.ndarray, "n c frames h w"]:
    """The inverse of `pack_video`, for frames of `rows` x `columns` latents."""
    h, w = rows // patch, columns // patch
    pattern = "n (f h w) (c p q) -> n c f (h p) (w q)"
    return rearrange(tokens, pattern, h=h, w=w, p=patch, q=patch)


def video_ids(frames: int, rows: int, columns: int, patch: int = PATCH) -> Float[Array, "image 3"]:
    """Positions (frame, row, column) of the tokens of `pack_video`."""
    ids = jnp.indices((frames, rows // patch, columns // patch), jnp.float32)
    return rearrange(ids, "axes f h w -> (f h w) axes")


def text_ids(length: int) -> Float[Array, "text 3"]:
    """Every text token stands at the origin."""
    return jnp.zeros((length, 3), jnp.float32)
