"""The projector of FLUX.1 Redux. Source: BFL's `modules/image_embedders.py`, diffusers
`pipelines/flux/modeling_flux.py`."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from fluxjax.config import ReduxConfig
from fluxjax.models.dense import Part


class ReduxImageEncoder(Part):
    """SigLIP's states -> tokens that the transformer reads after T5's."""

    config: ReduxConfig

    def setup(self) -> None:
        self.redux_up = self.dense(3 * self.config.txt_in_features)
        self.redux_down = self.dense(self.config.txt_in_features)

    def __call__(self, states: Float[Array, "b n d"]) -> Float[Array, "b n text"]:
        return self.redux_down(nn.silu(self.redux_up(states)))
