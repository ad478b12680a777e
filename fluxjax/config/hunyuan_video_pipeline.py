"""HunyuanVideo's pipeline, and the published presets of text to video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fluxjax.config import tiling
from fluxjax.config.base import require
from fluxjax.config.causal_autoencoder import CausalAutoencoderConfig
from fluxjax.config.clip import CLIPTextConfig
from fluxjax.config.hunyuan_video import HUNYUAN_VIDEO, HunyuanVideoConfig
from fluxjax.config.llama import LLAMA3_8B, LlamaConfig
from fluxjax.config.scheduler import SchedulerConfig
from fluxjax.config.tiling import Tiling
from fluxjax.config.video_pipeline import VideoPipelineConfig


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoPipelineConfig(VideoPipelineConfig):
    """All networks of one pipeline. `guidance` is told to the transformer; `max_sequence_length`
    counts the language model's tokens without its template."""

    transformer: HunyuanVideoConfig = HUNYUAN_VIDEO
    vae: CausalAutoencoderConfig = CausalAutoencoderConfig()
    text_encoder: LlamaConfig = LLAMA3_8B
    """A language model, whose states are the transformer's text tokens."""
    text_encoder_2: CLIPTextConfig = CLIPTextConfig()
    """CLIP, whose pooled state is the transformer's text vector."""
    scheduler: SchedulerConfig = SchedulerConfig(use_dynamic_shifting=False, shift=7.0)
    max_sequence_length: int = 256
    steps: int = 50
    guidance: float = 6.0
    width: int = 1280
    height: int = 720

    class_names: ClassVar[str] = r"HunyuanVideo(ImageToVideo)?Pipeline"
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    embeds_guidance: ClassVar[bool] = True

    @property
    def own_sampler(self) -> str:
        return "euler"

    @property
    def class_name(self) -> str:
        if self.transformer.image_condition_type is None:
            return "HunyuanVideoPipeline"
        return "HunyuanVideoImageToVideoPipeline"

    @property
    def patch(self) -> int:
        return self.transformer.patch_size

    @property
    def tiling(self) -> Tiling:
        return tiling.DIFFUSERS_TILED

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> HunyuanVideoPipelineConfig:
        return cls(**parts)

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        transformer, token = self.transformer, self.vae.latent_channels * self.patch**2
        for name, has, given in (
            ("out_channels", transformer.out_channels, token),
            ("joint_attention_dim", transformer.joint_attention_dim, self.text_encoder.hidden_size),
            (
                "pooled_projection_dim",
                transformer.pooled_projection_dim,
                self.text_encoder_2.hidden_size,
            ),
        ):
            require(
                has == given,
                f"{model}: the transformer's {name} is {has}, and with the other networks it is "
                f"{given}: they belong to different models",
            )


HUNYUAN_VIDEO_720 = HunyuanVideoPipelineConfig()
HUNYUAN_VIDEO_540 = replace(HUNYUAN_VIDEO_720, width=960, height=544)
