"""How many latents and tokens a picture has. Imports no JAX: sizes are checked before that."""

from __future__ import annotations

from fluxjax.config.autoencoder import AutoencoderConfig
from fluxjax.config.base import multiple

PATCH = 2  # latent rows and columns per token


def latent_size(width: int, height: int, config: AutoencoderConfig) -> tuple[int, int]:
    """(latent rows, latent columns) of a picture of `width` x `height` pixels.

    Raises ConfigError unless both are positive multiples of the pixels of one token (16 for FLUX).
    """
    unit = PATCH * config.scale
    for name, size in (("width", width), ("height", height)):
        multiple(name, size, unit)
    return height // config.scale, width // config.scale
