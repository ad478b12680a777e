"""Frozen configurations of every network and pipeline, one file per network, and the presets."""

from fluxjax.config.autoencoder import AutoencoderConfig
from fluxjax.config.base import Activation, ConfigError, from_dict, multiple
from fluxjax.config.clip import (
    CLIP_BASE_TEXT,
    CLIP_BASE_VISION,
    CLIP_BIGG_TEXT,
    CLIP_H_TEXT,
    CLIP_L_TEXT,
    CLIP_L_VISION,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from fluxjax.config.controlnet import CONTROL_MODES, UNION, UNION_2, XLABS, ControlNetConfig
from fluxjax.config.flux import FluxConfig
from fluxjax.config.flux_pipeline import (
    CONTROL,
    DEV,
    FILL,
    KONTEXT,
    SCHNELL,
    TINY,
    FluxPipelineConfig,
    published_defaults,
)
from fluxjax.config.ip_adapter import IP_ADAPTER, IPAdapterConfig
from fluxjax.config.lora import LoraConfig
from fluxjax.config.pipeline import PipelineConfig
from fluxjax.config.pixart import PIXART_ALPHA, PIXART_SIGMA, PixArtConfig
from fluxjax.config.redux import REDUX, ReduxConfig
from fluxjax.config.scheduler import SchedulerConfig
from fluxjax.config.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Config
from fluxjax.config.siglip import SIGLIP_SO400M, SiglipVisionConfig
from fluxjax.config.stable_diffusion import (
    SD15,
    SD21,
    SDXL,
    SDXL_REFINER,
    StableDiffusionConfig,
    StableDiffusionXLConfig,
)
from fluxjax.config.t5 import T5_SMALL, T5_XXL, T5Config
from fluxjax.config.unet import (
    SD15_UNET,
    SD21_UNET,
    SDXL_REFINER_UNET,
    SDXL_UNET,
    UNetConfig,
)

PIPELINES: tuple[type[PipelineConfig], ...] = (
    FluxPipelineConfig,
    StableDiffusionConfig,
    StableDiffusionXLConfig,
)
"""Those of all families."""
PRESETS: dict[str, PipelineConfig] = {
    "dev": DEV,
    "schnell": SCHNELL,
    "kontext": KONTEXT,
    "fill": FILL,
    "control": CONTROL,
    "tiny": TINY,
    "sd15": SD15,
    "sd21": SD21,
    "sdxl": SDXL,
    "sdxl-refiner": SDXL_REFINER,
}

__all__ = [
    "CLIP_BASE_TEXT",
    "CLIP_BASE_VISION",
    "CLIP_BIGG_TEXT",
    "CLIP_H_TEXT",
    "CLIP_L_TEXT",
    "CLIP_L_VISION",
    "CONTROL",
    "CONTROL_MODES",
    "DEV",
    "FILL",
    "IP_ADAPTER",
    "KONTEXT",
    "PIPELINES",
    "PIXART_ALPHA",
    "PIXART_SIGMA",
    "PRESETS",
    "REDUX",
    "SCHNELL",
    "SD3_MEDIUM",
    "SD15",
    "SD15_UNET",
    "SD21",
    "SD21_UNET",
    "SD35_LARGE",
    "SD35_MEDIUM",
    "SDXL",
    "SDXL_REFINER",
    "SDXL_REFINER_UNET",
    "SDXL_UNET",
    "SIGLIP_SO400M",
    "T5_SMALL",
    "T5_XXL",
    "TINY",
    "UNION",
    "UNION_2",
    "XLABS",
    "Activation",
    "AutoencoderConfig",
    "CLIPConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "ConfigError",
    "ControlNetConfig",
    "FluxConfig",
    "FluxPipelineConfig",
    "IPAdapterConfig",
    "LoraConfig",
    "PipelineConfig",
    "PixArtConfig",
    "ReduxConfig",
    "SD3Config",
    "SchedulerConfig",
    "SiglipVisionConfig",
    "StableDiffusionConfig",
    "StableDiffusionXLConfig",
    "T5Config",
    "UNetConfig",
    "from_dict",
    "multiple",
    "published_defaults",
]
