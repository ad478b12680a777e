"""The causal autoencoder of clips, and the published size."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.autoencoder import require_levels
from fluxjax.config.base import require


@dataclass(frozen=True, kw_only=True)
class CausalAutoencoderConfig:
    """The causal 3-D KL autoencoder. Defaults are HunyuanVideo's, which Open-Sora 2.0 shares:
    16 channels, sides 8 x smaller, a first latent of one frame and then one of each four."""

    in_channels: int = 3
    """Channels of the clip that is encoded."""
    out_channels: int = 3
    """Channels of the clip that is decoded."""
    latent_channels: int = 16
    """Channels of the latents; the encoder gives as many means and log variances."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each resolution, the finest first."""
    layers_per_block: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    norm_num_groups: int = 32
    """Groups of every group norm. No shape tells it."""
    scaling_factor: float = 0.476986
    """The transformer sees latents x scaling_factor. No shape tells it."""
    spatial_compression_ratio: int = 8
    """Pixels per latent along one side: the first resolutions halve it."""
    temporal_compression_ratio: int = 4
    """Frames per latent after the first: the last resolutions but one halve it."""

    def __post_init__(self) -> None:
        require_levels(self)
        ratios = [2**i for i in range(len(self.block_out_channels))]
        for name in ("spatial_compression_ratio", "temporal_compression_ratio"):
            require(
                getattr(self, name) in ratios,
                f"CausalAutoencoderConfig.{name} must be one of {', '.join(map(str, ratios))} for "
                f"{len(ratios)} resolutions, got {getattr(self, name)}",
            )

    @property
    def factors(self) -> tuple[tuple[int, int], ...]:
        """(frames, pixels) that each resolution divides by before the next; 1 leaves as it is."""
        last = len(self.block_out_channels) - 1
        halved = {
            name: getattr(self, f"{name}_compression_ratio").bit_length() - 1
            for name in ("spatial", "temporal")
        }
        return tuple(
            (2 if i >= last - halved["temporal"] else 1, 2 if i < halved["spatial"] else 1)
            for i in range(last)
        )

    @property
    def scale(self) -> int:
        """Pixels per latent along one side, by the name that autoencoders of pictures have."""
        return self.spatial_compression_ratio

    @property
    def latent_factor(self) -> float:
        """What the encoder's latents are multiplied by before a transformer sees them."""
        return self.scaling_factor

    @property
    def first_frame(self) -> int:
        """Frames that have a latent of their own before the groups of each ratio: 1, causal."""
        return 1
