"""The two blocks of FLUX, named as diffusers' `transformer_flux.py` names them.

Modulation (adaLN) is split in two: `modulation` turns the conditioning vector into shifts, scales
and gates, and `__call__` applies them. A sampler computes those of all its steps at once.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fluxjax.config import FluxConfig
from fluxjax.models.attention import AttentionKind, dot_product_attention
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import Rope, apply_rope
from fluxjax.models.norms import LayerNorm, RMSNorm
from fluxjax.models.repeated_blocks import BROADCAST, EACH
from fluxjax.models.transformer_blocks import (
    AdaLayerNorm,
    FeedForward,
    ImagePrompt,
    JointAttention,
    modulate,
    over_tokens,
    parts,
    split_heads,
)

Samples = Float[Array, "n b image d"]
"""What ControlNets add; every block takes one."""


class Additions(NamedTuple):
    """What is added to the picture's tokens after one block, or with a leading axis after each."""

    sample: Int[Array | np.ndarray, "*layers"] | None = None
    """Which of the samples."""
    prompts: tuple[ImagePrompt, ...] = ()
    """Of double blocks."""


NOTHING = Additions()


class Marks(NamedTuple):
    """What sets tokens of the picture, or of the joint sequence, apart."""

    key_lengths: Int[Array, " b"] | None = None
    """How many of the joint sequence are no padding, which comes last; None: all."""
    replaced: Bool[Array, " tokens"] | None = None
    """Those that the second half of each modulation is for (see `parts`); None: all have one."""


UNMARKED = Marks()


class SingleAttention(Part):
    """Self-attention over the joint sequence, without an output projection."""

    config: FluxConfig
    attention: AttentionKind = "auto"

    def setup(self) -> None:
        dim, bias = self.config.inner_dim, self.config.qkv_bias
        self.to_q, self.to_k, self.to_v = (self.dense(dim, use_bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(**self.types) for _ in range(2))

    def __call__(
        self, x: Float[Array, "b l d"], rope: Rope, key_lengths: Int[Array, " b"] | None = None
    ) -> Float[Array, "b l d"]:
        q, k, v = (
            split_heads(to(x), self.config.num_attention_heads)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        q, k = apply_rope(self.norm_q(q), rope), apply_rope(self.norm_k(k), rope)
        out = dot_product_attention(q, k, v, key_lengths=key_lengths, implementation=self.attention)
        return out.reshape(x.shape)


class DoubleBlock(Part):
    """Text and image streams with their own weights and one joint attention."""

    text_last: ClassVar[bool] = False
    config: FluxConfig
    attention: AttentionKind = "auto"
    axes: ClassVar = (EACH, BROADCAST, EACH, BROADCAST, BROADCAST)

    def setup(self) -> None:
        config = self.config
        self.norm1 = AdaLayerNorm(config.inner_dim, 6, **self.types)
        self.norm1_context = AdaLayerNorm(config.inner_dim, 6, **self.types)
        self.attn = JointAttention(
            config.num_attention_heads,
            config.attention_head_dim,
            qkv_bias=config.qkv_bias,
            text_last=self.text_last,
            attention=self.attention,
            **self.types,
        )
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
        modulation: tuple[Float[Array, "b image_parts d"], Float[Array, "b 6 d"]],
        rope: Rope,
        added: Additions = NOTHING,
        samples: Samples | None = None,
        marks: Marks = UNMARKED,
    ) -> tuple[tuple[Float[Array, "b image d"], Float[Array, "b text d"]], None]:
        image, text = streams
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts(modulation[0], marks.replaced)
        c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = parts(modulation[1])
        image_out, text_out, seen = self.attn(
            self.norm1(image, shift, scale),
            self.norm1_context(text, c_shift, c_scale),
            rope,
            added.prompts,
            marks.key_lengths,
        )
        assert text_out is not None
        image = image + over_tokens(gate) * image_out
        image_mlp = self.ff(modulate(self.norm2(image), mlp_shift, mlp_scale))
        image = image + over_tokens(mlp_gate) * image_mlp
        if seen is not None:
            image = image + seen
        if samples is not None:
            image = image + samples[added.sample]
        text = text + over_tokens(c_gate) * text_out
        text_mlp = self.ff_context(modulate(self.norm2_context(text), c_mlp_shift, c_mlp_scale))
        text = text + over_tokens(c_mlp_gate) * text_mlp
        return (image, text), None


class SingleBlock(Part):
    """Attention and MLP in parallel over the joint sequence."""

    config: FluxConfig
    attention: AttentionKind = "auto"
    axes: ClassVar = (EACH, BROADCAST, EACH, BROADCAST, BROADCAST)

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
        modulation: Float[Array, "b parts d"],
        rope: Rope,
        added: Additions = NOTHING,
        samples: Samples | None = None,
        marks: Marks = UNMARKED,
    ) -> tuple[Float[Array, "b l d"], None]:
        shift, scale, gate = parts(modulation, marks.replaced)
        normed = self.norm(x, shift, scale)
        mlp = nn.gelu(self.proj_mlp(normed), approximate=True)
        seen = self.attn(normed, rope, marks.key_lengths)
        out = self.proj_out(seen, mlp)
        x = x + over_tokens(gate) * out
        if samples is not None:
            text = x.shape[1] - samples.shape[2]
            x = jnp.concatenate([x[:, :text], x[:, text:] + samples[added.sample]], axis=1)
        return x, None
