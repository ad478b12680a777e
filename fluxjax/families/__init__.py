"""The families of models. A family's file is read when it is first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fluxjax.config import ConfigError
from fluxjax.families.family import (
    Conditioning,
    Control,
    Extras,
    Family,
    Guidance,
    LeftOut,
    SkipLayers,
    Steps,
    Task,
    Tokens,
    Told,
)

if TYPE_CHECKING:
    from fluxjax.families.flux import FLUX
    from fluxjax.families.hunyuan_image_to_video import HUNYUAN_IMAGE_TO_VIDEO
    from fluxjax.families.hunyuan_video import HUNYUAN_VIDEO
    from fluxjax.families.open_sora import OPEN_SORA
    from fluxjax.families.pixart import PIXART
    from fluxjax.families.sd3 import SD3
    from fluxjax.families.sdxl import STABLE_DIFFUSION_XL
    from fluxjax.families.stable_diffusion import LATENT_CONSISTENCY, STABLE_DIFFUSION

_FILES = {
    "FLUX": "flux",
    "STABLE_DIFFUSION": "stable_diffusion",
    "LATENT_CONSISTENCY": "stable_diffusion",
    "STABLE_DIFFUSION_XL": "sdxl",
    "SD3": "sd3",
    "PIXART": "pixart",
    "OPEN_SORA": "open_sora",
    "HUNYUAN_VIDEO": "hunyuan_video",
    "HUNYUAN_IMAGE_TO_VIDEO": "hunyuan_image_to_video",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    return value


def family_of(class_name: str) -> Family:
    """The family of a diffusers pipeline class, the name in a folder's model_index.json.

    Raises ConfigError for one that has none.
    """
    known: list[str] = []
    for name, file in _FILES.items():
        family: Family = getattr(import_module(f"{__name__}.{file}"), name)
        if class_name in family.tasks:
            return family
        known += family.tasks
    raise ConfigError(f"{class_name} is no family that is known: {', '.join(known)}")


__all__ = [
    "FLUX",
    "HUNYUAN_IMAGE_TO_VIDEO",
    "HUNYUAN_VIDEO",
    "LATENT_CONSISTENCY",
    "OPEN_SORA",
    "PIXART",
    "SD3",
    "STABLE_DIFFUSION",
    "STABLE_DIFFUSION_XL",
    "Conditioning",
    "Control",
    "Extras",
    "Family",
    "Guidance",
    "LeftOut",
    "SkipLayers",
    "Steps",
    "Task",
    "Tokens",
    "Told",
    "family_of",
]
