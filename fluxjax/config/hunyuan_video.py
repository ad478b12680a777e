"""HunyuanVideo's transformer, and the published variants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fluxjax.config.base import in_range, layers, require
from fluxjax.config.flux import FluxConfig

ImageCondition = Literal["latent_concat", "token_replace"]


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoConfig(FluxConfig):
    """FLUX's blocks over the tokens of a video, whose text is refined first. Defaults are those of
    HunyuanVideo's text to video.

    The axes of positions are latent frame, row and column; text states are a language model's.
    """

    num_layers: int = 20
    num_single_layers: int = 40
    rope_theta: float = 256.0
    patch_size: int = 2
    """Rows and columns of latents in a token."""
    num_refiner_layers: int = 2
    """Blocks through which text goes alone."""
    image_condition_type: ImageCondition | None = None
    """How a first frame is given: as more channels, or in place of the first frame's tokens, which
    then are modulated as free of noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, 1, 16, "patch_size")
        layers(self, "num_refiner_layers")
        patch = self.patch_size**2
        require(
            self.in_channels % patch == 0 and self.out_channels % patch == 0,
            "HunyuanVideoConfig.in_channels and out_channels must be multiples of the "
            f"{self.patch_size} x {self.patch_size} latents of a token, got {self.in_channels} and "
            f"{self.out_channels}",
        )
        require(self.qkv_bias, "HunyuanVideoConfig.qkv_bias must be true: there are always biases")


HUNYUAN_VIDEO = HunyuanVideoConfig()
HUNYUAN_VIDEO_REPLACE = replace(HUNYUAN_VIDEO, image_condition_type="token_replace")
HUNYUAN_VIDEO_CONCAT = replace(
    HUNYUAN_VIDEO,
    in_channels=132,
    guidance_embeds=False,
    image_condition_type="latent_concat",
)
"""Latents, those of the first frame and a mask: 33 channels of 2 x 2."""
