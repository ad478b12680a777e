"""The deep-compression autoencoder of clips (DC-AE), and the published sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from fluxjax.config.base import check_types, in_range, positive, require


@dataclass(frozen=True, kw_only=True)
class DCAutoencoderConfig:
    """The video DC-AE. Defaults are Open-Sora 2.0's "dc-ae-f32t4c128": 128 channels, sides 32 x and
    frames 4 x smaller, not causal."""

    in_channels: int = 3
    """Channels of the clip."""
    latent_channels: int = 128
    """Channels of the latents."""
    width_list: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    """Channels of each stage, the finest first; each but the last halves rows and columns."""
    encoder_depth_list: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    """Blocks of each stage of the encoder."""
    decoder_depth_list: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    """Blocks of each stage of the decoder, the finest first."""
    first_attention_stage: int = 3
    """From this stage on blocks are EfficientViT's, with linear attention; before, convolutions."""
    temporal_stages: tuple[int, ...] = (3, 4)
    """Stages that also halve frames. No shape tells them."""
    attention_head_dim: int = 32
    """Channels of a head of the linear attention."""
    scaling_factor: float | None = None
    """The transformer sees latents / scaling_factor. None, as in Open-Sora's sampling, is 1; its
    training has 0.493. No shape tells it."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 16, "in_channels")
        positive(self, "latent_channels", "attention_head_dim")
        stages = len(self.width_list)
        for name in ("encoder_depth_list", "decoder_depth_list"):
            depths = getattr(self, name)
            require(
                len(depths) == stages and all(1 <= depth <= 64 for depth in depths),
                f"DCAutoencoderConfig.{name} must be {stages} numbers from 1 to 64, as many as "
                f"width_list has, got {depths[:8]}",
            )
        require(
            2 <= stages <= 8 and all(0 < width <= 2**14 for width in self.width_list),
            "DCAutoencoderConfig.width_list must be 2 to 8 numbers up to 16384, got "
            f"{self.width_list[:9]}",
        )
        in_range(self, 0, stages, "first_attention_stage")
        heads = self.width_list[self.first_attention_stage :]
        require(
            all(width % self.attention_head_dim == 0 for width in heads),
            f"DCAutoencoderConfig.width_list must divide by attention_head_dim="
            f"{self.attention_head_dim} from stage {self.first_attention_stage} on, got {heads}",
        )
        require(
            all(0 <= stage < stages - 1 for stage in self.temporal_stages),
            f"DCAutoencoderConfig.temporal_stages must be from 0 to {stages - 2}, got "
            f"{self.temporal_stages}",
        )
        require(
            self.scaling_factor is None or self.scaling_factor > 0,
            f"DCAutoencoderConfig.scaling_factor must be positive, got {self.scaling_factor}",
        )
        self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """Shortcuts average or repeat whole groups of channels."""
        for fine, (narrow, wide) in enumerate(itertools.pairwise(self.width_list)):
            for parts in {4, 8 if fine in self.temporal_stages else 4}:
                require(
                    narrow * parts % wide == 0,
                    f"DCAutoencoderConfig.width_list: {wide} channels after {narrow} must divide "
                    f"{narrow * parts}, which the shortcut averages",
                )
        require(
            self.width_list[-1] % self.latent_channels == 0,
            f"DCAutoencoderConfig.latent_channels={self.latent_channels} must divide the last "
            f"width, {self.width_list[-1]}",
        )

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.width_list) - 1)

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames per latent; a single frame is a latent of its own."""
        return 2 ** len(self.temporal_stages)

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """`width_list`, by the name that other autoencoders have."""
        return self.width_list

    @property
    def scale(self) -> int:
        """Pixels per latent along one side, by the name that autoencoders of pictures have."""
        return self.spatial_compression_ratio

    @property
    def latent_factor(self) -> float:
        """What the encoder's latents are multiplied by before a transformer sees them."""
        return 1 / (self.scaling_factor or 1.0)

    @property
    def first_frame(self) -> int:
        """Frames that have a latent of their own before the groups of each ratio: none."""
        return 0


F32T4C128 = DCAutoencoderConfig()
_F64 = replace(
    F32T4C128,
    width_list=(128, 256, 512, 512, 1024, 1024, 1024),
    encoder_depth_list=(2, 2, 2, 3, 3, 3, 3),
    decoder_depth_list=(3,) * 7,
)
DC_AUTOENCODERS = {
    "dc-ae-f32t4c128": F32T4C128,
    "dc-ae-f32t4c64": replace(F32T4C128, latent_channels=64),
    "dc-ae-f32t4c256": replace(F32T4C128, latent_channels=256, scaling_factor=0.46505),
    "dc-ae-f64t4c128": _F64,
    "dc-ae-f64t4c256": replace(_F64, latent_channels=256),
}
"""By the names of Open-Sora's configurations."""
