"""What pipelines that draw clips share: frames, and an autoencoder whose tiles are data."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from fluxjax.config.base import in_range, multiple, require
from fluxjax.config.causal_autoencoder import CausalAutoencoderConfig
from fluxjax.config.choices import MAX_FPS, MAX_FRAMES
from fluxjax.config.dc_autoencoder import DCAutoencoderConfig
from fluxjax.config.pipeline import PipelineConfig
from fluxjax.config.tiling import Tiling


@dataclass(frozen=True, kw_only=True)
class VideoPipelineConfig(PipelineConfig):
    """Widths and heights are of every frame."""

    vae: CausalAutoencoderConfig | DCAutoencoderConfig = CausalAutoencoderConfig()
    frames: int = 129
    """Of a clip."""
    fps: int = 24
    """Frames a second that a clip is shown with."""

    sampling_fields: ClassVar[tuple[str, ...]] = (*PipelineConfig.sampling_fields, "frames", "fps")
    clip_settings: ClassVar[tuple[str, ...]] = ("frames", "fps")

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, 1, MAX_FRAMES, "frames")
        in_range(self, 1, MAX_FPS, "fps")

    @property
    @abstractmethod
    def tiling(self) -> Tiling:
        """How clips are cut for the autoencoder, as the original code cuts them."""

    @property
    @abstractmethod
    def patch(self) -> int:
        """Rows and columns of latents in a token."""

    @property
    def unit(self) -> int:
        return self.patch * self.vae.scale

    def require_frames(self, frames: int) -> None:
        first, ratio = self.vae.first_frame, self.vae.temporal_compression_ratio
        if frames == 1:  # one frame is a latent of its own for every autoencoder
            return
        if first == 0:
            multiple("frames", frames, ratio)
            return
        near = max(1, ratio * round((frames - 1) / ratio) + 1)
        require(
            frames > 1 and (frames - 1) % ratio == 0,
            f"frames must be 1 more than a multiple of {ratio}, got {frames}; {near} would do",
        )

    def first_frame_shift(self, width: int, height: int) -> float | None:
        """How far noise levels are moved where a model of pictures draws the first frame; None: as
        that model has it."""
        return None

    def latent_frames(self, frames: int) -> int:
        """Latents of so many frames. Raises ConfigError for a number that there is not."""
        self.require_frames(frames)
        first, ratio = self.vae.first_frame, self.vae.temporal_compression_ratio
        return 1 if frames == 1 else (frames - first) // ratio + first

    def frames_of(self, latents: int) -> int:
        """Frames that so many latents stand for; one latent is that of a picture."""
        first, ratio = self.vae.first_frame, self.vae.temporal_compression_ratio
        return 1 if latents == 1 else (latents - first) * ratio + first
