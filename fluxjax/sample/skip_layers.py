"""Skip-layer guidance: in which steps, away from a network without which blocks, and how far."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.families.family import LeftOut, SkipLayers, Steps
from fluxjax.schedules.schedule import Schedule


def check_skip_layers(config: PipelineConfig, asked: SkipLayers | None, guidance: Any) -> None:
    """Raises ConfigError for blocks that there are not, and without guidance of two passes."""
    if asked is None:
        return
    config.require_skip_layers(asked.blocks)
    if guidance is None or guidance <= 1:
        raise ConfigError("skip_layers needs guidance above 1, which it adds to")


def left_out_layers(
    config: PipelineConfig,
    asked: SkipLayers | None,
    schedule: Schedule,
    steps: Steps,
    guidance: Any,
) -> LeftOut | None:
    """Of the steps of the padded `schedule`.

    diffusers adds `scale` times the difference to what is guided already; here it is added to the
    prompt's pass before, and so divided by the scale of `guidance`. Steps are counted from the
    first that is run. Errors are those of `check_skip_layers`.
    """
    if asked is None:
        return None
    check_skip_layers(config, asked, guidance)
    whole = steps.count if isinstance(steps.count, int) else len(steps.count)
    count, index = whole - steps.first, np.arange(len(schedule.times)) - schedule.first
    inside = (count * asked.start < index) & (index < count * asked.stop)
    weight = np.where(inside, asked.scale / guidance, 0.0).astype(np.float32)
    blocks = np.isin(np.arange(_layers(config)), asked.blocks)
    return LeftOut(np.tile(blocks, (len(weight), 1)), weight)


def left_out_shapes(config: PipelineConfig, asked: SkipLayers | None, steps: int) -> LeftOut | None:
    """Shapes of the same."""
    if asked is None:
        return None
    spec: Any = jax.ShapeDtypeStruct
    return LeftOut(spec((steps, _layers(config)), jnp.bool_), spec((steps,), jnp.float32))


def _layers(config: PipelineConfig) -> int:
    return config.networks[config.denoiser].num_layers
