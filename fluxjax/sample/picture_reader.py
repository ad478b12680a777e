"""What reads pictures for a transformer: an encoder, and a network that follows it.

SigLIP and Redux' projector make tokens, CLIP's vision encoder and an IP-Adapter keys and values.
"""

from __future__ import annotations

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
    """The configurations of an encoder and of what follows it, which sees `output` of it."""

    encoder: Any
    follower: Any
    output: str

    def modules(self, dtype: Any) -> tuple[Any, Any]:
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
        encoder, follower = self.encoder, self.follower
        return (
            network_of(encoder).build(encoder, **types),
            network_of(follower).build(follower, **types),
        )

    def weights(self, dtype: Any) -> tuple[Params, Params]:
        """Shapes of the parameters."""
        return (
            in_dtype(abstract_params(self.encoder, stacked=False), dtype),
            in_dtype(abstract_params(self.follower, stacked=False), dtype),
        )


@partial(jax.jit, static_argnames=("reading", "dtype"))
def read_pictures(
    reading: Reading,
    dtype: Any,
    params: tuple[Params, Params],
    pixels: Float[Array, "n height width 3"],
) -> Any:
    """What the follower makes of pictures, as the encoder's processor gives them."""
    encoder, follower = reading.modules(dtype)
    seen: Any = encoder.apply({"params": params[0]}, pixels)
    return follower.apply({"params": params[1]}, getattr(seen, reading.output))


class PictureReader:
    """Both networks' weights are read when they are first needed, and stay until `release`."""

    def __init__(self, encoder: OpenNetwork, follower: OpenNetwork, output: str, dtype: Any):
        self.networks, self.dtype = (encoder, follower), jnp.dtype(dtype)
        self.reading = Reading(encoder.config, follower.config, output)
        self._params: tuple[Params, Params] | None = None

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

    def __call__(self, pixels: Float[np.ndarray, "n height width 3"]) -> Any:
        """Arrays of numpy."""
        if self._params is None:
            encoder, follower = self.networks
            self._params = (
                encoder.params(stacked=False, dtype=self.dtype),
                follower.params(stacked=False, dtype=self.dtype),
            )
        return jax.tree.map(
            np.asarray, read_pictures(self.reading, self.dtype, self._params, pixels)
        )

    def release(self) -> None:
        """Let the weights go; the next call reads them again."""
        self._params = None
