"""The transformer of Open-Sora 2.0: FLUX's over the tokens of a video, with a condition added.

Taken apart as in `fluxjax.models.flux`; `embed_condition`, too, is done once for a run. Source:
hpcaitech/Open-Sora `opensora/models/mmdit/model.py`. Its rotary embeddings of halves are turned
into FLUX's of neighbours when weights are converted.
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float, Num

from fluxjax.config import OpenSoraConfig
from fluxjax.models.embeddings import Rope
from fluxjax.models.flux import FluxVelocity, Modulations


class OpenSoraTransformer(FluxVelocity):
    """Predicts the velocity (noise - data) of a video's packed latents."""

    config: OpenSoraConfig

    def setup(self) -> None:
        super().setup()
        zeros = nn.initializers.zeros_init()
        self.cond_in = self.dense(self.config.inner_dim, kernel_init=zeros)

    def embed_condition(
        self, condition: Float[Array, "b image cond_channels"]
    ) -> Float[Array, "b image d"]:
        """The condition in the transformer's width: of each token the mask, then the frame that is
        given; zeros where none is."""
        return self.cond_in(condition)

    def denoise(
        self,
        hidden_states: Float[Array, "b image in_channels"],
        condition: Float[Array, "b image d"],
        text: Float[Array, "b text d"],
        modulations: Modulations,
        rope: Rope,
    ) -> Float[Array, "b image out_channels"]:
        """One step, given what `embed_condition`, `embed_text`, `modulations` and `rope` return."""
        image = self.x_embedder(hidden_states) + condition
        return self.velocity(image, text, modulations, rope)

    def __call__(
        self,
        hidden_states: Float[Array, "b image in_channels"],
        condition: Float[Array, "b image cond_channels"],
        encoder_hidden_states: Float[Array, "b text joint"],
        pooled_projections: Float[Array, "b pooled"],
        timestep: Float[Array, " b"],
        img_ids: Num[Array, "image axes"],
        txt_ids: Num[Array, "text axes"],
    ) -> Float[Array, "b image out_channels"]:
        """`timestep` is the noise level in [0, 1], 1 = pure noise; ids are unbatched."""
        return self.denoise(
            hidden_states,
            self.embed_condition(condition),
            self.embed_text(encoder_hidden_states),
            self.modulations(timestep, pooled_projections),
            self.rope(txt_ids, img_ids),
        )
