"""HunyuanVideo's pipelines, and the published presets of text to video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fluxjax.config import tiling
from fluxjax.config.base import ConfigError, require
from fluxjax.config.causal_autoencoder import CausalAutoencoderConfig
from fluxjax.config.choices import FAMILY_NAMES
from fluxjax.config.clip import CLIP_L_FILE, CLIPTextConfig
from fluxjax.config.hunyuan_video import (
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_REPLACE,
    HunyuanVideoConfig,
    ImageCondition,
)
from fluxjax.config.llama import LLAMA3_8B, LlamaConfig
from fluxjax.config.llava import LLAVA_LLAMA3, LlavaConfig
from fluxjax.config.scheduler import SchedulerConfig
from fluxjax.config.tiling import Tiling
from fluxjax.config.video_pipeline import VideoPipelineConfig

_LATER_LAYERS = 2
"""Of the language model, whose states are not read."""
_LANGUAGE_FILE = "llava*llama*3*.safetensors"
PICTURE_SIDE = 336
"""Pixels of the picture that LLaVA sees, which is square."""


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoPipelineConfig(VideoPipelineConfig):
    """All networks of one pipeline. `guidance` is told to the transformer; `max_sequence_length`
    counts the language model's tokens without its template."""

    transformer: HunyuanVideoConfig = HUNYUAN_VIDEO
    """The network that draws."""
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

    class_names: ClassVar[str] = r"HunyuanVideoPipeline"
    file_family: ClassVar[str] = FAMILY_NAMES["hunyuan-video"]
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    text_files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_encoder": (_LANGUAGE_FILE,),
        "text_encoder_2": (CLIP_L_FILE,),
    }
    embeds_guidance: ClassVar[bool] = True

    @property
    def own_sampler(self) -> str:
        return "euler"

    @property
    def class_name(self) -> str:
        return "HunyuanVideoPipeline"

    @property
    def patch(self) -> int:
        return self.transformer.patch_size

    @property
    def tiling(self) -> Tiling:
        return tiling.DIFFUSERS_TILED

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> HunyuanVideoPipelineConfig:
        """Of the language model the third state from the end is read, whatever its length."""
        given = parts.get("text_encoder", cls.text_encoder)
        return cls(**{**parts, "text_encoder": _read_early(given)})

    @property
    def first_frame_kinds(self) -> tuple[ImageCondition | None, ...]:
        """How transformers of this pipeline are given a first frame."""
        return (None,)

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        transformer, latents = self.transformer, self.vae.latent_channels
        kind = transformer.image_condition_type
        require(
            kind in self.first_frame_kinds,
            f"{model}: its transformer's image_condition_type is {kind}, and that of a "
            f"{self.class_name} is {' or '.join(map(str, self.first_frame_kinds))} (with a "
            "language model that sees pictures, LLaVA, it is one that draws from a first frame)",
        )
        require(
            not self.scheduler.use_dynamic_shifting,
            f"{model}: use_dynamic_shifting must be false: HunyuanVideo's shift is the same for "
            "all sizes",
        )
        seen = 2 * latents + 1 if kind == "latent_concat" else latents
        for name, has, given in (
            ("in_channels", transformer.in_channels, seen * self.patch**2),
            ("out_channels", transformer.out_channels, latents * self.patch**2),
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


def _read_early(model: LlamaConfig) -> LlamaConfig:
    if model.stops_after is not None:
        return model
    return replace(model, stops_after=max(1, model.num_hidden_layers - _LATER_LAYERS))


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoImageToVideoPipelineConfig(HunyuanVideoPipelineConfig):
    """Of the pipeline that draws from a first frame, which the language model sees too."""

    transformer: HunyuanVideoConfig = HUNYUAN_VIDEO_REPLACE
    text_encoder: LlavaConfig = LLAVA_LLAMA3
    guidance: float = 1.0

    class_names: ClassVar[str] = r"HunyuanVideoImageToVideoPipeline"
    file_family: ClassVar[str] = FAMILY_NAMES["hunyuan-video-i2v"]
    text_files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **HunyuanVideoPipelineConfig.text_files,
        "text_encoder": (_LANGUAGE_FILE, "llava*llama*3*vision*.safetensors"),
    }

    @property
    def class_name(self) -> str:
        return "HunyuanVideoImageToVideoPipeline"

    @property
    def first_frame_kinds(self) -> tuple[ImageCondition | None, ...]:
        return ("token_replace", "latent_concat")

    @property
    def dropped_frames(self) -> int:
        """Of a first frame that is joined as channels what is decoded with its latents' place."""
        joined = self.transformer.image_condition_type == "latent_concat"
        return self.vae.temporal_compression_ratio if joined else 0

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> HunyuanVideoImageToVideoPipelineConfig:
        """As of text to video; of the picture's states every fourth is heard, or every second."""
        given = parts.get("text_encoder", cls.text_encoder)
        kind = parts.get("transformer", cls.transformer).image_condition_type
        text = _read_early(given.text_config)
        stride = 2 if kind == "latent_concat" else 4
        heard = replace(given, text_config=text, heard_stride=stride)
        return cls(**{**parts, "text_encoder": heard})

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        super().require_whole(model)
        side = self.text_encoder.vision_config.image_size
        require(
            side == PICTURE_SIDE,
            f"{model}: the language model sees pictures of {PICTURE_SIDE} pixels, and this one's "
            f"image_size is {side}",
        )
        if text_alone:
            raise ConfigError(f"{model} draws from a first frame, not from text alone")


HUNYUAN_VIDEO_720 = HunyuanVideoPipelineConfig()
HUNYUAN_VIDEO_540 = replace(HUNYUAN_VIDEO_720, width=960, height=544)
