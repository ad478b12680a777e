"""XLabs' IP-Adapter: a picture's CLIP embedding as keys and values for the double blocks.

Source: XLabs' `x-flux`, diffusers `FluxIPAdapterAttnProcessor` and `ImageProjection`. What the
blocks do with them stands in `fluxjax.models.transformer_blocks.ImagePrompt`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.config import IPAdapterConfig
from fluxjax.models.dense import COLLECTION, Part

Tokens = Float[Array, "b tokens context"]


class ImageProjection(Part):
    """One embedding -> several tokens, each normed."""

    config: IPAdapterConfig

    def setup(self) -> None:
        config = self.config
        self.proj = self.dense(config.num_tokens * config.cross_attention_dim)
        self.norm = nn.LayerNorm(
            1e-5, dtype=self.dtype, param_dtype=self.param_dtype, use_fast_variance=False
        )

    def __call__(self, image_embeds: Float[Array, "b embed"]) -> Tokens:
        tokens = self.proj(image_embeds)
        return self.norm(tokens.reshape(tokens.shape[0], self.config.num_tokens, -1))


class IPAdapterBlock(Part):
    """Keys and values of one double block."""

    config: IPAdapterConfig

    def setup(self) -> None:
        self.to_k_ip, self.to_v_ip = (self.dense(self.config.inner_dim) for _ in range(2))

    def __call__(
        self, tokens: Tokens
    ) -> tuple[Float[Array, "b tokens d"], Float[Array, "b tokens d"]]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class IPAdapter(Part):
    """CLIP's projected embedding of a picture -> (keys, values) of all double blocks."""

    config: IPAdapterConfig
    scan_layers: bool = False

    def setup(self) -> None:
        self.image_proj = ImageProjection(self.config, **self.types)
        count = self.config.num_layers
        if self.scan_layers:
            shared: Any = None  # of the tokens
            mapped = nn.vmap(
                IPAdapterBlock,
                variable_axes={"params": 0, COLLECTION: 0},
                split_rngs={"params": True},
                in_axes=shared,
                axis_size=count,
            )
            self.ip_adapter: Any = mapped(self.config, **self.types)
        else:
            self.ip_adapter = [IPAdapterBlock(self.config, **self.types) for _ in range(count)]

    def __call__(
        self, image_embeds: Float[Array, "b embed"]
    ) -> tuple[Float[Array, "layers b tokens d"], Float[Array, "layers b tokens d"]]:
        tokens = self.image_proj(image_embeds)
        if self.scan_layers:
            return self.ip_adapter(tokens)
        each = [block(tokens) for block in self.ip_adapter]
        return jnp.stack([k for k, _ in each]), jnp.stack([v for _, v in each])
