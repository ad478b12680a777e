"""What a recipe's data and objective make of a model: a task of its family, another noise."""

from __future__ import annotations

import dataclasses
from typing import Any

from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.config.flux_pipeline import require_flux
from fluxjax.config.lora import components_of
from fluxjax.config.sampler import DEFAULTS
from fluxjax.families import Task, family_of
from fluxjax.train.learnt_controlnet import learnt_controlnet
from fluxjax.train.recipe import FinetuneRecipe
from fluxjax.train.settings import ConditionKinds, Objective

FIRST_FRAME = ConditionKinds(t2v=0.0, i2v_head=1.0, i2v_loop=0.0, i2v_tail=0.0)


def learnt(recipe: FinetuneRecipe, base: PipelineConfig) -> tuple[PipelineConfig, Task]:
    """What the model becomes, and the task that it learns, which follow from the recipe's data and
    objective.

    A transformer that gets more inputs is sampled with the guidance that it is trained with.
    Raises ConfigError for what the model cannot learn.
    """
    family, pictures = family_of(base.class_name), recipe.data.pictures
    if begins_with_frames(base):
        _check_first_frames(recipe, base)
        pictures = frozenset({"reference"})
    config = family.widened(base, pictures)
    if recipe.method == "controlnet":
        net = learnt_controlnet(recipe.controlnet, require_flux(base, recipe.model).transformer)
        config = dataclasses.replace(base, controlnets=(net,))
    try:
        task = family.find_task(config, pictures)
    except ConfigError as error:
        raise ConfigError(f"{recipe.model} cannot learn from these data: {error}") from None
    if task.keeps:
        raise ConfigError(f"{recipe.model} fills masks without having learnt it: leave out masks")
    if config is not base and not config.controlnets:
        config = dataclasses.replace(config, guidance=recipe.objective.guidance)
    config = _with_noise(recipe, config)
    _check(recipe.objective, config)
    _check_texts(recipe, config)
    if recipe.objective.from_reference and not recipe.data.references:
        raise ConfigError("objective.from_reference needs data.references, pictures to edit")
    for frames in recipe.data.frames:
        try:
            config.require_frames(frames)
        except ConfigError as error:
            raise ConfigError(f"data.frames: {error}") from None
    return config, task


def begins_with_frames(config: PipelineConfig) -> bool:
    """Whether a model draws nothing without the first frame of its clip, which it then learns from
    that of each clip."""
    tasks = family_of(config.class_name).tasks_of(config)
    return all("given" in one.channels for one in tasks)


def conditions_of(recipe: FinetuneRecipe, config: PipelineConfig) -> ConditionKinds:
    """Which frames of clips are given while the model learns. Raises ConfigError for others."""
    kinds = recipe.objective.kinds
    if not begins_with_frames(config):
        return kinds
    if kinds not in (ConditionKinds(), FIRST_FRAME):
        raise ConfigError(
            f"objective.kinds is of Open-Sora; {recipe.model} is given the first frame of each clip"
        )
    return FIRST_FRAME


def _check_first_frames(recipe: FinetuneRecipe, config: Any) -> None:
    """Raises ConfigError for data and validation that have no clips with more than that."""
    data, asked = recipe.data, recipe.validation
    if data.pictures or 1 in data.frames or not data.frames:
        raise ConfigError(
            f"{recipe.model} learns from clips and the first frame of each: name lengths above 1 "
            "in data.frames, and leave out 1 and pictures beside the source"
        )
    if asked.every and asked.prompts and (not asked.references or asked.frames == 1):
        raise ConfigError(
            f"{recipe.model} draws clips from a first frame: name one for each prompt in "
            "validation.references, and frames above 1"
        )


def _with_noise(recipe: FinetuneRecipe, config: Any) -> Any:
    """The model with the noise and the prediction that it is trained with."""
    changes: dict[str, Any] = {}
    if recipe.objective.prediction != "auto":
        changes["prediction_type"] = recipe.objective.prediction
    if recipe.objective.zero_snr:
        changes["rescale_betas_zero_snr"] = True
        if "rescale_betas_zero_snr" not in DEFAULTS.get(config.own_sampler, {}):
            # Which clamps pictures unless told: a file of PNDM's need not say that it does not.
            changes |= {"sampler": "DDIMScheduler", "clip_sample": False}
        # A run begins at the last timestep, as the paper asks for (Lin et al. 2023).
        changes["timestep_spacing"] = "trailing"
    if not changes:
        return config
    if config.scheduler.is_flow:
        raise ConfigError(
            f"prediction and zero_snr are of diffusion models; {recipe.model} is a flow"
        )
    if recipe.method == "lora":
        raise ConfigError(
            "prediction and zero_snr change what a model predicts: a LoRA is sampled with the "
            "scheduler of the model that it is for; use method full"
        )
    return dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, **changes))


def _check_texts(recipe: FinetuneRecipe, config: PipelineConfig) -> None:
    """Raises ConfigError for text encoders that the model has not, or that never learn."""
    if recipe.hears_anew and family_of(config.class_name).encode_anew is None:
        key = "text_encoders" if recipe.text_encoders else "lora.text_encoders"
        raise ConfigError(f"{key}: those of {config.class_name} are not trained")
    recipe.lora.components_of(config)
    components_of(recipe.text_encoders, config, "text_encoders")


def _check(objective: Objective, config: PipelineConfig) -> None:
    """Raises ConfigError for what the model's objective does not have."""
    family = family_of(config.class_name)
    is_flow = family.path(config).is_flow
    if objective.encoder_dropout and family.silenced is None:
        raise ConfigError(
            "objective.encoder_dropout is of Stable Diffusion 3 and Open-Sora, not of "
            f"{config.class_name}"
        )
    if is_flow:
        named = {
            "min_snr": objective.min_snr,
            "debiased": objective.debiased,
            "noise_offset": objective.noise_offset,
        }
        of, other = "diffusion models", "a flow"
    else:
        named = {"weight": objective.weight != "none"}
        of, other = "flows", "a diffusion model"
    for name, given in named.items():
        if given:
            raise ConfigError(f"objective.{name} is of {of}, and {config.class_name} is {other}")


def channels_of(config: PipelineConfig, task: Task) -> tuple[str, ...]:
    """What is encoded besides pictures and references: what is joined to the channels, or what a
    ControlNet sees. A model that draws clips from given frames learns them beside text alone."""
    if config.controlnets:
        return ("control",)
    every = family_of(config.class_name).tasks_of(config)
    return ("given",) if any("given" in one.channels for one in every) else task.channels
