"""Open-Sora 2.0's transformer, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fluxjax.config.base import in_range, require
from fluxjax.config.flux import FluxConfig


@dataclass(frozen=True, kw_only=True)
class OpenSoraConfig(FluxConfig):
    """FLUX's blocks over the tokens of a video, to which a condition is added: which latent frames
    are given, and those. Defaults are Open-Sora 2.0's.

    The axes of positions are latent frame, row and column.
    """

    guidance_embeds: bool = False
    patch_size: int = 2
    """Rows and columns of latents in a token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, 1, 16, "patch_size")
        require(
            not self.guidance_embeds,
            "OpenSoraConfig.guidance_embeds must be false: Open-Sora takes no guidance as input",
        )
        require(
            self.in_channels % self.patch_size**2 == 0,
            f"OpenSoraConfig.in_channels must be a multiple of the {self.patch_size} x "
            f"{self.patch_size} latents of a token, got {self.in_channels}",
        )

    @property
    def cond_channels(self) -> int:
        """Of a token of the condition: for each of its latents the mask, then the frame given."""
        return self.in_channels + self.patch_size**2


OPEN_SORA_2 = OpenSoraConfig()
OPEN_SORA_2_DC_AE = replace(OPEN_SORA_2, in_channels=128, out_channels=128, patch_size=1)
"""For the latents of the deep-compression autoencoder."""
