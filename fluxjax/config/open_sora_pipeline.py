"""Open-Sora 2.0's pipeline, and the published presets.

diffusers has none: its folder is written as diffusers writes those of others, under the class name
OpenSoraPipeline, with CLIP in text_encoder and T5 in text_encoder_2 as FLUX has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fluxjax.config import tiling
from fluxjax.config.base import require
from fluxjax.config.causal_autoencoder import CausalAutoencoderConfig
from fluxjax.config.clip import CLIPTextConfig
from fluxjax.config.dc_autoencoder import F32T4C128, DCAutoencoderConfig
from fluxjax.config.flux_pipeline import FluxPipelineConfig
from fluxjax.config.open_sora import OPEN_SORA_2_DC_AE, OpenSoraConfig
from fluxjax.config.scheduler import SchedulerConfig
from fluxjax.config.t5 import T5Config
from fluxjax.config.tiling import Tiling
from fluxjax.config.video_pipeline import VideoPipelineConfig
from fluxjax.config.video_sizes import video_size

LEVELS = SchedulerConfig(base_shift=1.0, max_shift=3.0, shift=1.0)
"""With dynamic shifting the shift itself, not its logarithm, is on the line through both lengths,
in tokens of a frame, and grows with the root of the latent frames; without it is `shift`."""


@dataclass(frozen=True, kw_only=True)
class OpenSoraPipelineConfig(VideoPipelineConfig):
    """All networks of one pipeline. `guidance` is the scale of guidance by text, which is off at 1;
    `max_sequence_length` counts T5's tokens. `width` and `height` are those of 256px in 16:9."""

    transformer: OpenSoraConfig = OpenSoraConfig()
    """The network that draws."""
    vae: CausalAutoencoderConfig | DCAutoencoderConfig = CausalAutoencoderConfig()
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    """CLIP, whose pooled state is the transformer's text vector."""
    text_encoder_2: T5Config = T5Config()
    """T5, whose states are the transformer's text tokens."""
    scheduler: SchedulerConfig = LEVELS
    steps: int = 50
    guidance: float = 7.5
    image_guidance: float = 3.0
    """The scale of guidance by the frames that are given."""
    motion: int = 4
    """The score that the prompt is told, 1 (still) to 7; 0: none."""
    width: int = 336
    height: int = 192

    exact_steps: ClassVar[bool] = True
    class_names: ClassVar[str] = r"OpenSoraPipeline"
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    text_files: ClassVar[Mapping[str, tuple[str, ...]]] = FluxPipelineConfig.text_files
    sampling_fields: ClassVar[tuple[str, ...]] = (
        *VideoPipelineConfig.sampling_fields,
        "image_guidance",
        "motion",
    )
    clip_settings: ClassVar[tuple[str, ...]] = (
        *VideoPipelineConfig.clip_settings,
        "motion",
        "image_guidance",
        "oscillation",
        "loop",
        "video_kind",
    )

    @property
    def own_sampler(self) -> str:
        return "euler"

    @property
    def class_name(self) -> str:
        return "OpenSoraPipeline"

    @property
    def patch(self) -> int:
        return self.transformer.patch_size

    @property
    def tiling(self) -> Tiling:
        return tiling.OPEN_SORA if self.vae.first_frame else tiling.OPEN_SORA_DC

    def first_frame_shift(self, width: int, height: int) -> float | None:
        """As of a clip of one frame."""
        if not self.scheduler.use_dynamic_shifting:
            return self.scheduler.shift
        return self.scheduler.mu(width * height // self.unit**2)

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> OpenSoraPipelineConfig:
        return cls(**parts)

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        transformer = self.transformer
        token = self.vae.latent_channels * self.patch**2
        for name, has, given in (
            ("in_channels", transformer.in_channels, token),
            ("out_channels", transformer.out_channels, token),
            ("joint_attention_dim", transformer.joint_attention_dim, self.text_encoder_2.d_model),
            (
                "pooled_projection_dim",
                transformer.pooled_projection_dim,
                self.text_encoder.hidden_size,
            ),
        ):
            require(
                has == given,
                f"{model}: the transformer's {name} is {has}, and with the other networks it is "
                f"{given}: they belong to different models",
            )


def _sized(area: str, unit: int) -> dict[str, int]:
    height, width = video_size(area, "16:9", unit)
    return {"width": width, "height": height}


OPEN_SORA_256 = OpenSoraPipelineConfig()
OPEN_SORA_768 = replace(OPEN_SORA_256, **_sized("768px", 16))
OPEN_SORA_768_DC_AE = replace(
    OPEN_SORA_256,
    transformer=OPEN_SORA_2_DC_AE,
    vae=F32T4C128,
    frames=128,
    **_sized("768px", 32),
)
