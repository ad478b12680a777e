"""The transformer of PixArt-alpha and PixArt-Sigma, after diffusers' `pixart_transformer_2d.py`.

One modulation serves all blocks (adaLN-single): each adds a table of its own. As in
`fluxjax.models.flux`, `__call__` is one forward, and a run takes it apart: `positions`,
`embed_text` and `step_modulations` once, `denoise` at each step.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fluxjax.config import PixArtConfig
from fluxjax.config.choices import Remat
from fluxjax.models.attention import AttentionKind
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import TwoLayerEmbedder, sinusoid, sinusoids_2d
from fluxjax.models.norms import LayerNorm
from fluxjax.models.repeated_blocks import BROADCAST, by_steps, repeated, run
from fluxjax.models.transformer_blocks import (
    Attention,
    FeedForward,
    PatchEmbed,
    modulate,
    parts,
    patchify,
    unpatchify,
)


class Modulations(NamedTuple):
    """Shifts, scales and gates of all blocks, and the last norm's; `step_modulations` adds a
    leading axis of steps."""

    blocks: Float[Array, "*steps b 6 d"]
    out: Float[Array, "*steps b 2 d"]


class SizeTimeEmbed(Part):
    """One vector from the timestep and, in alpha at 1024 pixels, height, width and their ratio."""

    dim: int
    sizes: bool

    def setup(self) -> None:
        self.timestep_embedder = TwoLayerEmbedder(self.dim, **self.types)
        if self.sizes:
            self.resolution_embedder = TwoLayerEmbedder(self.dim // 3, **self.types)
            self.aspect_ratio_embedder = TwoLayerEmbedder(self.dim // 3, **self.types)

    def __call__(
        self,
        timestep: Float[Array, " n"],
        resolution: Float[Array, "n 2"] | None,
        aspect_ratio: Float[Array, "n 1"] | None,
    ) -> Float[Array, "n d"]:
        vector = self.timestep_embedder(sinusoid(timestep).astype(self.dtype))
        if not self.sizes:
            return vector
        if resolution is None or aspect_ratio is None:
            raise ValueError("this PixArt needs `resolution` and `aspect_ratio`, got None")
        rows = len(vector)
        size, ratio = (
            embedder(sinusoid(given.reshape(-1)).astype(self.dtype)).reshape(rows, -1)
            for embedder, given in (
                (self.resolution_embedder, resolution),
                (self.aspect_ratio_embedder, aspect_ratio),
            )
        )
        return vector + jnp.concatenate([size, ratio], axis=1)


class AdaLayerNormSingle(Part):
    """The one modulation (Chen et al. 2023, PixArt-alpha, section 2.3)."""

    dim: int
    sizes: bool

    def setup(self) -> None:
        self.emb = SizeTimeEmbed(self.dim, self.sizes, **self.types)
        self.linear = self.dense(6 * self.dim, kernel_init=nn.initializers.normal(0.02))

    def __call__(self, timestep, resolution, aspect_ratio):
        """(n, 6, d) for the blocks, and the vector (n, d) that it is made of."""
        vector = self.emb(timestep, resolution, aspect_ratio)
        return self.linear(nn.silu(vector)).reshape(-1, 6, self.dim), vector


class CaptionProjection(Part):
    """Linear, tanh GELU, Linear."""

    dim: int

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.linear_1 = self.dense(self.dim, kernel_init=init)
        self.linear_2 = self.dense(self.dim, kernel_init=init)

    def __call__(self, states: Float[Array, "b text d"]) -> Float[Array, "b text width"]:
        return self.linear_2(nn.gelu(self.linear_1(states), approximate=True))


class PixArtBlock(Part):
    """Attention to the picture, attention to the text, and an MLP; the text's is not modulated."""

    config: PixArtConfig
    attention: AttentionKind = "auto"
    axes: ClassVar = (BROADCAST, BROADCAST, BROADCAST)

    def setup(self) -> None:
        config = self.config
        heads, width = config.num_attention_heads, config.inner_dim
        init = nn.initializers.normal(width**-0.5)
        self.scale_shift_table = self.param("scale_shift_table", init, (6, width), self.param_dtype)
        self.norm1, self.norm2 = (LayerNorm(dtype=self.dtype) for _ in range(2))
        self.attn1 = Attention(heads, attention=self.attention, **self.types)
        self.attn2 = Attention(heads, **self.types)
        self.ff = FeedForward(width, config.mlp_dim, **self.types)

    def __call__(
        self,
        x: Float[Array, "b image d"],
        modulation: Float[Array, "b 6 d"],
        text: Float[Array, "b text d"],
        text_lengths: Int[Array, " b"] | None,
    ) -> tuple[Float[Array, "b image d"], None]:
        modulation = self.scale_shift_table.astype(self.dtype)[None] + modulation
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts(modulation)
        seen = modulate(self.norm1(x), shift, scale)
        x = x + gate[:, None, :] * self.attn1(seen, seen)
        x = x + self.attn2(x, text, text_lengths)
        mlp = self.ff(modulate(self.norm2(x), mlp_shift, mlp_scale))
        return x + mlp_gate[:, None, :] * mlp, None


class PixArtTransformer(Part):
    """Predicts the noise of latents and, in the last channels, the learned variance.

    `scan_layers` and `remat`: see `fluxjax.models.repeated_blocks`. Source: diffusers
    `PixArtTransformer2DModel`; Chen et al. 2023 and 2024.
    """

    config: PixArtConfig
    scan_layers: bool = False
    remat: Remat = "none"
    attention: AttentionKind = "auto"
    """Of the picture's tokens to each other."""

    def setup(self) -> None:
        config, width = self.config, self.config.inner_dim
        self.pos_embed = PatchEmbed(width, config.patch_size, **self.types)
        self.adaln_single = AdaLayerNormSingle(
            width, config.use_additional_conditions, **self.types
        )
        self.caption_projection = CaptionProjection(width, **self.types)

        def build(block: Any) -> nn.Module:
            return block(config, self.attention, **self.types)

        self.transformer_blocks = repeated(
            PixArtBlock, build, config.num_layers, scan=self.scan_layers, remat=self.remat
        )
        init = nn.initializers.normal(width**-0.5)
        self.scale_shift_table = self.param("scale_shift_table", init, (2, width), self.param_dtype)
        self.norm_out = LayerNorm(dtype=self.dtype)
        channels = config.patch_size**2 * config.out_channels
        self.proj_out = self.dense(channels, kernel_init=nn.initializers.zeros_init())

    def patchify(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b image pixels"]:
        """Latents as tokens, see `transformer_blocks.patchify`."""
        return patchify(latents, self.config.patch_size)

    def unpatchify(
        self, patches: Float[Array, "b image pixels"], rows: int, columns: int
    ) -> Float[Array, "b h w c"]:
        """The inverse, for latents of `rows` x `columns`."""
        return unpatchify(patches, rows, columns, self.config.patch_size)

    def positions(self, rows: int, columns: int) -> Float[Array, "image d"]:
        """Of the tokens of latents of `rows` x `columns`: any size spans the range of training's.

        Always float32, as diffusers has them.
        """
        config, patch = self.config, self.config.patch_size
        return sinusoids_2d(
            rows // patch,
            columns // patch,
            config.inner_dim,
            base=config.sample_size // patch,
            scale=config.interpolation_scale,
        )

    def embed_text(
        self, encoder_hidden_states: Float[Array, "b text captions"]
    ) -> Float[Array, "b text d"]:
        """T5 states in the transformer's width."""
        return self.caption_projection(encoder_hidden_states)

    def modulations(
        self,
        timestep: Float[Array, " n"],
        resolution: Float[Array, "n 2"] | None = None,
        aspect_ratio: Float[Array, "n 1"] | None = None,
    ) -> Modulations:
        """Everything the blocks take from timestep and size."""
        blocks, vector = self.adaln_single(timestep, resolution, aspect_ratio)
        table = self.scale_shift_table.astype(self.dtype)
        return Modulations(blocks, table[None] + vector[:, None, :])

    def step_modulations(
        self,
        timesteps: Float[Array, " steps"],
        batch: int,
        resolution: Float[Array, "b 2"] | None = None,
        aspect_ratio: Float[Array, "b 1"] | None = None,
    ) -> Modulations:
        """`modulations` of many steps in one pass over the weights; every leaf (steps, ...)."""
        steps = timesteps.shape[0]
        sizes = (
            None if given is None else jnp.repeat(given, steps, axis=0)
            for given in (resolution, aspect_ratio)
        )
        return by_steps(self.modulations(jnp.tile(timesteps, batch), *sizes), steps)

    def denoise(
        self,
        patches: Float[Array, "b image pixels"],
        positions: Float[Array, "image d"],
        text: Float[Array, "b text d"],
        modulations: Modulations,
        text_lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b image out"]:
        """One step of `patchify`'d latents, given what `positions`, `embed_text` and `modulations`
        return.

        `text_lengths`: how many tokens of the text each row attends to; all where None.
        """
        x = self.pos_embed(patches, positions)
        x, _ = run(self.transformer_blocks, x, modulations.blocks, text, text_lengths)
        shift, scale = parts(modulations.out)
        return self.proj_out(modulate(self.norm_out(x), shift, scale))

    def __call__(
        self,
        hidden_states: Float[Array, "b h w in_channels"],
        encoder_hidden_states: Float[Array, "b text captions"],
        timestep: Float[Array, " b"],
        encoder_attention_mask: Int[Array, "b text"] | None = None,
        resolution: Float[Array, "b 2"] | None = None,
        aspect_ratio: Float[Array, "b 1"] | None = None,
    ) -> Float[Array, "b h w out_channels"]:
        """`timestep` is that of training, 0 (clean) to 999; `resolution` height and width in
        pixels, `aspect_ratio` the one by the other. The mask is 1 at the first tokens of each row,
        those of its prompt, and 0 at its padding."""
        rows, columns = hidden_states.shape[1:3]
        patches = self.denoise(
            self.patchify(hidden_states),
            self.positions(rows, columns),
            self.embed_text(encoder_hidden_states),
            self.modulations(timestep, resolution, aspect_ratio),
            None if encoder_attention_mask is None else encoder_attention_mask.sum(axis=1),
        )
        return self.unpatchify(patches, rows, columns)
