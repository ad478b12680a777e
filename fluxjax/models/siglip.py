"""SigLIP's vision encoder: CLIP's layers without a class token, and a pooling head.

Source: Zhai et al. 2023 and transformers' `models/siglip/modeling_siglip.py`. The parameter tree
carries the names of the published checkpoints, with `vision_model` at the root.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float

from fluxjax.config import ConfigError, SiglipVisionConfig
from fluxjax.models.attention import dot_product_attention
from fluxjax.models.clip import CLIPMLP, CLIPEncoder, embedding_table, layer_norm
from fluxjax.models.dense import Dense
from fluxjax.models.products import own_precision


class SiglipVisionOutput(struct.PyTreeNode):
    """`last_hidden_state` is normed; `pooler_output` is the head's, None without one."""

    last_hidden_state: Float[Array, "b n d"]
    pooler_output: Float[Array, "b d"] | None


class SiglipVisionEmbeddings(nn.Module):
    """Patches of pixels in [-1, 1], with their positions."""

    config: SiglipVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.patch_embedding = nn.Conv(
            c.hidden_size,
            (c.patch_size, c.patch_size),
            (c.patch_size, c.patch_size),
            padding="VALID",  # pixels beyond the last whole patch are not seen
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=own_precision(self.dtype),
            kernel_init=init,
        )
        self.position_embedding = embedding_table(
            c.tokens, c.hidden_size, self.dtype, self.param_dtype, init
        )

    def __call__(self, pixel_values: Float[Array, "b height width c"]) -> Float[Array, "b n d"]:
        size = self.config.image_size
        if pixel_values.shape[1:3] != (size, size):
            raise ConfigError(
                f"SigLIP's vision encoder reads pictures of image_size={size} squared, "
                f"got {pixel_values.shape[1]} x {pixel_values.shape[2]}"
            )
        patches = self.patch_embedding(pixel_values)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        return patches + self.position_embedding(jnp.arange(self.config.tokens))[None]


class SiglipPoolingAttention(nn.Module):
    """One learnt query over all tokens, with PyTorch's fused parameters."""

    config: SiglipVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, query: Float[Array, "b 1 d"], states: Float[Array, "b n d"]
    ) -> Float[Array, "b 1 d"]:
        d, heads = self.config.hidden_size, self.config.num_attention_heads
        init = nn.initializers.normal(d**-0.5)
        weight = self.param("in_proj_weight", init, (3 * d, d), self.param_dtype)
        bias = self.param("in_proj_bias", nn.initializers.zeros_init(), (3 * d,), self.param_dtype)
        precision = own_precision(self.dtype)
        weights = jnp.split(weight.astype(self.dtype), 3)
        biases = jnp.split(bias.astype(self.dtype), 3)
        q, k, v = (
            (jnp.matmul(x, w.T, precision=precision) + b[None, None]).reshape(
                *x.shape[:2], heads, -1
            )
            for x, w, b in zip((query, states, states), weights, biases, strict=True)
        )
        out = dot_product_attention(q, k, v).reshape(query.shape)
        project = Dense(d, dtype=self.dtype, param_dtype=self.param_dtype, name="out_proj")
        return project(out)


class SiglipPoolingHead(nn.Module):
    """One vector of all tokens."""

    config: SiglipVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        dtypes = (self.dtype, self.param_dtype)
        shape = (1, 1, self.config.hidden_size)
        self.probe = self.param("probe", nn.initializers.normal(1.0), shape, self.param_dtype)
        self.attention = SiglipPoolingAttention(self.config, *dtypes)
        self.layernorm = layer_norm(self.config.layer_norm_eps, *dtypes)
        self.mlp = CLIPMLP(self.config, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(self, states: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        probe = self.probe.astype(self.dtype)
        query = jnp.broadcast_to(probe, (states.shape[0], *probe.shape[1:]))
        pooled = self.attention(query, states)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SiglipVisionTransformer(nn.Module):
    """Embeddings, encoder, norm and head."""

    config: SiglipVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_layers: bool = False

    def setup(self) -> None:
        dtypes = (self.dtype, self.param_dtype)
        self.embeddings = SiglipVisionEmbeddings(self.config, *dtypes)
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = CLIPEncoder(self.config, False, self.scan_layers, **types)
        self.post_layernorm = layer_norm(self.config.layer_norm_eps, *dtypes)
        if self.config.vision_use_head:
            self.head = SiglipPoolingHead(self.config, *dtypes)

    def __call__(self, pixel_values: Float[Array, "b height width c"]) -> SiglipVisionOutput:
        last, _ = self.encoder(self.embeddings(pixel_values))
        last = self.post_layernorm(last)
        pooled = self.head(last) if self.config.vision_use_head else None
        return SiglipVisionOutput(last, pooled)


class SiglipVisionModel(nn.Module):
    """Normalised pictures (b, height, width, channels) -> SiglipVisionOutput."""

    config: SiglipVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    scan_layers: bool = False

    def setup(self) -> None:
        self.vision_model = SiglipVisionTransformer(
            self.config, self.dtype, self.param_dtype, self.scan_layers
        )

    def __call__(self, pixel_values: Float[Array, "b height width c"]) -> SiglipVisionOutput:
        return self.vision_model(pixel_values)
