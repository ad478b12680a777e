"""What reads pictures for a transformer: an encoder, and networks that follow it.

SigLIP and Redux' projector make tokens, CLIP's vision encoder and IP-Adapters keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.templates import abstract_params, in_dtype
from fluxjax.networks import network_of
from fluxjax.shapes import Params


class Reading(NamedTuple):
    """The configurations of an encoder and of what follows it, each of which sees its `output`."""

    encoder: Any
    followers: tuple[Any, ...]
    output: str

    def modules(self, dtype: Any) -> list[Any]:
        """The encoder first, as everywhere."""
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
        each = (self.encoder, *self.followers)
        return [network_of(config).build(config, **types) for config in each]

    def weights(self, dtype: Any) -> tuple[Params, ...]:
        """Shapes of the parameters."""
        each = (self.encoder, *self.followers)
        return tuple(in_dtype(abstract_params(config, stacked=False), dtype) for config in each)


@partial(jax.jit, static_argnames=("reading", "dtype"))
def read_pictures(
    reading: Reading,
    dtype: Any,
    params: tuple[Params, ...],
    pixels: Float[Array, "n height width 3"],
) -> tuple[Any, ...]:
    """What each follower makes of pictures, as the encoder's processor gives them."""
    encoder, *followers = reading.modules(dtype)
    seen: Any = encoder.apply({"params": params[0]}, pixels)
    output = getattr(seen, reading.output)
    each = zip(followers, params[1:], strict=True)
    return tuple(follower.apply({"params": weights}, output) for follower, weights in each)


class PictureReader:
    """All networks' weights are read when they are first needed, and stay until `release`."""

    def __init__(
        self, encoder: OpenNetwork, followers: Sequence[OpenNetwork], output: str, dtype: Any
    ):
        self.networks, self.dtype = (encoder, *followers), jnp.dtype(dtype)
        self.reading = Reading(encoder.config, tuple(one.config for one in followers), output)
        self._params: tuple[Params, ...] | None = None

    @property
    def size(self) -> int:
        """Pixels of a side of the pictures that are read."""
        return self.reading.encoder.image_size

    @property
    def weight_bytes(self) -> int:
        """Of what is not loaded yet."""
        if self._params is not None:
            return 0
        leaves = jax.tree.leaves(self.reading.weights(self.dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def __call__(self, pixels: Float[np.ndarray, "n height width 3"]) -> tuple[Any, ...]:
        """Of each follower, arrays of numpy."""
        if self._params is None:
            self._params = tuple(
                network.params(stacked=False, dtype=self.dtype) for network in self.networks
            )
        return jax.tree.map(
            np.asarray, read_pictures(self.reading, self.dtype, self._params, pixels)
        )

    def release(self) -> None:
        """Let the weights go; the next call reads them again."""
        self._params = None
