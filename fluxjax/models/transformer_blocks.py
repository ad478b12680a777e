"""Parts that diffusion transformers share, named as diffusers' `attention.py` names them.

Modulation (adaLN) is split in two: `modulation` turns the conditioning vector into shifts, scales
and gates, and `__call__` applies them. A sampler computes those of all its steps at once.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fluxjax.config import Activation
from fluxjax.models.activation import ACTIVATIONS
from fluxjax.models.attention import AttentionKind, dot_product_attention
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import Rope, apply_rope
from fluxjax.models.norms import LayerNorm, RMSNorm
from fluxjax.models.products import affine

_zeros = nn.initializers.zeros_init()

Vector = Float[Array, "b d"] | Float[Array, "b l d"]
"""A shift, scale or gate: for all tokens of a row or for each of them."""


class ImagePrompt(NamedTuple):
    """What the picture's tokens attend to besides the joint sequence (IP-Adapter). In a scanned
    network every leaf has a leading axis of layers."""

    keys: Float[Array, "*layers b tokens d"]
    values: Float[Array, "*layers b tokens d"]
    scale: Float[Array, "*layers"]


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

    def __call__(self, x: Float[Array, "b l d"], shift: Vector, scale: Vector) -> Array:
        return modulate(self.norm(x), shift, scale)


def modulate(x, shift, scale):
    """A vector, (b, d) or one for each token, scales and shifts (b, l, d)."""
    return x * (1 + over_tokens(scale)) + over_tokens(shift)


def over_tokens(vector: Vector) -> Float[Array, "b #l d"]:
    """A vector for all tokens of a row, or one for each, beside (b, l, d)."""
    return vector if vector.ndim == 3 else vector[:, None, :]


class ActivatedProjection(Part):
    """A linear layer and its activation."""

    dim: int
    activation: Activation = "gelu_new"

    def setup(self) -> None:
        self.proj = self.dense(self.dim)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l mlp"]:
        return ACTIVATIONS[self.activation](self.proj(x))


class FeedForward(Part):
    """Linear, tanh GELU or another, Linear; `net_0` and `net_2` as in diffusers' `FeedForward`."""

    dim: int
    mlp_dim: int
    activation: Activation = "gelu_new"

    def setup(self) -> None:
        self.net_0 = ActivatedProjection(self.mlp_dim, self.activation, **self.types)
        self.net_2 = self.dense(self.dim)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.net_2(self.net_0(x))


class Attention(Part):
    """Of the tokens `x` to `other`, which may be `x`."""

    heads: int
    qkv_bias: bool = True
    qk_norm: bool = False
    attention: AttentionKind = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        other: Float[Array, "b m d"],
        key_lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b n c"]:
        """`key_lengths`: how many of `other`, from the first on, are seen; all where None."""
        width = x.shape[-1]

        def split(name: str, tokens: Array) -> Float[Array, "b m heads k"]:
            dense = self.dense(width, use_bias=self.qkv_bias, name=name)
            return split_heads(dense(tokens), self.heads)

        q, k, v = split("to_q", x), split("to_k", other), split("to_v", other)
        if self.qk_norm:
            q, k = (RMSNorm(**self.types, name=f"norm_{n}")(y) for n, y in (("q", q), ("k", k)))
        out = dot_product_attention(
            q, k, v, key_lengths=key_lengths, implementation=self.attention
        ).reshape(x.shape)
        return self.dense(width, name="to_out_0")(out)


class JointAttention(Part):
    """Attention over [text, image], or [image, text], with separate projections for the two."""

    heads: int
    head_dim: int
    qkv_bias: bool = True
    qk_norm: bool = True
    text_out: bool = True
    """Whether the text goes on; the last block of Stable Diffusion 3 drops it."""
    text_last: bool = False
    """Whether the text follows the image, as text that is padded must."""
    attention: AttentionKind = "auto"

    def setup(self) -> None:
        dim, bias = self.heads * self.head_dim, self.qkv_bias
        self.to_q, self.to_k, self.to_v = (self.dense(dim, use_bias=bias) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            self.dense(dim, use_bias=bias) for _ in range(3)
        )
        if self.qk_norm:
            self.norm_q, self.norm_k = (RMSNorm(**self.types) for _ in range(2))
            self.norm_added_q, self.norm_added_k = (RMSNorm(**self.types) for _ in range(2))
        self.to_out_0 = self.dense(dim)
        if self.text_out:
            self.to_add_out = self.dense(dim)

    def __call__(
        self,
        image: Float[Array, "b image d"],
        text: Float[Array, "b text d"],
        rope: Rope | None = None,
        prompts: tuple[ImagePrompt, ...] = (),
        key_lengths: Int[Array, " b"] | None = None,
    ) -> tuple[
        Float[Array, "b image d"], Float[Array, "b text d"] | None, Float[Array, "b image d"] | None
    ]:
        """Image, text, and what the image's tokens see of all image prompts, if there is one.

        `rope` and `key_lengths`, how many tokens are no padding, are of the joint sequence.
        """
        q, k, v = (split_heads(to(image), self.heads) for to in (self.to_q, self.to_k, self.to_v))
        text_q, text_k, text_v = (
            split_heads(to(text), self.heads)
            for to in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        if self.qk_norm:
            q, k = self.norm_q(q), self.norm_k(k)
            text_q, text_k = self.norm_added_q(text_q), self.norm_added_k(text_k)
        joint_q, joint_k, v = (
            jnp.concatenate(joined(*pair, self.text_last), axis=1)
            for pair in ((text_q, q), (text_k, k), (text_v, v))
        )
        if rope is not None:
            joint_q, joint_k = apply_rope(joint_q, rope), apply_rope(joint_k, rope)
        out = dot_product_attention(
            joint_q, joint_k, v, key_lengths=key_lengths, implementation=self.attention
        )
        out = out.reshape(*out.shape[:2], -1)
        each = [_see(q, prompt) for prompt in prompts]
        seen = sum(each[1:], start=each[0]) if each else None
        of_text, of_image = places(text.shape[1], image.shape[1], self.text_last)
        text_out = self.to_add_out(out[:, of_text]) if self.text_out else None
        return self.to_out_0(out[:, of_image]), text_out, seen


def _see(q: Float[Array, "b image heads k"], prompt: ImagePrompt) -> Float[Array, "b image d"]:
    """Attention to an image prompt, by queries that are not rotated yet."""
    keys, values = (split_heads(x, q.shape[2]) for x in (prompt.keys, prompt.values))
    out = dot_product_attention(q, keys, values, implementation="xla")
    return prompt.scale.astype(q.dtype) * out.reshape(*q.shape[:2], -1)


def joined(text: Array, image: Array, text_last: bool) -> tuple[Array, Array]:
    """Both in the order of the joint sequence."""
    return (image, text) if text_last else (text, image)


def places(text: int, image: int, text_last: bool) -> tuple[slice, slice]:
    """Where in the joint sequence text and image of so many tokens stand."""
    return (slice(image, None), slice(image)) if text_last else (slice(text), slice(text, None))


def split_heads(x: Float[Array, "b l d"], heads: int) -> Float[Array, "b l heads k"]:
    """The width, shared out among the heads."""
    return x.reshape(*x.shape[:2], heads, -1)


def parts(
    modulation: Float[Array, "b parts d"], replaced: Bool[Array, " l"] | None = None
) -> list[Vector]:
    """Each vector of a modulation. Where tokens are `replaced` its second half is theirs, and the
    first the others'."""
    vectors = [modulation[:, i] for i in range(modulation.shape[1])]
    if replaced is None:
        return vectors
    usual, own = vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :]
    return [
        jnp.where(replaced[None, :, None], mine[:, None], other[:, None])
        for other, mine in zip(usual, own, strict=True)
    ]


class PatchProjection(Part):
    """A convolution whose stride is its size, as one product with the pixels of each patch."""

    dim: int
    patch: int

    @nn.compact
    def __call__(self, patches: Float[Array, "b n pixels"]) -> Float[Array, "b n d"]:
        channels = patches.shape[-1] // self.patch**2
        shape = (self.patch, self.patch, channels, self.dim)
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2))
        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", _zeros, (self.dim,), self.param_dtype)
        kernel = kernel.astype(self.dtype).reshape(-1, self.dim)
        return affine(patches.astype(self.dtype), kernel, bias.astype(self.dtype), self.precision)


class PatchEmbed(Part):
    """Patches of latents as tokens, each with its position added."""

    dim: int
    patch: int

    def setup(self) -> None:
        self.proj = PatchProjection(self.dim, self.patch, **self.types)

    def __call__(
        self, patches: Float[Array, "b n pixels"], positions: Float[Array, "n d"]
    ) -> Float[Array, "b n d"]:
        tokens = self.proj(patches)
        return (tokens + positions[None]).astype(tokens.dtype)


def patchify(latents: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n pixels"]:
    """Patches row by row; inside one the channels are innermost, other than in FLUX's `pack`."""
    b, h, w, c = latents.shape
    x = latents.reshape(b, h // patch, patch, w // patch, patch, c)
    return jnp.swapaxes(x, 2, 3).reshape(b, -1, patch * patch * c)


def unpatchify(
    patches: Float[Array, "b n pixels"], rows: int, columns: int, patch: int
) -> Float[Array, "b h w c"]:
    """The inverse of `patchify`, for latents of `rows` x `columns`."""
    b = patches.shape[0]
    x = patches.reshape(b, rows // patch, columns // patch, patch, patch, -1)
    return jnp.swapaxes(x, 2, 3).reshape(b, rows, columns, -1)
