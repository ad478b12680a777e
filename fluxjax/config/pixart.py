"""The transformer of PixArt-alpha and PixArt-Sigma, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import check_types, in_range, layers, positive, require


@dataclass(frozen=True, kw_only=True)
class PixArtConfig:
    """A transformer that text conditions by cross-attention. Defaults are those of alpha at 1024
    pixels."""

    sample_size: int = 128
    """Rows and columns of the latents that it was trained with."""
    patch_size: int = 2
    """Rows and columns of latents in a token."""
    in_channels: int = 4
    """Channels of the latents."""
    out_channels: int = 8
    """The noise, and as many channels of the learned variance, which no sampler here reads."""
    num_layers: int = 28
    """Blocks: attention among the picture, to the text, MLP."""
    attention_head_dim: int = 72
    """Channels of a head."""
    num_attention_heads: int = 16
    """Heads; heads x attention_head_dim is the width of the residual stream."""
    caption_channels: int = 4096
    """Width of the text states, T5's."""
    interpolation_scale: float = 2.0
    """Positions are divided by it, whatever the size of the picture."""
    use_additional_conditions: bool = True
    """Whether the picture's size and aspect ratio join the time (alpha at 1024 pixels alone)."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 2**14, "sample_size")
        in_range(self, 1, 16, "patch_size")
        in_range(self, 1, 1024, "in_channels", "out_channels")
        layers(self, "num_layers")
        positive(self, "attention_head_dim", "num_attention_heads", "caption_channels", "inner_dim")
        in_range(self, 1e-3, 1e3, "interpolation_scale")
        unit = 12 if self.use_additional_conditions else 4
        require(
            self.inner_dim % unit == 0,
            f"PixArtConfig: {self.num_attention_heads} heads of {self.attention_head_dim} channels "
            f"make a width of {self.inner_dim}, which must be a multiple of {unit}",
        )

    @property
    def inner_dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        """Width inside the MLPs."""
        return 4 * self.inner_dim


PIXART_ALPHA = PixArtConfig()
PIXART_SIGMA = PixArtConfig(use_additional_conditions=False)
