"""CLIP's text encoder, and the layers that its vision encoder shares.

Source: Radford et al. 2021 and transformers' `models/clip/modeling_clip.py`. The parameter tree
carries the names of the published checkpoints, with `text_model` and `vision_model` at the root.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from fluxjax.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ConfigError,
    SiglipVisionConfig,
)
from fluxjax.models.activation import ACTIVATIONS
from fluxjax.models.attention import dot_product_attention
from fluxjax.models.dense import COLLECTION, Dense, Part
from fluxjax.models.products import Precision

EncoderConfig = CLIPTextConfig | CLIPVisionConfig | SiglipVisionConfig
_PUBLISHED_EOS = 2  # what CLIP's published configs say eos_token_id is, though it is 49407


class CLIPTextOutput(struct.PyTreeNode):
    """What the text encoder gives.

    `last_hidden_state` is final-layer-normed, `penultimate_hidden_state` (the input of the last
    layer) is not. With `layers` both are of the state after so many layers, of each row its own.
    `pooler_output` is the last state, always of all layers, at the end-of-text token, not
    projected: this is what FLUX reads. `text_embeds` is its projection, None without projection.
    """

    last_hidden_state: Float[Array, "b l d"]
    penultimate_hidden_state: Float[Array, "b l d"]
    pooler_output: Float[Array, "b d"]
    text_embeds: Float[Array, "b p"] | None


class CLIPAttention(Part):
    """Of all tokens, or, causal, of those before."""

    config: EncoderConfig
    causal: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config
        depth_scale = (2 * c.num_hidden_layers) ** -0.5

        def project(y: Array, name: str, scale: float) -> Array:
            init = nn.initializers.normal(scale * c.hidden_size**-0.5)
            return self.dense(c.hidden_size, kernel_init=init, name=name)(y)

        q, k, v = (
            project(x, name, depth_scale).reshape(*x.shape[:2], c.num_attention_heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = dot_product_attention(q, k, v, causal=self.causal)
        return project(y.reshape(x.shape), "out_proj", 1.0)


class CLIPMLP(Part):
    """Two layers and the configuration's activation."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c = self.config

        def linear(features: int, std: float, name: str) -> Dense:
            return self.dense(features, kernel_init=nn.initializers.normal(std), name=name)

        y = linear(c.intermediate_size, (2 * c.hidden_size) ** -0.5, "fc1")(x)
        out_std = (2 * c.num_hidden_layers * c.hidden_size) ** -0.5
        return linear(c.hidden_size, out_std, "fc2")(ACTIVATIONS[c.hidden_act](y))


def layer_norm(epsilon: float, dtype: Dtype, param_dtype: Dtype) -> nn.LayerNorm:
    """torch.nn.LayerNorm."""
    # The two-pass variance: E[x^2] - E[x]^2 cancels where CLIP's states have a large mean.
    return nn.LayerNorm(epsilon, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False)


class CLIPEncoderLayer(Part):
    """Attention and MLP, each after a norm and beside the input."""

    config: EncoderConfig
    causal: bool

    def setup(self) -> None:
        dtypes = (self.dtype, self.param_dtype)
        self.layer_norm1 = layer_norm(self.config.layer_norm_eps, *dtypes)
        self.self_attn = CLIPAttention(self.config, self.causal, **self.types)
        self.layer_norm2 = layer_norm(self.config.layer_norm_eps, *dtypes)
        self.mlp = CLIPMLP(self.config, **self.types)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(Part):
    """All layers: their last states, and those before the last layer."""

    config: EncoderConfig
    causal: bool
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        layer = nn.remat(CLIPEncoderLayer) if self.remat else CLIPEncoderLayer
        build = partial(layer, self.config, self.causal, **self.types)
        self.layers: Any = (
            build() if self.scan_layers else [build() for _ in range(self.config.num_hidden_layers)]
        )

    def __call__(
        self, x: Float[Array, "b l d"], layers: Int[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        """Output and input of the last layer; with `layers`, the output of so many of them in place
        of that input."""
        if layers is not None:
            return self._after(x, layers)
        if self.scan_layers:
            (x, before), _ = nn.scan(
                lambda layer, carry: ((layer(carry[0]), carry[0]), None),
                variable_axes={"params": 0, COLLECTION: 0},
                split_rngs={"params": True},
                length=self.config.num_hidden_layers,
            )(self.layers, (x, x))
            return x, before
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return x, before

    def _after(
        self, x: Float[Array, "b l d"], layers: Int[Array, " b"]
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        """The number is data, so that another one compiles nothing."""

        def advance(layer: Any, x: Array, kept: Array, done: Any) -> tuple[Array, Array]:
            x = layer(x)
            return x, jnp.where((layers == done)[:, None, None], x, kept)

        if self.scan_layers:

            def body(layer: Any, carry: Any, done: Any) -> Any:
                return advance(layer, carry[0], carry[1], done), None

            counts = jnp.arange(1, self.config.num_hidden_layers + 1)
            scanned: Any = nn.scan(
                body, variable_axes={"params": 0, COLLECTION: 0}, split_rngs={"params": True}
            )
            return scanned(self.layers, (x, x), counts)[0]
        kept = x
        for done, layer in enumerate(self.layers, start=1):
            x, kept = advance(layer, x, kept, done)
        return x, kept


def embedding_table(
    count: int, features: int, dtype: Dtype, param_dtype: Dtype, init: Callable
) -> nn.Embed:
    """`count` vectors of `features` numbers."""
    return nn.Embed(count, features, dtype=dtype, param_dtype=param_dtype, embedding_init=init)


class CLIPTextEmbeddings(nn.Module):
    """Of tokens and of their positions."""

    config: CLIPTextConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        options = (c.hidden_size, self.dtype, self.param_dtype, nn.initializers.normal(0.02))
        self.token_embedding = embedding_table(c.vocab_size, *options)
        self.position_embedding = embedding_table(c.max_position_embeddings, *options)

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ConfigError(
                f"CLIP's text encoder reads at most max_position_embeddings="
                f"{self.config.max_position_embeddings} tokens, got {length}"
            )
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(length))[None]


class CLIPTextTransformer(Part):
    """Embeddings, causal encoder and norm, and the state at the end of the text."""

    config: CLIPTextConfig
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        dtypes = (self.dtype, self.param_dtype)
        self.embeddings = CLIPTextEmbeddings(self.config, *dtypes)
        repeated = (self.scan_layers, self.remat)
        self.encoder = CLIPEncoder(self.config, True, *repeated, **self.types)
        self.final_layer_norm = layer_norm(self.config.layer_norm_eps, *dtypes)

    def __call__(
        self, input_ids: Int[Array, "b l"], layers: Int[Array, " b"] | None = None
    ) -> CLIPTextOutput:
        last, before = self.encoder(self.embeddings(input_ids), layers)
        last = self.final_layer_norm(last)
        # The published configs give a wrong eos_token_id, 2, and CLIP was trained to pool at the
        # highest id, which is the end-of-text token. A true eos_token_id pools at its first place.
        eos = self.config.eos_token_id
        position = jnp.argmax(input_ids if eos == _PUBLISHED_EOS else input_ids == eos, axis=-1)
        pooled = jnp.take_along_axis(last, position[:, None, None], axis=1)[:, 0]
        if layers is not None:
            last = self.final_layer_norm(before)
        return CLIPTextOutput(last, before, pooled, None)


class CLIPTextModel(Part):
    """Token ids -> CLIPTextOutput, FLUX's first text encoder."""

    config: CLIPTextConfig
    scan_layers: bool = False
    remat: bool = False

    def setup(self) -> None:
        repeated = (self.scan_layers, self.remat)
        self.text_model = CLIPTextTransformer(self.config, *repeated, **self.types)
        if self.config.with_projection:
            self.text_projection = projection(self.config, **self.types)

    def __call__(
        self, input_ids: Int[Array, "b l"], layers: Int[Array, " b"] | None = None
    ) -> CLIPTextOutput:
        """`layers`: see `CLIPTextOutput`."""
        output = self.text_model(input_ids, layers)
        if not self.config.with_projection:
            return output
        return output.replace(text_embeds=self.text_projection(output.pooler_output))


def projection(
    config: CLIPTextConfig | CLIPVisionConfig,
    dtype: Dtype,
    param_dtype: Dtype,
    precision: Precision = None,
) -> Dense:
    """Into the space that texts and pictures share; without bias."""
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision}
    init = nn.initializers.normal(config.hidden_size**-0.5)
    return Dense(config.projection_dim, use_bias=False, kernel_init=init, **types)
