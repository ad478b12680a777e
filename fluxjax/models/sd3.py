"""The transformer of Stable Diffusion 3 and 3.5, after diffusers' `transformer_sd3.py`.

As in `fluxjax.models.flux`, `__call__` is one forward, and a run takes it apart: `positions`,
`embed_text` and `step_modulations` once, `denoise` at each step.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fluxjax.config import ConfigError, SD3Config
from fluxjax.config.choices import Remat
from fluxjax.models.attention import AttentionKind
from fluxjax.models.dense import Part
from fluxjax.models.embeddings import TimeTextEmbed, sinusoids_2d
from fluxjax.models.norms import LayerNorm
from fluxjax.models.repeated_blocks import EACH, by_steps, modulations_of, repeated, run
from fluxjax.models.stacking import named_runs, stack_of
from fluxjax.models.transformer_blocks import (
    AdaLayerNorm,
    Attention,
    FeedForward,
    JointAttention,
    PatchEmbed,
    modulate,
    parts,
    patchify,
    unpatchify,
)


class Modulations(NamedTuple):
    """Shifts, scales and gates; `step_modulations` adds a leading axis of steps.

    Of each run of equal blocks the picture's, 6 or with dual attention 9 vectors, and the text's,
    6 or in the last block 2.
    """

    blocks: tuple[tuple[Float[Array, "..."], Float[Array, "..."]], ...]
    """Each (*steps, layers, b, vectors, d)."""
    out: Float[Array, "*steps b 2 d"]


class CroppedPatchEmbed(PatchEmbed):
    """Positions are the middle of a stored table, which is not trained."""

    table: int
    """Rows and columns of it."""
    base: int
    """Those that a picture of the size of training has."""

    def setup(self) -> None:
        super().setup()
        self.pos_embed = self.param("pos_embed", self._table)

    def _table(self, key: Array) -> Float[Array, "1 n d"]:
        table = sinusoids_2d(self.table, self.table, self.dim, base=self.base)
        return table[None].astype(self.param_dtype)

    def positions(self, rows: int, columns: int) -> Float[Array, "n d"]:
        """Of `rows` x `columns` tokens. Raises ConfigError where the table has not so many."""
        if max(rows, columns) > self.table:
            raise ConfigError(
                f"a picture of {rows} x {columns} tokens is larger than this transformer's table "
                f"of positions, {self.table} x {self.table}"
            )
        top, left = (self.table - rows) // 2, (self.table - columns) // 2
        grid = self.pos_embed.reshape(self.table, self.table, self.dim)
        middle = grid[top : top + rows, left : left + columns].astype(self.dtype)
        return middle.reshape(rows * columns, self.dim)


class JointBlock(Part):
    """Text and picture with weights of their own and one joint attention; a `dual` block has one of
    the picture alone beside it, the `last` drops the text."""

    config: SD3Config
    dual: bool
    last: bool
    attention: AttentionKind = "auto"
    image_attention: AttentionKind = "auto"
    axes: ClassVar = (EACH, EACH)

    def setup(self) -> None:
        config, width = self.config, self.config.inner_dim
        heads, normed = config.num_attention_heads, config.qk_norm is not None
        self.norm1 = AdaLayerNorm(width, 9 if self.dual else 6, **self.types)
        self.norm1_context = AdaLayerNorm(width, 2 if self.last else 6, **self.types)
        self.attn = JointAttention(
            heads,
            config.attention_head_dim,
            qk_norm=normed,
            text_out=not self.last,
            attention=self.attention,
            **self.types,
        )
        if self.dual:
            alone = self.image_attention
            self.attn2 = Attention(heads, qk_norm=normed, attention=alone, **self.types)
        self.norm2 = LayerNorm(dtype=self.dtype)
        self.ff = FeedForward(width, config.mlp_dim, **self.types)
        if not self.last:
            self.norm2_context = LayerNorm(dtype=self.dtype)
            self.ff_context = FeedForward(width, config.mlp_dim, **self.types)

    def modulation(
        self, carry: None, vector: Float[Array, "n d"]
    ) -> tuple[None, tuple[Float[Array, "n image_parts d"], Float[Array, "n t d"]]]:
        return carry, (self.norm1.modulation(vector), self.norm1_context.modulation(vector))

    def __call__(
        self,
        streams: tuple[Float[Array, "b image d"], Float[Array, "b text d"]],
        modulation: tuple[Float[Array, "b image_parts d"], Float[Array, "b t d"]],
        left_out: Bool[Array, " b"] | None,
    ) -> tuple[tuple[Float[Array, "b image d"], Float[Array, "b text d"]], None]:
        """Rows that are `left_out` go by unchanged."""
        image, text = streams
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = parts(modulation[0])
        # The order of a last norm's, (scale, shift), where the text ends here.
        text_shift, text_scale, *others = parts(modulation[1])[:: -1 if self.last else 1]
        image_out, text_out, _ = self.attn(
            self.norm1(image, shift, scale), self.norm1_context(text, text_shift, text_scale)
        )
        seen = image + gate[:, None, :] * image_out
        if self.dual:
            alone = self.norm1(image, second[0], second[1])
            seen = seen + second[2][:, None, :] * self.attn2(alone, alone)
        image_mlp = self.ff(modulate(self.norm2(seen), mlp_shift, mlp_scale))
        seen = seen + mlp_gate[:, None, :] * image_mlp
        heard = text if self.last else self._text(text, text_out, *others)
        if left_out is not None:
            rows = left_out[:, None, None]
            seen, heard = jnp.where(rows, image, seen), jnp.where(rows, text, heard)
        return (seen, heard), None

    def _text(self, text, attended, gate, mlp_shift, mlp_scale, mlp_gate):
        text = text + gate[:, None, :] * attended
        text_mlp = self.ff_context(modulate(self.norm2_context(text), mlp_shift, mlp_scale))
        return text + mlp_gate[:, None, :] * text_mlp


class SD3Transformer(Part):
    """Predicts the velocity (noise - data) of latents.

    `scan_layers` and `remat`: see `fluxjax.models.repeated_blocks`; blocks that differ are scanned
    apart. Source: diffusers `SD3Transformer2DModel`; Esser et al. 2024.
    """

    config: SD3Config
    scan_layers: bool = False
    remat: Remat = "none"
    attention: AttentionKind = "auto"
    image_attention: AttentionKind = "auto"
    """Of the picture alone, in dual blocks."""

    def setup(self) -> None:
        config = self.config
        self.pos_embed = CroppedPatchEmbed(
            config.inner_dim,
            config.patch_size,
            table=config.pos_embed_max_size,
            base=config.sample_size // config.patch_size,
            **self.types,
        )
        self.time_text_embed = TimeTextEmbed(config.inner_dim, False, None, **self.types)
        init = nn.initializers.normal(0.02)
        self.context_embedder = self.dense(config.inner_dim, kernel_init=init)
        runs = self._named_runs()
        if self.scan_layers:
            for name, of in runs.items():
                stacked = stack_of(name) is not None
                blocks = self._blocks(of, scan=stacked)
                setattr(self, name, blocks if stacked else blocks[0])
        else:
            self.transformer_blocks = [b for of in runs.values() for b in self._blocks(of)]
        self.norm_out = AdaLayerNorm(config.inner_dim, 2, **self.types)
        channels = config.patch_size**2 * config.out_channels
        self.proj_out = self.dense(channels, kernel_init=nn.initializers.zeros_init())

    def _named_runs(self) -> dict[str, range]:
        return named_runs("transformer_blocks", self.config.block_kinds)

    def _blocks(self, of: range, *, scan: bool = False) -> Any:
        dual, last = self.config.block_kinds[of.start]

        def build(block: Any) -> nn.Module:
            kinds = {"attention": self.attention, "image_attention": self.image_attention}
            return block(self.config, dual, last, **kinds, **self.types)

        return repeated(JointBlock, build, len(of), scan=scan, remat=self.remat)

    @property
    def _runs(self) -> list[Any]:
        """Runs of equal blocks, scanned or block by block."""
        if not self.scan_layers:
            return [[self.transformer_blocks[i] for i in of] for of in self._named_runs().values()]
        runs = {name: getattr(self, name) for name in self._named_runs()}
        return [blocks if stack_of(name) else [blocks] for name, blocks in runs.items()]

    def patchify(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b image pixels"]:
        """Latents as tokens, see `transformer_blocks.patchify`."""
        return patchify(latents, self.config.patch_size)

    def unpatchify(
        self, patches: Float[Array, "b image pixels"], rows: int, columns: int
    ) -> Float[Array, "b h w c"]:
        """The inverse, for latents of `rows` x `columns`."""
        return unpatchify(patches, rows, columns, self.config.patch_size)

    def positions(self, rows: int, columns: int) -> Float[Array, "image d"]:
        """Of the tokens of latents of `rows` x `columns`; see `CroppedPatchEmbed.positions`."""
        patch = self.config.patch_size
        return self.pos_embed.positions(rows // patch, columns // patch)

    def embed_text(
        self, encoder_hidden_states: Float[Array, "b text joint"]
    ) -> Float[Array, "b text d"]:
        """Text states in the transformer's width."""
        return self.context_embedder(encoder_hidden_states)

    def modulations(
        self, timestep: Float[Array, " b"], pooled_projections: Float[Array, "b pooled"]
    ) -> Modulations:
        """Everything the blocks take from timestep and pooled text."""
        vector = self.time_text_embed(timestep, pooled_projections)
        blocks = tuple(modulations_of(blocks, vector) for blocks in self._runs)
        return Modulations(blocks, self.norm_out.modulation(vector))

    def step_modulations(
        self, timesteps: Float[Array, " steps"], pooled_projections: Float[Array, "b pooled"]
    ) -> Modulations:
        """`modulations` of many steps in one pass over the weights; every leaf (steps, ...)."""
        steps, batch = timesteps.shape[0], pooled_projections.shape[0]
        flat = self.modulations(
            jnp.tile(timesteps, batch), jnp.repeat(pooled_projections, steps, axis=0)
        )
        return by_steps(flat, steps)

    def denoise(
        self,
        patches: Float[Array, "b image pixels"],
        positions: Float[Array, "image d"],
        text: Float[Array, "b text d"],
        modulations: Modulations,
        left_out: Bool[Array, "layers b"] | None = None,
    ) -> Float[Array, "b image out"]:
        """One step of `patchify`'d latents, given what `positions`, `embed_text` and `modulations`
        return.

        `left_out`: blocks that rows go by (skip-layer guidance).
        """
        streams = self.pos_embed(patches, positions), text
        of = self._named_runs().values()
        for blocks, modulation, run_of in zip(self._runs, modulations.blocks, of, strict=True):
            left = None if left_out is None else left_out[run_of.start : run_of.stop]
            streams, _ = run(blocks, streams, modulation, left)
        # diffusers' order, (scale, shift); Stability stores (shift, scale): conversion swaps them.
        scale, shift = modulations.out[:, 0], modulations.out[:, 1]
        return self.proj_out(self.norm_out(streams[0], shift, scale))

    def __call__(
        self,
        hidden_states: Float[Array, "b h w in_channels"],
        encoder_hidden_states: Float[Array, "b text joint"],
        pooled_projections: Float[Array, "b pooled"],
        timestep: Float[Array, " b"],
        left_out: Bool[Array, "layers b"] | None = None,
    ) -> Float[Array, "b h w out_channels"]:
        """`timestep` is that of training, 0 (clean) to 1000 (pure noise)."""
        rows, columns = hidden_states.shape[1:3]
        patches = self.denoise(
            self.patchify(hidden_states),
            self.positions(rows, columns),
            self.embed_text(encoder_hidden_states),
            self.modulations(timestep, pooled_projections),
            left_out,
        )
        return self.unpatchify(patches, rows, columns)
