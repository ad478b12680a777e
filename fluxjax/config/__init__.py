"""Frozen configurations of every network and pipeline, one file per network, and the presets."""

from fluxjax.config.autoencoder import AutoencoderConfig
from fluxjax.config.base import Activation, ConfigError, from_dict, multiple
from fluxjax.config.clip import (
    CLIP_BASE_TEXT,
    CLIP_BASE_VISION,
    CLIP_L_TEXT,
    CLIP_L_VISION,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from fluxjax.config.flux import FluxConfig
from fluxjax.config.lora import LoraConfig
from fluxjax.config.pipeline import (
    CONTROL,
    DEV,
    FILL,
    KONTEXT,
    PRESETS,
    SCHNELL,
    TINY,
    PipelineConfig,
)
from fluxjax.config.scheduler import SchedulerConfig
from fluxjax.config.t5 import T5_SMALL, T5_XXL, T5Config

__all__ = [
    "CLIP_BASE_TEXT",
    "CLIP_BASE_VISION",
    "CLIP_L_TEXT",
    "CLIP_L_VISION",
    "CONTROL",
    "DEV",
    "FILL",
    "KONTEXT",
    "PRESETS",
    "SCHNELL",
    "T5_SMALL",
    "T5_XXL",
    "TINY",
    "Activation",
    "AutoencoderConfig",
    "CLIPConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "ConfigError",
    "FluxConfig",
    "LoraConfig",
    "PipelineConfig",
    "SchedulerConfig",
    "T5Config",
    "from_dict",
    "multiple",
]
