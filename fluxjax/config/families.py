"""The pipeline configurations of all families, and their published presets."""

from fluxjax.config.flux_pipeline import (
    CONTROL,
    DEV,
    FILL,
    KONTEXT,
    SCHNELL,
    TINY,
    FluxPipelineConfig,
)
from fluxjax.config.hunyuan_video_pipeline import (
    HUNYUAN_VIDEO_540,
    HUNYUAN_VIDEO_720,
    HunyuanVideoImageToVideoPipelineConfig,
    HunyuanVideoPipelineConfig,
)
from fluxjax.config.open_sora_pipeline import (
    OPEN_SORA_256,
    OPEN_SORA_768,
    OpenSoraPipelineConfig,
)
from fluxjax.config.pipeline import PipelineConfig
from fluxjax.config.pixart_pipeline import (
    ALPHA,
    SIGMA,
    PixArtAlphaPipelineConfig,
    PixArtSigmaPipelineConfig,
)
from fluxjax.config.sd3_pipeline import (
    SD3,
    SD35_LARGE_PIPELINE,
    SD35_LARGE_TURBO,
    SD35_MEDIUM_PIPELINE,
    SD3PipelineConfig,
)
from fluxjax.config.stable_diffusion import (
    SD15,
    SD21,
    SDXL,
    SDXL_REFINER,
    LatentConsistencyConfig,
    StableDiffusionConfig,
    StableDiffusionXLConfig,
)

PIPELINES: tuple[type[PipelineConfig], ...] = (
    FluxPipelineConfig,
    StableDiffusionConfig,
    LatentConsistencyConfig,
    StableDiffusionXLConfig,
    OpenSoraPipelineConfig,
    HunyuanVideoPipelineConfig,
    HunyuanVideoImageToVideoPipelineConfig,
    SD3PipelineConfig,
    PixArtAlphaPipelineConfig,
    PixArtSigmaPipelineConfig,
)
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
    "opensora-256": OPEN_SORA_256,
    "opensora-768": OPEN_SORA_768,
    "hunyuan-540": HUNYUAN_VIDEO_540,
    "hunyuan-720": HUNYUAN_VIDEO_720,
    "sd3": SD3,
    "sd35-medium": SD35_MEDIUM_PIPELINE,
    "sd35-large": SD35_LARGE_PIPELINE,
    "sd35-large-turbo": SD35_LARGE_TURBO,
    "pixart-alpha": ALPHA,
    "pixart-sigma": SIGMA,
}
