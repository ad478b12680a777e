"""The two blocks of FLUX and their parts, named as diffusers' `transformer_flux.py` names them.

Modulation (adaLN) is split in two: `modulation` turns the conditioning vector into shifts, scales
and gates, and `__call__` applies them. A sampler computes those of all its steps at once.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.config import FluxConfig
from fluxjax.models.attention import AttentionKind, dot_product_attention
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import Rope, apply_rope
from fluxjax.models.norms import LayerNorm, RMSNorm

_zeros = nn.initializers.zeros_init()


class AdaLayerNorm(Part):
    """Layer norm shifted and scaled by the conditioning vector; `parts` vectors come from it.

    The linear layer starts at zero, so that every block of a new model is the identity
    (Peebles and Xie, "Scalable diffusion models with transformers", adaLN-zero).
    """

    dim: int
    parts: int

    def setup(self) -> None:
        self.linear = self.dense(self.parts * self.dim, kernel_init=_zeros)
        self.norm = LayerNorm(dtype=self.dtype)

    def modulation(self, vector: Float[Array, "n d"]) -> Float[Array, "n parts d"]:
        return self.linear(nn.silu(vector)).reshape(vector.shape[0], self.parts, self.dim)

    def __call__(
        self, x: Float[Array, "b l d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
    ) -> Float[Array, "b l d"]:
        return _modulate(self.norm(x), shift, scale)


def _modulate(x, shift, scale):
    return x * (1 + scale[:, None, :]) + shift[:, None, :]


class GELUProjection(Part):
    dim: int

    def setup(self) -> None:
        self.proj = self.dense(self.dim)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l mlp"]:
        return nn.gelu(self.proj(x), approximate=True)


class FeedForward(Part):
    """Linear, tanh GELU, Linear; `net_0` and `net_2` as in diffusers' `FeedForward`."""

    dim: int
    mlp_dim: int

    def setup(self) -> None:
        self.net_0 = GELUProjection(self.mlp_dim, **self.types)
        self.net_2 = self.dense(self.dim)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.net_2(self.net_0(x))


class SingleAttention(Part):
    """Self-attention over the joint sequence, without an output projection."""

    config: FluxConfig
    attention: AttentionKind = "auto"

    def setup(self) -> None:
        dim, bias = self.config.inner_dim, self.config.qkv_bias
        self.to_q, self.to_k, self.to_v = (self.dense(dim, use_bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(**self.types) for _ in range(2))

    def __call__(self, x: Float[Array, "b l d"], rope: Rope) -> Float[Array, "b l d"]:
        q, k, v = (_heads(to(x), self.config) for to in (self.to_q, self.to_k, self.to_v))
        q, k = apply_rope(self.norm_q(q), rope), apply_rope(self.norm_k(k), rope)
        out = dot_product_attention(q, k, v, implementation=self.attention)
        return out.reshape(x.shape)


class JointAttention(Part):
    """Attention over [text, image], with separate projections for the two."""

    config: FluxConfig
    attention: AttentionKind = "auto"

    def setup(self) -> None:
        dim, bias = self.config.inner_dim, self.config.qkv_bias
        self.to_q, self.to_k, self.to_v = (self.dense(dim, use_bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(**self.types) for _ in range(2))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            self.dense(dim, use_bias=bias) for _ in range(3)
        )
        self.norm_added_q, self.norm_added_k = (RMSNorm(**self.types) for _ in range(2))
        self.to_out_0, self.to_add_out = self.dense(dim), self.dense(dim)

    def __call__(
        self, image: Float[Array, "b image d"], text: Float[Array, "b text d"], rope: Rope
    ) -> tuple[Float[Array, "b image d"], Float[Array, "b text d"]]:
        config = self.config
        q, k, v = (_heads(to(image), config) for to in (self.to_q, self.to_k, self.to_v))
        text_q, text_k, text_v = (
            _heads(to(text), config) for to in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        q = jnp.concatenate([self.norm_added_q(text_q), self.norm_q(q)], axis=1)
        k = jnp.concatenate([self.norm_added_k(text_k), self.norm_k(k)], axis=1)
        v = jnp.concatenate([text_v, v], axis=1)
        out = dot_product_attention(
            apply_rope(q, rope), apply_rope(k, rope), v, implementation=self.attention
        ).reshape(image.shape[0], -1, config.inner_dim)
        length = text.shape[1]
        return self.to_out_0(out[:, length:]), self.to_add_out(out[:, :length])


def _heads(x: Float[Array, "b l d"], config: FluxConfig) -> Float[Array, "b l heads k"]:
    return x.reshape(*x.shape[:2], config.num_attention_heads, config.attention_head_dim)


class DoubleBlock(Part):
    """Text and image streams with their own weights and one joint attention."""

    config: FluxConfig
    attention: AttentionKind = "auto"

    def setup(self) -> None:
        config = self.config
        self.norm1 = AdaLayerNorm(config.inner_dim, 6, **self.types)
        self.norm1_context = AdaLayerNorm(config.inner_dim, 6, **self.types)
        self.attn = JointAttention(config, attention=self.attention, **self.types)
        self.norm2, self.norm2_context = (LayerNorm(dtype=self.dtype) for _ in range(2))
        self.ff = FeedForward(config.inner_dim, config.mlp_dim, **self.types)
        self.ff_context = FeedForward(config.inner_dim, config.mlp_dim, **self.types)

    def modulation(
        self, carry: None, vector: Float[Array, "n d"]
    ) -> tuple[None, tuple[Float[Array, "n 6 d"], Float[Array, "n 6 d"]]]:
        return carry, (self.norm1.modulation(vector), self.norm1_context.modulation(vector))

    def __call__(
        self,
        streams: tuple[Float[Array, "b image d"], Float[Array, "b text d"]],
        modulation: tuple[Float[Array, "b 6 d"], Float[Array, "b 6 d"]],
        rope: Rope,
    ) -> tuple[tuple[Float[Array, "b image d"], Float[Array, "b text d"]], None]:
        image, text = streams
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _parts(modulation[0])
        c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = _parts(modulation[1])
        image_out, text_out = self.attn(
            self.norm1(image, shift, scale), self.norm1_context(text, c_shift, c_scale), rope
        )
        image = image + gate[:, None, :] * image_out
        image_mlp = self.ff(_modulate(self.norm2(image), mlp_shift, mlp_scale))
        image = image + mlp_gate[:, None, :] * image_mlp
        text = text + c_gate[:, None, :] * text_out
        text_mlp = self.ff_context(_modulate(self.norm2_context(text), c_mlp_shift, c_mlp_scale))
        text = text + c_mlp_gate[:, None, :] * text_mlp
        return (image, text), None


class SingleBlock(Part):
    """Attention and MLP in parallel over the joint sequence."""

    config: FluxConfig
    attention: AttentionKind = "auto"

    def setup(self) -> None:
        config = self.config
        self.norm = AdaLayerNorm(config.inner_dim, 3, **self.types)
        self.proj_mlp = self.dense(config.mlp_dim)
        self.attn = SingleAttention(config, attention=self.attention, **self.types)
        self.proj_out = self.dense(config.inner_dim)

    def modulation(
        self, carry: None, vector: Float[Array, "n d"]
    ) -> tuple[None, Float[Array, "n 3 d"]]:
        return carry, self.norm.modulation(vector)

    def __call__(
        self, x: Float[Array, "b l d"], modulation: Float[Array, "b 3 d"], rope: Rope
    ) -> tuple[Float[Array, "b l d"], None]:
        shift, scale, gate = _parts(modulation)
        normed = self.norm(x, shift, scale)
        mlp = nn.gelu(self.proj_mlp(normed), approximate=True)
        out = self.proj_out(jnp.concatenate([self.attn(normed, rope), mlp], axis=-1))
        return x + gate[:, None, :] * out, None


def _parts(modulation: Float[Array, "b parts d"]) -> list[Float[Array, "b d"]]:
    return [modulation[:, i] for i in range(modulation.shape[1])]
