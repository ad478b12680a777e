"""The UNet of Stable Diffusion, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fluxjax.config.base import check_types, in_range, positive, require

DownBlock = Literal["DownBlock2D", "CrossAttnDownBlock2D"]
UpBlock = Literal["UpBlock2D", "CrossAttnUpBlock2D"]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A UNet that text conditions by cross-attention. Defaults are Stable Diffusion 1.5's.

    The tuples have one entry for each resolution, the finest first; `up_block_types` begins with
    the coarsest, as in diffusers.
    """

    sample_size: int = 64
    """Rows and columns of the latents that it was trained with."""
    in_channels: int = 4
    """9 in inpainting models: latents, mask, and the latents of the masked picture."""
    out_channels: int = 4
    """Channels of what is predicted."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels at each resolution, the finest first; each but the last halves rows and columns."""
    down_block_types: tuple[DownBlock, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    """Which resolutions have transformers, on the way down."""
    up_block_types: tuple[UpBlock, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    layers_per_block: int = 2
    """Residual blocks at each resolution on the way down; on the way up there is one more."""
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    """Transformer blocks after each residual block; the last entry is the middle's too."""
    attention_head_dim: tuple[int, ...] = (8, 8, 8, 8)
    """The number of heads, whatever the name says: an error that old files made permanent."""
    cross_attention_dim: int = 768
    """Width of the text."""
    use_linear_projection: bool = False
    """Whether tokens are projected into and out of the transformers by linear layers, or pixels by
    1 x 1 convolutions."""
    addition_embed_type: Literal["text_time"] | None = None
    """Whether pooled text and the picture's sizes join the time (Stable Diffusion XL)."""
    addition_time_embed_dim: int = 256
    """Width of each of those sizes."""
    projection_class_embeddings_input_dim: int = 2816
    """Width of all that joins the time: pooled text and five or six sizes."""
    time_cond_proj_dim: int | None = None
    """Width of the guidance scale as the time hears it, in models that were distilled with it;
    None where there is none."""
    norm_num_groups: int = 32
    """Groups of every group norm."""
    norm_eps: float = 1e-5
    """Added to the variance in the group norms of residual blocks."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 2**14, "sample_size")
        in_range(self, 1, 64, "in_channels", "out_channels")
        in_range(self, 1, 8, "layers_per_block")
        positive(
            self,
            "cross_attention_dim",
            "norm_num_groups",
            "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
        )
        in_range(self, 0, 1, "norm_eps")
        if self.time_cond_proj_dim is not None:
            in_range(self, 4, 2**14, "time_cond_proj_dim")
        levels = len(self.block_out_channels)
        require(1 <= levels <= 8, f"UNetConfig has {levels} resolutions, expected 1 to 8")
        for name in (
            "down_block_types",
            "up_block_types",
            "transformer_layers_per_block",
            "attention_head_dim",
        ):
            given = len(getattr(self, name))
            require(
                given == levels,
                f"UNetConfig.{name} has {given} entries where block_out_channels has {levels}",
            )
        for width, heads in zip(self.block_out_channels, self.attention_head_dim, strict=True):
            require(
                0 < width <= 2**14 and width % self.norm_num_groups == 0,
                f"UNetConfig.block_out_channels must divide by norm_num_groups="
                f"{self.norm_num_groups}, got {width}",
            )
            require(
                heads > 0 and width % heads == 0,
                f"UNetConfig.attention_head_dim is the number of heads, and {heads} do not divide "
                f"{width} channels",
            )
        require(
            all(0 < depth <= 64 for depth in self.transformer_layers_per_block),
            "UNetConfig.transformer_layers_per_block must be from 1 to 64",
        )


_XL_DOWN: tuple[DownBlock, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
_XL_UP: tuple[UpBlock, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

SD15_UNET = UNetConfig()
LCM_UNET = replace(SD15_UNET, sample_size=96, time_cond_proj_dim=256)
SD21_UNET = UNetConfig(
    sample_size=96,
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
)
SDXL_UNET = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=_XL_DOWN,
    up_block_types=_XL_UP,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
)
SDXL_REFINER_UNET = UNetConfig(
    sample_size=128,
    block_out_channels=(384, 768, 1536, 1536),
    down_block_types=(*_XL_DOWN, "DownBlock2D"),
    up_block_types=("UpBlock2D", *_XL_UP),
    transformer_layers_per_block=(4, 4, 4, 4),
    attention_head_dim=(6, 12, 24, 24),
    cross_attention_dim=1280,
    use_linear_projection=True,
    addition_embed_type="text_time",
    projection_class_embeddings_input_dim=2560,
)
TINY_UNET = UNetConfig(
    sample_size=12,
    in_channels=16,
    out_channels=16,
    block_out_channels=(48, 80),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    transformer_layers_per_block=(1, 3),
    attention_head_dim=(4, 4),
    cross_attention_dim=128,
    use_linear_projection=True,
    norm_num_groups=8,
)
