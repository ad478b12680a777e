"""The KL autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import positive, require


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The KL autoencoder. Defaults are FLUX.1's: 16 channels, 8 x smaller, no quant layers."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    def __post_init__(self) -> None:
        positive(
            self, "in_channels", "out_channels", "latent_channels", "layers_per_block",
            "norm_num_groups", "scaling_factor",
        )  # fmt: skip
        require(
            len(self.block_out_channels) > 0
            and all(c % self.norm_num_groups == 0 for c in self.block_out_channels),
            f"AutoencoderConfig.block_out_channels must each divide by norm_num_groups="
            f"{self.norm_num_groups}, got {self.block_out_channels}",
        )

    @property
    def scale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)
