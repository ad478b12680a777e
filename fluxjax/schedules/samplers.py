"""Every sampler by the name of its class in diffusers, and by the short names of the options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.config.choices import Respacing, Spacing
from fluxjax.config.sampler import (
    DEFAULTS,
    SamplerClass,
    SamplerConfig,
)
from fluxjax.schedules.ddim import ddim
from fluxjax.schedules.ddpm import ddpm
from fluxjax.schedules.dpm_solver import dpm_solver
from fluxjax.schedules.euler import euler, euler_ancestral
from fluxjax.schedules.flow_euler import check_steps, sampled_flow
from fluxjax.schedules.heun import flow_heun, heun
from fluxjax.schedules.lcm import lcm
from fluxjax.schedules.pndm import pndm
from fluxjax.schedules.step_table import Run
from fluxjax.schedules.unipc import unipc

SAMPLERS: Mapping[SamplerClass, Callable[..., Run]] = {
    "DDPMScheduler": ddpm,
    "DDIMScheduler": ddim,
    "PNDMScheduler": pndm,
    "EulerDiscreteScheduler": euler,
    "EulerAncestralDiscreteScheduler": euler_ancestral,
    "HeunDiscreteScheduler": heun,
    "DPMSolverMultistepScheduler": dpm_solver,
    "UniPCMultistepScheduler": unipc,
    "LCMScheduler": lcm,
    "FlowMatchEulerDiscreteScheduler": sampled_flow,
    "FlowMatchHeunDiscreteScheduler": flow_heun,
}
_DPM: dict[str, Any] = {"sampler": "DPMSolverMultistepScheduler"}
NAMES: Mapping[str, Mapping[str, Any]] = {
    "ddpm": {"sampler": "DDPMScheduler"},
    "ddim": {"sampler": "DDIMScheduler"},
    "pndm": {"sampler": "PNDMScheduler"},
    "euler": {"sampler": "EulerDiscreteScheduler"},
    "euler-a": {"sampler": "EulerAncestralDiscreteScheduler"},
    "heun": {"sampler": "HeunDiscreteScheduler"},
    "dpm++": {**_DPM, "algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpm++1": {**_DPM, "algorithm_type": "dpmsolver++", "solver_order": 1},
    "dpm++3m": {**_DPM, "algorithm_type": "dpmsolver++", "solver_order": 3},
    "dpm++sde": {**_DPM, "algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    "unipc": {"sampler": "UniPCMultistepScheduler"},
    "lcm": {"sampler": "LCMScheduler"},
}
ON_FLOW: Mapping[str, Mapping[str, Any]] = {
    "euler": {"sampler": "FlowMatchEulerDiscreteScheduler"},
    "heun": {"sampler": "FlowMatchHeunDiscreteScheduler"},
    **{name: NAMES[name] for name in ("dpm++", "dpm++1", "dpm++3m", "unipc")},
}
"""Those that sample a flow; the others have no meaning there."""


def sampler_run(config: SamplerConfig, steps: int, first: int = 0, **choices: Any) -> Run:
    """The steps that diffusers makes for this scheduler_config.json.

    Args:
      steps: as asked for; some samplers evaluate the network more often.
      first: the evaluation to start from, for image to image; the history is then empty.
      choices: what only some samplers have: `eta` and `noise_of_clamped` (DDIM), `churn` (Euler),
        `mu` and `own` (flows).

    Raises ConfigError for what the sampler cannot do.
    """
    complete = config.complete()
    check_steps(steps)
    if complete.num_train_timesteps is not None and steps > complete.num_train_timesteps:
        raise ConfigError(
            f"the model was trained with {complete.num_train_timesteps} timesteps: "
            f"{steps} steps cannot be drawn with"
        )
    # What is not finite is refused by `StepTable.run`, in words.
    with np.errstate(all="ignore"):
        return SAMPLERS[complete.sampler](complete, steps, first, **choices)


def chosen(
    config: SamplerConfig,
    name: str | None = None,
    spacing: Spacing | None = None,
    sigmas: Respacing | None = None,
) -> SamplerConfig:
    """The folder's configuration, or another sampler's on the same noise table or flow.

    Raises ConfigError for a name, spacing or sigmas that the sampler does not have.
    """
    flow = config.is_flow
    known = ON_FLOW if flow else NAMES
    if name is not None:
        if name not in known:
            what = "a flow" if flow else "this model"
            raise ConfigError(f"{name!r} is no sampler of {what}: there are {', '.join(known)}")
        values: dict[str, Any] = dict(known[name])
        if flow and not values["sampler"].startswith("FlowMatch"):
            values |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            values["flow_shift"] = config.shift or config.flow_shift
        config = dataclasses.replace(config, **values)
    has = DEFAULTS[config.sampler]
    if spacing is not None:
        if "timestep_spacing" not in has or config.is_flow:
            raise ConfigError(f"{config.sampler} has no timesteps to be spaced {spacing}")
        config = dataclasses.replace(config, timestep_spacing=spacing)
    if sigmas is not None:
        flags = {kind: f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")}
        flags["lu"] = "use_lu_lambdas"
        if sigmas != "plain" and flags[sigmas] not in has:
            others = [kind for kind, flag in flags.items() if flag in has]
            rest = f"it has {', '.join(others)}" if others else "its levels are the timesteps'"
            raise ConfigError(f"{config.sampler} has no {sigmas} sigmas: {rest}")
        asked = {flag: kind == sigmas for kind, flag in flags.items() if flag in has}
        config = dataclasses.replace(config, **asked)
    return config
