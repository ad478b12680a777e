"""Parts of the UNet: residual blocks, transformers over pixels, halving and doubling.

Source: diffusers `models/resnet.py`, `models/transformers/transformer_2d.py`, `attention.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from fluxjax.config.unet import UNetConfig
from fluxjax.models.autoencoder import GroupNorm
from fluxjax.models.convolution import convolution
from fluxjax.models.dense import Part
from fluxjax.models.transformer_blocks import Attention

TRANSFORMER_NORM_EPS = 1e-6
LAYER_NORM_EPS = 1e-5


class Resnet(Part):
    """Two convolutions around which the time is added, and what came in."""

    config: UNetConfig
    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"]
    ) -> Float[Array, "b h w d"]:
        groups, eps = self.config.norm_num_groups, self.config.norm_eps
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.silu(GroupNorm(groups, **types, epsilon=eps, name="norm1")(x))
        h = convolution(self, self.features, 3, "conv1")(h)
        shift = self.dense(self.features, name="time_emb_proj")(nn.silu(time))
        h = h + shift[:, None, None, :]
        h = nn.silu(GroupNorm(groups, **types, epsilon=eps, name="norm2")(h))
        h = convolution(self, self.features, 3, "conv2")(h)
        if x.shape[-1] != self.features:
            x = convolution(self, self.features, 1, "conv_shortcut")(x)
        return x + h


class SpatialTransformer(Part):
    """Transformer blocks over all pixels of one resolution."""

    config: UNetConfig
    level: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], text: Float[Array, "b l d"]
    ) -> Float[Array, "b h w c"]:
        config, level = self.config, self.level
        b, h, w, width = x.shape
        norm = GroupNorm(
            config.norm_num_groups,
            jnp.dtype(self.dtype),
            jnp.dtype(self.param_dtype),
            TRANSFORMER_NORM_EPS,
            name="norm",
        )
        tokens = norm(x)
        if config.use_linear_projection:
            tokens = self.dense(width, name="proj_in")(tokens.reshape(b, h * w, width))
        else:
            tokens = convolution(self, width, 1, "proj_in")(tokens).reshape(b, h * w, width)
        for i in range(config.transformer_layers_per_block[level]):
            block = TransformerBlock(
                config.attention_head_dim[level], **self.types, name=f"transformer_blocks_{i}"
            )
            tokens = block(tokens, text)
        if config.use_linear_projection:
            return x + self.dense(width, name="proj_out")(tokens).reshape(x.shape)
        return x + convolution(self, width, 1, "proj_out")(tokens.reshape(x.shape))


class TransformerBlock(Part):
    """Attention to all pixels, attention to the text, and an MLP."""

    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], text: Float[Array, "b l d"]
    ) -> Float[Array, "b n c"]:
        seen = self.norm("norm1")(x)
        x = x + self.attend("attn1")(seen, seen)
        x = x + self.attend("attn2")(self.norm("norm2")(x), text)
        return x + GatedMLP(**self.types, name="ff")(self.norm("norm3")(x))

    def attend(self, name: str) -> Attention:
        return Attention(self.heads, qkv_bias=False, **self.types, name=name)

    def norm(self, name: str) -> nn.LayerNorm:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.LayerNorm(LAYER_NORM_EPS, use_fast_variance=False, name=name, **types)


class GatedMLP(Part):
    """Four times as wide, gated."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        return self.dense(x.shape[-1], name="net_2")(GEGLU(**self.types, name="net_0")(x))


class GEGLU(Part):
    """Shazeer 2020: the second half of the layer's outputs gates the first half."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n inner"]:
        value, gate = jnp.split(self.dense(8 * x.shape[-1], name="proj")(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class Downsample(Part):
    """Half of each side, by a convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return convolution(self, x.shape[-1], 3, "conv", stride=2)(x)


class Upsample(Part):
    """To `size` (rows, columns), then a convolution."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, ...]
    ) -> Float[Array, "b h2 w2 c"]:
        """The nearest pixels, as PyTorch counts them; `jax.image.resize` takes others where the
        size is not doubled."""
        rows, columns = (np.arange(n) * m // n for n, m in zip(size, x.shape[1:3], strict=True))
        return convolution(self, x.shape[-1], 3, "conv")(x[:, rows][:, :, columns])
