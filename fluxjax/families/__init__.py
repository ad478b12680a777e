"""The families of models, by the class name in a pipeline folder's model_index.json."""

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
from fluxjax.families.flux import FLUX
from fluxjax.families.open_sora import OPEN_SORA
from fluxjax.families.pixart import PIXART
from fluxjax.families.sd3 import SD3
from fluxjax.families.sdxl import STABLE_DIFFUSION_XL
from fluxjax.families.stable_diffusion import STABLE_DIFFUSION

FAMILIES: dict[str, Family] = {
    name: family
    for family in (FLUX, STABLE_DIFFUSION, STABLE_DIFFUSION_XL, SD3, PIXART, OPEN_SORA)
    for name in family.tasks
}


def family_of(class_name: str) -> Family:
    """The family of a diffusers pipeline class. Raises ConfigError for one that has none."""
    if class_name not in FAMILIES:
        raise ConfigError(f"{class_name} is no family that is known: {', '.join(FAMILIES)}")
    return FAMILIES[class_name]


__all__ = [
    "FAMILIES",
    "FLUX",
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
