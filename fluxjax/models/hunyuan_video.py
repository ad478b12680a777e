"""The transformer of HunyuanVideo: FLUX's over the tokens of a video and of refined text.

Taken apart as in `fluxjax.models.flux`, but for the text, whose refiner reads the timestep: a run
calls `embed_text` at each step. Text is padded at its end and follows the video, so that lengths
say which tokens are seen. Source: diffusers `transformer_hunyuan_video.py`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from fluxjax.config import HunyuanVideoConfig
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import Rope, TimestepRounding, TimeTextEmbed
from fluxjax.models.flux import FluxVelocity, Modulations
from fluxjax.models.flux_blocks import DoubleBlock, Marks
from fluxjax.models.latents import pack_video, text_ids, unpack_video, video_ids
from fluxjax.models.products import affine
from fluxjax.models.repeated_blocks import modulations_of
from fluxjax.models.transformer_blocks import AdaLayerNorm, Attention, FeedForward, parts


class TextLastBlock(DoubleBlock):
    """FLUX's double block, with the text behind the image."""

    text_last = True


class RefinerBlock(Part):
    """A transformer block of text alone, whose branches have gates and no other modulation."""

    config: HunyuanVideoConfig

    def setup(self) -> None:
        config = self.config
        self.norm1, self.norm2 = (
            nn.LayerNorm(
                1e-6, dtype=self.dtype, param_dtype=self.param_dtype, use_fast_variance=False
            )
            for _ in range(2)
        )
        self.attn = Attention(config.num_attention_heads, **self.types)
        self.ff = FeedForward(config.inner_dim, 4 * config.inner_dim, "silu", **self.types)
        self.norm_out = AdaLayerNorm(config.inner_dim, 2, **self.types)  # its layer, not its norm

    def __call__(
        self, x: Float[Array, "b l d"], vector: Float[Array, "b d"], lengths: Int[Array, " b"]
    ) -> Float[Array, "b l d"]:
        gate, mlp_gate = parts(self.norm_out.modulation(vector))
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, lengths) * gate[:, None, :]
        return x + self.ff(self.norm2(x)) * mlp_gate[:, None, :]


class RefinerBlocks(Part):
    """One after the other."""

    config: HunyuanVideoConfig

    def setup(self) -> None:
        count = self.config.num_refiner_layers
        self.refiner_blocks = [RefinerBlock(self.config, **self.types) for _ in range(count)]

    def __call__(self, x: Array, vector: Array, lengths: Array) -> Float[Array, "b l d"]:
        for block in self.refiner_blocks:
            x = block(x, vector, lengths)
        return x


class TokenRefiner(Part):
    """A language model's states in the transformer's width, refined as the timestep asks."""

    config: HunyuanVideoConfig

    def setup(self) -> None:
        width = self.config.inner_dim
        self.time_text_embed = TimeTextEmbed(width, False, None, **self.types)
        self.proj_in = self.dense(width)
        self.token_refiner = RefinerBlocks(self.config, **self.types)

    def __call__(
        self,
        states: Float[Array, "b l joint"],
        timestep: Float[Array, " b"],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b l d"]:
        """States from `lengths` on are padding, and what is returned there has no meaning."""
        real = (jnp.arange(states.shape[1])[None] < lengths[:, None])[..., None]
        total = jnp.where(real, states, 0).astype(jnp.float32).sum(axis=1)
        mean = (total / lengths[:, None].astype(jnp.float32)).astype(states.dtype)
        vector = self.time_text_embed(timestep, mean)
        return self.token_refiner(self.proj_in(states), vector, lengths)


class VideoPatches(Part):
    """A convolution over the rows and columns of each frame, whose stride is its size."""

    dim: int
    patch: int

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n pixels"]) -> Float[Array, "b n d"]:
        """Of tokens that `pack_video` makes: channels are outermost."""
        channels = tokens.shape[-1] // self.patch**2
        shape = (1, self.patch, self.patch, channels, self.dim)
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2, 3))
        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.dim,), self.param_dtype)
        kernel = jnp.moveaxis(kernel.astype(self.dtype), 3, 0).reshape(-1, self.dim)
        return affine(tokens.astype(self.dtype), kernel, bias.astype(self.dtype), self.precision)


class VideoPatchEmbed(Part):
    """Patches of a frame's latents, which are tokens already."""

    dim: int
    patch: int

    def setup(self) -> None:
        self.proj = VideoPatches(self.dim, self.patch, **self.types)

    def __call__(self, tokens: Float[Array, "b n pixels"]) -> Float[Array, "b n d"]:
        return self.proj(tokens)


class HunyuanVideoTransformer(FluxVelocity):
    """Predicts the velocity (noise - data) of a video's latents."""

    config: HunyuanVideoConfig
    timestep_rounding: TimestepRounding | None = None
    double_block = TextLastBlock
    text_last = True

    def _context_embedder(self) -> Any:
        return TokenRefiner(self.config, **self.types)

    def _x_embedder(self) -> Any:
        return VideoPatchEmbed(self.config.inner_dim, self.config.patch_size, **self.types)

    def pack(self, latents: Float[Array, "b c frames h w"]) -> Float[Array, "b image in_channels"]:
        """Latents as tokens, see `latents.pack_video`."""
        return jnp.asarray(pack_video(latents, self.config.patch_size))

    def unpack(
        self, tokens: Float[Array, "b image out_channels"], rows: int, columns: int
    ) -> Float[Array, "b c frames h w"]:
        """The inverse, for frames of `rows` x `columns` latents."""
        return jnp.asarray(unpack_video(tokens, rows, columns, self.config.patch_size))

    def embed_text(
        self,
        encoder_hidden_states: Float[Array, "b text joint"],
        timestep: Float[Array, " b"],
        lengths: Int[Array, " b"],
    ) -> Float[Array, "b text d"]:
        """Refined text; states from `lengths` on are padding."""
        states = encoder_hidden_states.astype(self.dtype)
        return self.context_embedder(states, timestep, lengths)

    def modulations(
        self,
        timestep: Float[Array, " b"],
        pooled_projections: Float[Array, "b pooled"],
        guidance: Float[Array, " b"] | None = None,
    ) -> Modulations:
        """Everything the blocks take from timestep, guidance and pooled text.

        Where tokens are replaced, the picture's modulations and those of single blocks have twice
        as many vectors, the second half for tokens that are free of noise.
        """
        usual = super().modulations(timestep, pooled_projections, guidance)
        if self.config.image_condition_type != "token_replace":
            return usual
        zero = jnp.zeros_like(timestep)
        clean = self.time_text_embed(zero, pooled_projections, guided=False)

        def with_clean(vectors: Any, own: Any) -> Any:
            return None if vectors is None else jnp.concatenate([vectors, own], axis=-2)

        image, _ = modulations_of(self.transformer_blocks, clean) or (None, None)
        single = modulations_of(self.single_transformer_blocks, clean)
        return usual._replace(
            image=with_clean(usual.image, image), single=with_clean(usual.single, single)
        )

    def denoise(
        self,
        tokens: Float[Array, "b image in_channels"],
        text: Float[Array, "b text d"],
        modulations: Modulations,
        rope: Rope,
        key_lengths: Int[Array, " b"],
        replaced: Bool[Array, " image"] | None = None,
    ) -> Float[Array, "b image out_channels"]:
        """One step of `pack`ed latents, given what `embed_text`, `modulations` and `rope` return.

        `key_lengths`: tokens of the video and of text without its padding. `replaced`: the tokens
        of a first frame that is given (token_replace).
        """
        marks = Marks(key_lengths, replaced)
        return self.velocity(self.x_embedder(tokens), text, modulations, rope, marks=marks)

    def positions(self, frames: int, rows: int, columns: int, text: int) -> Rope:
        """Rotary tables of latents of `rows` x `columns`, and of text, which is not rotated."""
        ids: Num[Array, "image 3"] = video_ids(frames, rows, columns, self.config.patch_size)
        return self.rope(text_ids(text), ids)

    def replaced(self, frames: int, rows: int, columns: int) -> Bool[Array, " image"] | None:
        """The tokens of the first frame; None where none are replaced."""
        if self.config.image_condition_type != "token_replace":
            return None
        tokens = rows * columns // self.config.patch_size**2
        return jnp.arange(frames * tokens) < tokens

    def __call__(
        self,
        hidden_states: Float[Array, "b in_channels frames h w"],
        timestep: Float[Array, " b"],
        encoder_hidden_states: Float[Array, "b text joint"],
        encoder_attention_mask: Num[Array, "b text"],
        pooled_projections: Float[Array, "b pooled"],
        guidance: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b out_channels frames h w"]:
        """`timestep` is that of training, 0 (clean) to 1000 (pure noise); `guidance` is the scale,
        which diffusers multiplies by 1000. The mask is 1 at text and 0 at padding, at its end."""
        frames, rows, columns = hidden_states.shape[2:]
        lengths = encoder_attention_mask.sum(axis=1).astype(jnp.int32)
        tokens = self.pack(hidden_states)
        velocity = self.denoise(
            tokens,
            self.embed_text(encoder_hidden_states, timestep, lengths),
            self.modulations(timestep, pooled_projections, guidance),
            self.positions(frames, rows, columns, encoder_hidden_states.shape[1]),
            tokens.shape[1] + lengths,
            self.replaced(frames, rows, columns),
        )
        return self.unpack(velocity, rows, columns)
