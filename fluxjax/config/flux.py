"""The FLUX transformer."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import positive, require


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The FLUX transformer (MMDiT). Defaults are FLUX.1-dev."""

    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    rope_theta: float = 10000.0
    mlp_ratio: float = 4.0
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        positive(
            self, "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
            "joint_attention_dim", "pooled_projection_dim", "rope_theta", "mlp_ratio",
        )  # fmt: skip
        require(
            self.num_layers >= 0 and self.num_single_layers >= 0,
            f"FluxConfig needs block counts >= 0, got num_layers={self.num_layers}, "
            f"num_single_layers={self.num_single_layers}",
        )
        require(
            sum(self.axes_dims_rope) == self.attention_head_dim
            and all(axis % 2 == 0 for axis in self.axes_dims_rope),
            f"FluxConfig.axes_dims_rope must be even numbers that sum to attention_head_dim="
            f"{self.attention_head_dim}, got {self.axes_dims_rope}",
        )

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.inner_dim * self.mlp_ratio)
