"""The two blocks of FLUX and their parts, named as diffusers' `transformer_flux.py` names them.

Modulation (adaLN) is split in two: `modulation` turns the conditioning vector into shifts, scales
and gates, and `__call__` applies them. A sampler computes those of all its steps at once.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fluxjax.config import FluxConfig
from fluxjax.models.attention import AttentionKind, dot_product_attention
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import Rope, apply_rope
from fluxjax.models.norms import LayerNorm, RMSNorm

_zeros = nn.initializers.zeros_init()
Samples = tuple[Float[Array, "n b image d"], ...]
"""What each ControlNet adds: its samples, of which every block takes one."""


class ImagePrompt(NamedTuple):
    """What the picture's tokens attend to besides the joint sequence (IP-Adapter). In a scanned
    network every leaf has a leading axis of layers."""

    keys: Float[Array, "*layers b tokens d"]
    values: Float[Array, "*layers b tokens d"]
    scale: Float[Array, "*layers"]


class Additions(NamedTuple):
    """What is added to the picture's tokens after one block, or with a leading axis after each."""

    samples: tuple[Int[Array | np.ndarray, "*layers"], ...] = ()
    """For each ControlNet, which of its samples."""
    prompt: ImagePrompt | None = None
    """Of double blocks."""


NOTHING = Additions()


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
        self,
        image: Float[Array, "b image d"],
        text: Float[Array, "b text d"],
        rope: Rope,
        prompt: ImagePrompt | None = None,
    ) -> tuple[
        Float[Array, "b image d"], Float[Array, "b text d"], Float[Array, "b image d"] | None
    ]:
        """Image, text, and what the image's tokens see of the image prompt, if there is one."""
        config = self.config
        q, k, v = (_heads(to(image), config) for to in (self.to_q, self.to_k, self.to_v))
        text_q, text_k, text_v = (
            _heads(to(text), config) for to in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        text_q, normed = self.norm_added_q(text_q), self.norm_q(q)
        q = jnp.concatenate([text_q, normed], axis=1)
        k = jnp.concatenate([self.norm_added_k(text_k), self.norm_k(k)], axis=1)
        v = jnp.concatenate([text_v, v], axis=1)
        out = dot_product_attention(
            apply_rope(q, rope), apply_rope(k, rope), v, implementation=self.attention
        ).reshape(image.shape[0], -1, config.inner_dim)
        length = text.shape[1]
        seen = None if prompt is None else _see(normed, prompt, config)
        return self.to_out_0(out[:, length:]), self.to_add_out(out[:, :length]), seen


def _see(
    q: Float[Array, "b image heads k"], prompt: ImagePrompt, config: FluxConfig
) -> Float[Array, "b image d"]:
    """Attention to an image prompt, by queries that are not rotated yet."""
    keys, values = (_heads(x, config) for x in (prompt.keys, prompt.values))
    out = dot_product_attention(q, keys, values, implementation="xla")
    return prompt.scale.astype(q.dtype) * out.reshape(*q.shape[:2], -1)


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
        added: Additions = NOTHING,
        samples: Samples = (),
    ) -> tuple[tuple[Float[Array, "b image d"], Float[Array, "b text d"]], None]:
        image, text = streams
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _parts(modulation[0])
        c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = _parts(modulation[1])
        image_out, text_out, seen = self.attn(
            self.norm1(image, shift, scale),
            self.norm1_context(text, c_shift, c_scale),
            rope,
            added.prompt,
        )
        image = image + gate[:, None, :] * image_out
        image_mlp = self.ff(_modulate(self.norm2(image), mlp_shift, mlp_scale))
        image = image + mlp_gate[:, None, :] * image_mlp
        if seen is not None:
            image = image + seen
        for sample, index in zip(samples, added.samples, strict=True):
            image = image + sample[index]
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
        self,
        x: Float[Array, "b l d"],
        modulation: Float[Array, "b 3 d"],
        rope: Rope,
        added: Additions = NOTHING,
        samples: Samples = (),
    ) -> tuple[Float[Array, "b l d"], None]:
        shift, scale, gate = _parts(modulation)
        normed = self.norm(x, shift, scale)
        mlp = nn.gelu(self.proj_mlp(normed), approximate=True)
        out = self.proj_out(jnp.concatenate([self.attn(normed, rope), mlp], axis=-1))
        x = x + gate[:, None, :] * out
        for sample, index in zip(samples, added.samples, strict=True):
            text = x.shape[1] - sample.shape[2]
            x = jnp.concatenate([x[:, :text], x[:, text:] + sample[index]], axis=1)
        return x, None


def _parts(modulation: Float[Array, "b parts d"]) -> list[Float[Array, "b d"]]:
    return [modulation[:, i] for i in range(modulation.shape[1])]
