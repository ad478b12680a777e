"""The families of models, by the class name in a pipeline folder's model_index.json."""

from fluxjax.config import ConfigError
from fluxjax.families.family import (
    Conditioning,
    Control,
    Extras,
    Family,
    Guidance,
    Steps,
    Task,
    Tokens,
)
from fluxjax.families.flux import FLUX

FAMILIES: dict[str, Family] = {name: family for family in (FLUX,) for name in family.tasks}


def family_of(class_name: str) -> Family:
    """The family of a diffusers pipeline class. Raises ConfigError for one that has none."""
    if class_name not in FAMILIES:
        raise ConfigError(f"{class_name} is no family that is known: {', '.join(FAMILIES)}")
    return FAMILIES[class_name]


__all__ = [
    "FAMILIES",
    "FLUX",
    "Conditioning",
    "Control",
    "Extras",
    "Family",
    "Guidance",
    "Steps",
    "Task",
    "Tokens",
    "family_of",
]
