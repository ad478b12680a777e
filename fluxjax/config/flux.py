"""The FLUX transformer."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import check_types, in_range, layers, positive, require


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The FLUX transformer (MMDiT). Defaults are FLUX.1-dev."""

    in_channels: int = 64
    """Of a token of the picture: 2 x 2 latents, and what Fill and Control join to them."""
    out_channels: int = 64
    """Of a token of the velocity: 2 x 2 latents."""
    num_layers: int = 19
    """Double blocks: text and picture have weights of their own and meet in attention."""
    num_single_layers: int = 38
    """Single blocks: text and picture are one sequence with the same weights."""
    attention_head_dim: int = 128
    """Channels of a head."""
    num_attention_heads: int = 24
    """Heads; heads x attention_head_dim is the width of the residual stream."""
    joint_attention_dim: int = 4096
    """Width of the text states, T5's."""
    pooled_projection_dim: int = 768
    """Width of the pooled text vector, CLIP's."""
    guidance_embeds: bool = True
    """Whether the strength of guidance is an input (dev) or not (schnell)."""
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    """Channels of a head that are rotated by each axis of a position: picture, row, column."""
    rope_theta: float = 10000.0
    """Base of the rotations' frequencies."""
    mlp_ratio: float = 4.0
    """Width inside the MLPs, in widths of the residual stream."""
    qkv_bias: bool = True
    """Whether query, key and value have biases."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(
            self,
            "in_channels",
            "out_channels",
            "attention_head_dim",
            "num_attention_heads",
            "joint_attention_dim",
            "pooled_projection_dim",
        )
        layers(self, "num_layers", "num_single_layers", lowest=0)
        in_range(self, 1e-6, 1e12, "rope_theta")
        in_range(self, 1e-6, 64, "mlp_ratio")
        positive(self, "inner_dim", "mlp_dim")
        require(
            sum(self.axes_dims_rope) == self.attention_head_dim
            and all(axis > 0 and axis % 2 == 0 for axis in self.axes_dims_rope),
            f"FluxConfig.axes_dims_rope must be even numbers that sum to attention_head_dim="
            f"{self.attention_head_dim}, got {self.axes_dims_rope}",
        )

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Width inside the MLPs."""
        return int(self.inner_dim * self.mlp_ratio)
