"""The KL autoencoder, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluxjax.config.base import check_types, in_range, positive, require


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The KL autoencoder. Defaults are FLUX.1's: 16 channels, 8 x smaller, no quant layers."""

    in_channels: int = 3
    """Channels of the picture that is encoded."""
    out_channels: int = 3
    """Channels of the picture that is decoded."""
    latent_channels: int = 16
    """Channels of the latents; the encoder gives as many means and log variances."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each resolution, the finest first; each but the last halves rows and columns."""
    layers_per_block: int = 2
    """Residual blocks at each resolution of the encoder; the decoder has one more."""
    norm_num_groups: int = 32
    """Groups of every group norm."""
    scaling_factor: float = 0.3611
    """The transformer sees (latents - shift_factor) x scaling_factor. No shape tells it."""
    shift_factor: float = 0.1159
    """What is subtracted from the latents first. No shape tells it."""
    use_quant_conv: bool = False
    """A 1 x 1 convolution after the encoder."""
    use_post_quant_conv: bool = False
    """A 1 x 1 convolution before the decoder."""

    def __post_init__(self) -> None:
        require_levels(self)

    @property
    def scale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


def require_levels(config: Any) -> None:
    """Raises ConfigError for numbers that no KL autoencoder has, of pictures or of clips."""
    name, groups = type(config).__name__, config.norm_num_groups
    check_types(config)
    in_range(config, 1, 16, "in_channels", "out_channels")
    positive(config, "latent_channels", "norm_num_groups")
    in_range(config, 1, 16, "layers_per_block")
    require(
        config.scaling_factor > 0,
        f"{name}.scaling_factor must be positive, got {config.scaling_factor}",
    )
    channels = config.block_out_channels
    require(
        1 <= len(channels) <= 6 and all(0 < c <= 2**14 and c % groups == 0 for c in channels),
        f"{name}.block_out_channels must be 1 to 6 numbers that each divide by "
        f"norm_num_groups={groups}, got {_shown(channels)}",
    )


def _shown(channels: tuple[int, ...]) -> str:
    return f"{channels}" if len(channels) <= 8 else f"{len(channels)} of them"
