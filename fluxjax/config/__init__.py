"""Frozen configurations of every network and pipeline, one file per network, and the presets.

What a name stands for is read when it is first used: a command that only explains its options needs
few of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fluxjax.config.base import Activation, ConfigError, from_dict, multiple

if TYPE_CHECKING:
    from fluxjax.config.autoencoder import AutoencoderConfig
    from fluxjax.config.causal_autoencoder import CausalAutoencoderConfig
    from fluxjax.config.choices import CONTROL_MODES, CONTROLS, IP_IMAGES
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
    from fluxjax.config.controlnet import (
        UNION,
        UNION_2,
        XLABS,
        ControlNetConfig,
    )
    from fluxjax.config.dc_autoencoder import DCAutoencoderConfig
    from fluxjax.config.families import PIPELINES, PRESETS
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
    from fluxjax.config.hunyuan_video import (
        HUNYUAN_VIDEO,
        HUNYUAN_VIDEO_CONCAT,
        HUNYUAN_VIDEO_REPLACE,
        HunyuanVideoConfig,
    )
    from fluxjax.config.hunyuan_video_pipeline import (
        HUNYUAN_VIDEO_540,
        HUNYUAN_VIDEO_720,
        HunyuanVideoImageToVideoPipelineConfig,
        HunyuanVideoPipelineConfig,
    )
    from fluxjax.config.ip_adapter import IP_ADAPTER, IPAdapterConfig
    from fluxjax.config.llama import LLAMA3_8B, QWEN3_4B, LlamaConfig
    from fluxjax.config.llava import LlavaConfig
    from fluxjax.config.lora import LoraConfig
    from fluxjax.config.open_sora import OPEN_SORA_2, OPEN_SORA_2_DC_AE, OpenSoraConfig
    from fluxjax.config.open_sora_pipeline import (
        OPEN_SORA_256,
        OPEN_SORA_768,
        OPEN_SORA_768_DC_AE,
        OpenSoraPipelineConfig,
    )
    from fluxjax.config.pipeline import PipelineConfig
    from fluxjax.config.pixart import PIXART_ALPHA, PIXART_SIGMA, PixArtConfig
    from fluxjax.config.pixart_pipeline import (
        TINY_PIXART,
        PixArtAlphaPipelineConfig,
        PixArtSigmaPipelineConfig,
    )
    from fluxjax.config.redux import REDUX, ReduxConfig
    from fluxjax.config.scheduler import SchedulerConfig
    from fluxjax.config.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Config
    from fluxjax.config.sd3_pipeline import SD3PipelineConfig
    from fluxjax.config.siglip import SIGLIP_SO400M, SiglipVisionConfig
    from fluxjax.config.stable_diffusion import (
        SD15,
        SD21,
        SDXL,
        SDXL_REFINER,
        TINY_SD,
        StableDiffusionConfig,
        StableDiffusionXLConfig,
    )
    from fluxjax.config.t5 import T5_SMALL, T5_XXL, T5Config
    from fluxjax.config.unet import (
        SD15_UNET,
        SD21_UNET,
        SDXL_REFINER_UNET,
        SDXL_UNET,
        TINY_UNET,
        UNetConfig,
    )

__all__ = [
    "CLIP_BASE_TEXT",
    "CLIP_BASE_VISION",
    "CLIP_BIGG_TEXT",
    "CLIP_H_TEXT",
    "CLIP_L_TEXT",
    "CLIP_L_VISION",
    "CONTROL",
    "CONTROLS",
    "CONTROL_MODES",
    "DEV",
    "FILL",
    "HUNYUAN_VIDEO",
    "HUNYUAN_VIDEO_540",
    "HUNYUAN_VIDEO_720",
    "HUNYUAN_VIDEO_CONCAT",
    "HUNYUAN_VIDEO_REPLACE",
    "IP_ADAPTER",
    "IP_IMAGES",
    "KONTEXT",
    "LLAMA3_8B",
    "OPEN_SORA_2",
    "OPEN_SORA_2_DC_AE",
    "OPEN_SORA_256",
    "OPEN_SORA_768",
    "OPEN_SORA_768_DC_AE",
    "PIPELINES",
    "PIXART_ALPHA",
    "PIXART_SIGMA",
    "PRESETS",
    "QWEN3_4B",
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
    "TINY_PIXART",
    "TINY_SD",
    "TINY_UNET",
    "UNION",
    "UNION_2",
    "XLABS",
    "Activation",
    "AutoencoderConfig",
    "CLIPConfig",
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "CausalAutoencoderConfig",
    "ConfigError",
    "ControlNetConfig",
    "DCAutoencoderConfig",
    "FluxConfig",
    "FluxPipelineConfig",
    "HunyuanVideoConfig",
    "HunyuanVideoImageToVideoPipelineConfig",
    "HunyuanVideoPipelineConfig",
    "IPAdapterConfig",
    "LlamaConfig",
    "LlavaConfig",
    "LoraConfig",
    "OpenSoraConfig",
    "OpenSoraPipelineConfig",
    "PipelineConfig",
    "PixArtAlphaPipelineConfig",
    "PixArtConfig",
    "PixArtSigmaPipelineConfig",
    "ReduxConfig",
    "SD3Config",
    "SD3PipelineConfig",
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

_NAMES = {
    "autoencoder": ("AutoencoderConfig",),
    "causal_autoencoder": ("CausalAutoencoderConfig",),
    "clip": (
        "CLIP_BASE_TEXT",
        "CLIP_BASE_VISION",
        "CLIP_BIGG_TEXT",
        "CLIP_H_TEXT",
        "CLIP_L_TEXT",
        "CLIP_L_VISION",
        "CLIPConfig",
        "CLIPTextConfig",
        "CLIPVisionConfig",
    ),
    "choices": ("CONTROL_MODES", "CONTROLS", "IP_IMAGES"),
    "controlnet": ("UNION", "UNION_2", "XLABS", "ControlNetConfig"),
    "dc_autoencoder": ("DCAutoencoderConfig",),
    "families": ("PIPELINES", "PRESETS"),
    "flux": ("FluxConfig",),
    "flux_pipeline": (
        "CONTROL",
        "DEV",
        "FILL",
        "KONTEXT",
        "SCHNELL",
        "TINY",
        "FluxPipelineConfig",
        "published_defaults",
    ),
    "hunyuan_video": (
        "HUNYUAN_VIDEO",
        "HUNYUAN_VIDEO_CONCAT",
        "HUNYUAN_VIDEO_REPLACE",
        "HunyuanVideoConfig",
    ),
    "hunyuan_video_pipeline": (
        "HUNYUAN_VIDEO_540",
        "HUNYUAN_VIDEO_720",
        "HunyuanVideoImageToVideoPipelineConfig",
        "HunyuanVideoPipelineConfig",
    ),
    "ip_adapter": ("IP_ADAPTER", "IPAdapterConfig"),
    "llama": ("LLAMA3_8B", "QWEN3_4B", "LlamaConfig"),
    "llava": ("LlavaConfig",),
    "lora": ("LoraConfig",),
    "open_sora": ("OPEN_SORA_2", "OPEN_SORA_2_DC_AE", "OpenSoraConfig"),
    "open_sora_pipeline": (
        "OPEN_SORA_256",
        "OPEN_SORA_768",
        "OPEN_SORA_768_DC_AE",
        "OpenSoraPipelineConfig",
    ),
    "pipeline": ("PipelineConfig",),
    "pixart": ("PIXART_ALPHA", "PIXART_SIGMA", "PixArtConfig"),
    "pixart_pipeline": ("TINY_PIXART", "PixArtAlphaPipelineConfig", "PixArtSigmaPipelineConfig"),
    "redux": ("REDUX", "ReduxConfig"),
    "scheduler": ("SchedulerConfig",),
    "sd3": ("SD3_MEDIUM", "SD35_LARGE", "SD35_MEDIUM", "SD3Config"),
    "sd3_pipeline": ("SD3PipelineConfig",),
    "siglip": ("SIGLIP_SO400M", "SiglipVisionConfig"),
    "stable_diffusion": (
        "SD15",
        "SD21",
        "SDXL",
        "SDXL_REFINER",
        "TINY_SD",
        "StableDiffusionConfig",
        "StableDiffusionXLConfig",
    ),
    "t5": ("T5_SMALL", "T5_XXL", "T5Config"),
    "unet": ("SD15_UNET", "SD21_UNET", "SDXL_REFINER_UNET", "SDXL_UNET", "TINY_UNET", "UNetConfig"),
}
_FILES = {name: file for file, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
