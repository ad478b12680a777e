"""FLUX.1's transformer, autoencoder, sampler and schedules against recordings of BFL's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxjax.checkpoint.component_json import original_config
from fluxjax.config import (
    DEV,
    SCHNELL,
    AutoencoderConfig,
    ConfigError,
    FluxConfig,
    SchedulerConfig,
)
from fluxjax.diff.recordings import SAMPLING_BOUND, SCHEDULE_BOUND, Arrays, Inputs, Recording
from fluxjax.diff.report import Row, compare
from fluxjax.families import FLUX, Conditioning, Extras, Tokens
from fluxjax.models.autoencoder import Autoencoder, denormalize_latents, normalize_latents
from fluxjax.models.flux import FluxTransformer
from fluxjax.parallel.apply import apply_on
from fluxjax.sample.denoise import denoise
from fluxjax.schedules.flow_euler import flow_euler, sigmas
from fluxjax.schedules.schedule import Schedule, pad
from fluxjax.shapes import Params


def check(recording: Recording, devices: Mesh | None) -> tuple[list[Row], Arrays]:
    """Raises ConfigError for a recording that lacks something."""
    config, inputs = recording.config, recording.inputs
    params = config.get("params")
    if not isinstance(params, dict):
        raise ConfigError(f"{recording.path} says nothing of the network's sizes (params)")
    try:
        network = original_config(params)
    except KeyError as missing:
        raise ConfigError(f"{recording.path}: the recorded configuration lacks {missing}") from None
    weights = recording.params(network, "bfl", devices)
    ours = OURS[type(network)](network, config, weights, inputs, devices)
    rows = recording.rows(ours, sampled=SAMPLING_BOUND if "noise" in inputs else None)
    if "schedule" in config:
        scheduler = DEV.scheduler if params["guidance_embed"] else SCHNELL.scheduler
        rows.append(_schedule_row("schedule", config["schedule"], _tokens(inputs), scheduler))
    return rows, ours


def _autoencoder(
    config: AutoencoderConfig,
    recorded: Mapping[str, Any],
    params: Params,
    inputs: Inputs,
    devices: Mesh | None,
) -> Arrays:
    """Encode the picture, decode those latents: channels second, as recorded."""

    @jax.jit
    def run(params: Any, image: jax.Array) -> dict[str, jax.Array]:
        def both(module: Autoencoder, image: jax.Array) -> tuple[jax.Array, jax.Array]:
            latents: Any = normalize_latents(module.encode(image).mean, config)
            return latents, module.decode(denormalize_latents(latents, config))

        pixels = jnp.moveaxis(image, 1, -1)
        pair = apply_on(devices, Autoencoder(config), {"params": params}, pixels, method=both)
        latents, decoded = pair
        return {"latents": jnp.moveaxis(latents, -1, 1), "image": jnp.moveaxis(decoded, -1, 1)}

    return {name: np.asarray(value) for name, value in run(params, inputs["image"]).items()}


def _flux(
    config: FluxConfig,
    recorded: Mapping[str, Any],
    params: Params,
    inputs: Inputs,
    devices: Mesh | None,
) -> Arrays:
    """One forward at the recorded timesteps, and the Euler run over the recorded schedule."""
    model = FluxTransformer(config, timestep_rounding="bfl")
    apply = partial(apply_on, devices)
    if inputs["txt_ids"].any():
        raise ConfigError(f"{inputs.path}: inputs.txt_ids are zero in every run of FLUX")
    text = Conditioning(jnp.asarray(inputs["txt"]), None, jnp.asarray(inputs["vec"]))
    tokens = None
    if "img_cond_seq" in inputs:  # Kontext: the reference follows along the sequence
        tokens = Tokens(jnp.asarray(inputs["img_cond_seq"]), inputs.positions("img_cond_seq_ids"))
    guided = partial(
        Extras, inputs.positions("img_ids"), tokens=tokens, channels=inputs.get("img_cond")
    )

    @jax.jit
    def forward(params: Any, x: Any, t: Any, guidance: Any) -> Any:
        extras = guided(guidance)
        if tokens is not None:  # recorded for these tokens too: here they are the state's
            x = jnp.concatenate([x, tokens.values], axis=1)
            both = extras.positions, tokens.positions
            positions = jnp.concatenate([jnp.asarray(one) for one in both])
            extras = extras._replace(positions=positions, tokens=None)
        return FLUX.forward(model, {"params": params}, x, t, text, extras, apply=apply)

    @jax.jit
    def run(params: Any, noise: Any, schedule: Schedule, guidance: Any) -> Any:
        extras = guided(guidance)
        variables = {"params": params}
        each, step = FLUX.hoist(model, variables, schedule.times, text, extras, apply=apply)
        passes = jnp.asarray(FLUX.passes(len(schedule.times), None))
        return denoise(step, each, (FLUX.pack(noise).values,), schedule, passes)

    noise = inputs["noise"]
    levels = np.asarray(recorded["schedule"], np.float32)
    guidance = np.full(len(noise), recorded["guidance"], np.float32)
    (latents,) = run(params, noise, pad(flow_euler(levels)), guidance)
    outputs = {
        "forward": forward(params, inputs["packed"], inputs["timesteps"], inputs["guidance"]),
        "latents_packed": latents,
        "latents": FLUX.unpack(latents, *noise.shape[2:]),
    }
    return {name: np.asarray(value) for name, value in outputs.items()}


OURS: dict[type, Callable[..., Arrays]] = {AutoencoderConfig: _autoencoder, FluxConfig: _flux}


def _tokens(inputs: Inputs) -> int:
    return inputs["noise"][0, 0].size // 4


def _schedule_row(name: str, expected: list[float], tokens: int, scheduler: SchedulerConfig) -> Row:
    ours = sigmas(len(expected) - 1, tokens, scheduler)
    return compare(name, ours, np.asarray(expected, np.float32), bound=SCHEDULE_BOUND)


def check_tables(path: Path, recorded: Mapping[str, Any]) -> tuple[list[Row], Arrays]:
    """Recorded schedules. Raises ConfigError where there are none."""
    if "schedules" not in recorded:
        raise ConfigError(f"{path} holds no schedules")
    rows, ours = [], {}
    for entry in recorded["schedules"]:
        steps, tokens, shift = entry["num_steps"], entry["image_seq_len"], entry["shift"]
        name = f"{steps} steps, {tokens} tokens, {'shifted' if shift else 'not shifted'}"
        scheduler = DEV.scheduler if shift else SCHNELL.scheduler
        rows.append(_schedule_row(name, entry["timesteps"], tokens, scheduler))
        ours[name] = sigmas(steps, tokens, scheduler)
    return rows, ours
