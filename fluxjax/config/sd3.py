"""The transformer of Stable Diffusion 3 and 3.5, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fluxjax.config.base import check_types, in_range, layers, positive, require


@dataclass(frozen=True, kw_only=True)
class SD3Config:
    """Stable Diffusion 3's transformer (MMDiT; 3.5 medium's is called MMDiT-X). Defaults are those
    of 3 medium."""

    sample_size: int = 128
    """Rows and columns of the latents that it was trained with."""
    patch_size: int = 2
    """Rows and columns of latents in a token."""
    in_channels: int = 16
    """Channels of the latents."""
    out_channels: int = 16
    """Channels of the velocity."""
    num_layers: int = 24
    """Blocks; text and picture have weights of their own and meet in attention."""
    attention_head_dim: int = 64
    """Channels of a head."""
    num_attention_heads: int = 24
    """Heads; heads x attention_head_dim is the width of the residual stream."""
    joint_attention_dim: int = 4096
    """Width of the text states: T5's, and CLIP's filled up with zeros."""
    pooled_projection_dim: int = 2048
    """Width of the pooled text: both CLIPs' together."""
    pos_embed_max_size: int = 192
    """Rows and columns of the table of positions, in tokens: no picture may have more."""
    dual_attention_layers: tuple[int, ...] = ()
    """Blocks in which the picture also attends to itself alone."""
    qk_norm: Literal["rms_norm"] | None = None
    """Whether queries and keys are normed (3.5)."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 2**14, "sample_size")
        in_range(self, 1, 16, "patch_size")
        in_range(self, 1, 1024, "in_channels", "out_channels")
        layers(self, "num_layers")
        positive(self, "attention_head_dim", "num_attention_heads", "joint_attention_dim")
        positive(self, "pooled_projection_dim", "inner_dim")
        in_range(self, 1, 2048, "pos_embed_max_size")
        require(
            self.inner_dim % 4 == 0,
            f"SD3Config: {self.num_attention_heads} heads of {self.attention_head_dim} channels "
            f"make a width of {self.inner_dim}, which must be a multiple of 4",
        )
        require(
            all(0 <= i < self.num_layers for i in self.dual_attention_layers),
            f"SD3Config.dual_attention_layers must be from 0 to {self.num_layers - 1}, "
            f"got {self.dual_attention_layers}",
        )

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Width inside the MLPs."""
        return 4 * self.inner_dim

    @property
    def block_kinds(self) -> tuple[tuple[bool, bool], ...]:
        """Of each block: whether it has dual attention, whether it is the last."""
        last, dual = self.num_layers - 1, self.dual_attention_layers
        return tuple((i in dual, i == last) for i in range(self.num_layers))


SD3_MEDIUM = SD3Config()
SD35_MEDIUM = SD3Config(
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
)
SD35_LARGE = SD3Config(num_layers=38, num_attention_heads=38, qk_norm="rms_norm")
