"""What a recipe's data teach a model: a task of its family."""

from __future__ import annotations

import dataclasses

from fluxjax.config import ConfigError, FluxPipelineConfig
from fluxjax.families import FLUX, Task
from fluxjax.train.recipe import FinetuneRecipe


def learnt(recipe: FinetuneRecipe, base: FluxPipelineConfig) -> tuple[FluxPipelineConfig, Task]:
    """What the model becomes, and the task that it learns, which follow from the recipe's data.

    A transformer that gets more inputs is sampled with the guidance that it is trained with.
    Raises ConfigError for data that the model cannot learn from.
    """
    pictures = recipe.data.pictures
    config = FLUX.widened(base, pictures)
    try:
        task = FLUX.find_task(config, pictures)
    except ConfigError as error:
        raise ConfigError(f"{recipe.model} cannot learn from these data: {error}") from None
    if config is not base:
        config = dataclasses.replace(config, guidance=recipe.objective.guidance)
    return config, task
