"""The T5 encoder, v1.1 (gated tanh GELU) and v1.0 (ReLU).

Source: Raffel et al. 2020 and transformers' `models/t5/modeling_t5.py`; the parameter tree carries
its names. Unlike most transformers there is no 1/sqrt(d) in the attention (it is folded into the
initialisation), no bias anywhere, and one table of relative position biases serves all blocks.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fluxjax.config import T5Config
from fluxjax.models.activation import ACTIVATIONS
from fluxjax.models.attention import dot_product_attention
from fluxjax.models.dense import COLLECTION, Dense, Part
from fluxjax.models.norms import RMSNorm


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair: int32 (length, length).

    Half of the buckets are for keys after the query. In each half the first half holds one distance
    each, the rest grow with the logarithm up to `max_distance`. Computed with numpy while tracing:
    float32 as in PyTorch, whose rounding decides the bucket at the powers of two.
    """
    position = np.arange(length)
    distance = position[None, :] - position[:, None]
    half = num_buckets // 2
    exact = half // 2
    magnitude = np.abs(distance)
    ratio = np.maximum(magnitude, 1).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    large = np.minimum(exact + growth.astype(np.int64), half - 1)
    bucket = np.where(magnitude < exact, magnitude, large)
    return (bucket + half * (distance > 0)).astype(np.int32)


class T5Part(Part):
    """Layers as T5 draws them."""

    def linear(self, features: int, init_features: int, name: str) -> Dense:
        """Without bias, drawn with variance 1 / init_features."""
        init = nn.initializers.normal(init_features**-0.5)
        return self.dense(features, use_bias=False, kernel_init=init, name=name)


class T5Attention(T5Part):
    """Without a scale; `bias` is that of the keys' distances."""

    config: T5Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "#b h l l"]
    ) -> Float[Array, "b l d"]:
        c = self.config
        inner = c.num_heads * c.d_kv

        def heads(name: str, init_features: int) -> Float[Array, "b l h k"]:
            y = self.linear(inner, init_features, name)(x)
            return y.reshape(*y.shape[:2], c.num_heads, c.d_kv)

        q, k, v = heads("q", c.d_model * c.d_kv), heads("k", c.d_model), heads("v", c.d_model)
        y = dot_product_attention(q, k, v, bias=bias, scale=1.0)
        return self.linear(c.d_model, inner, "o")(y.reshape(*y.shape[:2], inner))


class T5FeedForward(T5Part):
    """Two layers, of which the first may be gated by another (`is_gated_act`)."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        activation = ACTIVATIONS[c.dense_act_fn]
        if c.is_gated_act:
            gate = activation(self.linear(c.d_ff, c.d_model, "wi_0")(x))
            y = gate * self.linear(c.d_ff, c.d_model, "wi_1")(x)
        else:
            y = activation(self.linear(c.d_ff, c.d_model, "wi")(x))
        return self.linear(c.d_model, c.d_ff, "wo")(y)


class T5SelfAttentionLayer(Part):
    """Norm and attention, beside the input."""

    config: T5Config

    def setup(self) -> None:
        self.layer_norm = RMSNorm(self.config.layer_norm_epsilon, **self.types)
        self.SelfAttention = T5Attention(self.config, **self.types)

    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "#b h l l"]
    ) -> Float[Array, "b l d"]:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5FeedForwardLayer(Part):
    """Norm and gated layers, beside the input."""

    config: T5Config

    def setup(self) -> None:
        self.layer_norm = RMSNorm(self.config.layer_norm_epsilon, **self.types)
        self.DenseReluDense = T5FeedForward(self.config, **self.types)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(Part):
    """Attention, then the feed-forward layers."""

    config: T5Config

    def setup(self) -> None:
        self.layer_0 = T5SelfAttentionLayer(self.config, **self.types)
        self.layer_1 = T5FeedForwardLayer(self.config, **self.types)

    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "#b h l l"]
    ) -> Float[Array, "b l d"]:
        return self.layer_1(self.layer_0(x, bias))


class T5Stack(Part):
    """All blocks, which share the first one's bias of distances, and the last norm."""

    config: T5Config
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        c = self.config
        self.relative_attention_bias = nn.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            dtype=jnp.float32,  # added to float32 logits
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(c.d_model**-0.5),
        )
        block = nn.remat(T5Block) if self.remat else T5Block
        self.block: Any = (
            block(c, **self.types)
            if self.scan_layers
            else [block(c, **self.types) for _ in range(c.num_layers)]
        )
        self.final_layer_norm = RMSNorm(c.layer_norm_epsilon, **self.types)

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b 1 1 l"] | None
    ) -> Float[Array, "b l d"]:
        c = self.config
        buckets = relative_position_buckets(
            x.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        bias = jnp.transpose(self.relative_attention_bias(buckets), (2, 0, 1))[None]
        if mask is not None:
            bias = jnp.where(mask, bias, jnp.finfo(jnp.float32).min)
        if self.scan_layers:
            x, _ = nn.scan(
                lambda block, x: (block(x, bias), None),
                variable_axes={"params": 0, COLLECTION: 0},
                split_rngs={"params": True},
                length=c.num_layers,
            )(self.block, x)
        else:
            for block in self.block:
                x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(Part):
    """Token ids -> sequence of states, FLUX's second text encoder.

    The residual stream is in `dtype`; norms' statistics and the softmax are float32.
    """

    config: T5Config
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        self.shared = nn.Embed(
            self.config.vocab_size,
            self.config.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(1.0),
        )
        self.encoder = T5Stack(self.config, self.scan_layers, self.remat, **self.types)

    def __call__(
        self, input_ids: Int[Array, "b l"], attention_mask: Int[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        """Last hidden state after the final norm.

        `attention_mask` is 1 for tokens, 0 for padding. FLUX was trained without: None is its way.
        """
        mask = None if attention_mask is None else attention_mask[:, None, None, :] != 0
        return self.encoder(self.shared(input_ids), mask)
