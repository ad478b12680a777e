"""Decoder-only language models as text encoders: Llama and Qwen3.

No cache, no head and no sampling: one pass over a prompt gives its states. Source: transformers'
`modeling_llama.py` and `modeling_qwen3.py`, whose names the parameter tree carries.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from fluxjax.config import LlamaConfig
from fluxjax.models.activation import ACTIVATIONS
from fluxjax.models.attention import dot_product_attention
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import Rope, rope_table, rotate_halves
from fluxjax.models.norms import RMSNorm
from fluxjax.models.repeated_blocks import BROADCAST, repeated, run
from fluxjax.models.transformer_blocks import split_heads


class LlamaAttention(Part):
    """Each token attends to itself and those before it; several heads share keys and values."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        queries, others = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        self.q_proj = self.dense(queries, use_bias=c.attention_bias)
        self.k_proj = self.dense(others, use_bias=c.attention_bias)
        self.v_proj = self.dense(others, use_bias=c.attention_bias)
        self.o_proj = self.dense(c.hidden_size, use_bias=c.attention_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.rms_norm_eps, **self.types) for _ in range(2))

    def __call__(
        self, x: Float[Array, "b l d"], rope: Rope, lengths: Int[Array, " b"] | None
    ) -> Float[Array, "b l d"]:
        c = self.config
        q = split_heads(self.q_proj(x), c.num_attention_heads)
        k, v = (split_heads(to(x), c.num_key_value_heads) for to in (self.k_proj, self.v_proj))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_halves(q, rope), rotate_halves(k, rope)
        shared = c.num_attention_heads // c.num_key_value_heads
        k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
        out = dot_product_attention(q, k, v, causal=True, key_lengths=lengths)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class LlamaMLP(Part):
    """Gated by an activation (SwiGLU)."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        self.gate_proj, self.up_proj = (
            self.dense(c.intermediate_size, use_bias=False) for _ in range(2)
        )
        self.down_proj = self.dense(c.hidden_size, use_bias=False)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        activation = ACTIVATIONS[self.config.hidden_act]
        return self.down_proj(activation(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(Part):
    """Attention and MLP, each after a norm and beside the input."""

    config: LlamaConfig
    axes: ClassVar = (BROADCAST, BROADCAST)

    def setup(self) -> None:
        epsilon = self.config.rms_norm_eps
        self.input_layernorm = RMSNorm(epsilon, **self.types)
        self.self_attn = LlamaAttention(self.config, **self.types)
        self.post_attention_layernorm = RMSNorm(epsilon, **self.types)
        self.mlp = LlamaMLP(self.config, **self.types)

    def __call__(
        self, x: Float[Array, "b l d"], rope: Rope, lengths: Int[Array, " b"] | None
    ) -> tuple[Float[Array, "b l d"], None]:
        x = x + self.self_attn(self.input_layernorm(x), rope, lengths)
        return x + self.mlp(self.post_attention_layernorm(x)), None


class LlamaModel(Part):
    """Token ids -> states: of the layer `config.stops_after`, or after all and the last norm."""

    config: LlamaConfig
    scan_layers: bool = False

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )

        def build(layer: Any) -> nn.Module:
            return layer(c, **self.types)

        self.layers = repeated(
            LlamaLayer, build, c.kept_layers, scan=self.scan_layers, remat="none"
        )
        if c.stops_after is None:
            self.norm = RMSNorm(c.rms_norm_eps, **self.types)

    def embed(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Tokens in the width of the layers, among which states of a picture may be put."""
        return self.embed_tokens(input_ids)

    def states(
        self, x: Float[Array, "b l d"], lengths: Int[Array, " b"] | None = None
    ) -> Float[Array, "b l d"]:
        """Of embedded tokens, of which those from `lengths` on are padding."""
        c = self.config
        positions = jnp.arange(x.shape[1])[:, None]
        rope = rope_table(positions, (c.head_dim,), c.rope_theta)
        x, _ = run(self.layers, x, rope, lengths)
        return x if c.stops_after is not None else self.norm(x)

    def __call__(
        self, input_ids: Int[Array, "b l"], attention_mask: Num[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        """`attention_mask` is 1 for tokens, 0 for padding, which comes last."""
        lengths = None
        if attention_mask is not None:
            lengths = attention_mask.sum(axis=1).astype(jnp.int32)
        return self.states(self.embed(input_ids), lengths)
