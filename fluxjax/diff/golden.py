"""Our networks against a recorded file: weights, inputs and outputs of the original PyTorch code.

A recorded file is a safetensors file with `weights.*` under the original names, `inputs.*`,
`outputs.*`, and the network's configuration as JSON in its metadata under "config". The weights
come in through the same converter as any checkpoint. torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxjax.checkpoint.bfl import config_from_bfl, from_bfl_params
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import (
    DEV,
    SCHNELL,
    AutoencoderConfig,
    ConfigError,
    FluxConfig,
    SchedulerConfig,
)
from fluxjax.diff.report import Report, Row, compare
from fluxjax.families import FLUX, Conditioning, Extras, Tokens
from fluxjax.models.autoencoder import Autoencoder, denormalize_latents, normalize_latents
from fluxjax.models.flux import FluxTransformer
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings
from fluxjax.sample.denoise import denoise
from fluxjax.schedules.flow_euler import flow_euler, sigmas
from fluxjax.schedules.schedule import Schedule, pad
from fluxjax.shapes import Params
from fluxjax.side_output import marker, side_output

FORWARD_BOUND = 1e-5
SAMPLING_BOUND = 1e-4
SCHEDULE_BOUND = 1e-6  # BFL and diffusers round float32 in another order

Arrays = dict[str, np.ndarray]


def check_golden(path: Path, mesh: str | None = None) -> tuple[Report, Arrays]:
    """Compare ours with a recorded file; returns the report and our outputs by recorded name.

    `path` may also be a JSON file of recorded schedules. Raises ConfigError for a file that is no
    recording or records a family that is not supported. `mesh`: devices that ours runs on, as
    `parallel.mesh.parse_mesh` reads them; a batch that they do not divide is whole on each.
    """
    if path.suffix == ".json":
        return _check_schedules(path)
    tensors, metadata = read_safetensors(path)
    config = _parse(path, metadata.get("config"))
    params = config.get("params")
    if config.get("source") != "black-forest-labs/flux" or not isinstance(params, dict):
        raise ConfigError(
            f"{path} records {config.get('source', 'an unknown source')}, a family that fluxjax "
            "does not support: it knows recordings of black-forest-labs/flux"
        )
    groups: dict[str, dict[str, Any]] = {"weights": {}, "inputs": {}, "outputs": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group not in groups:
            raise ConfigError(f"{path}: {name} is none of weights.*, inputs.* and outputs.*")
        groups[group][rest] = tensor if group == "weights" else tensor.read()
    inputs, recorded = _Recorded(path, groups["inputs"]), groups["outputs"]
    try:
        network = config_from_bfl(params)
    except KeyError as missing:
        raise ConfigError(f"{path}: the recorded configuration lacks {missing}") from None
    devices = None if mesh is None else make_mesh(mesh)
    places = (
        None if devices is None else param_shardings(network, abstract_params(network), devices)
    )
    weights = from_bfl_params(groups["weights"], network, shardings=places)
    ours = OURS[type(network)](network, config, weights, inputs, devices)
    sampled = SAMPLING_BOUND if "noise" in inputs else FORWARD_BOUND
    rows: list[Row] = []
    for name, expected in recorded.items():
        bound = sampled if name.startswith("latents") else FORWARD_BOUND
        rows.append(compare(f"outputs.{name}", ours[name], expected, bound=bound))
    if "schedule" in config:
        scheduler = DEV.scheduler if params["guidance_embed"] else SCHNELL.scheduler
        rows.append(_schedule_row("schedule", config["schedule"], _tokens(inputs), scheduler))
    return Report(title=path.name, rows=tuple(rows)), {f"outputs.{k}": ours[k] for k in recorded}


def save_outputs(path: Path, outputs: Arrays) -> None:
    """Write our outputs as safetensors under their recorded names.

    Raises what `side_output.check_side_output` raises.
    """
    tensors = {name: of_array(array) for name, array in outputs.items()}
    with side_output(path, "outputs") as part:
        write_safetensors(part, tensors, marker("outputs"))


class _Recorded(dict[str, np.ndarray]):
    """Inputs by name; a missing one is a sentence, not a KeyError."""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self.path = path

    def __missing__(self, name: str) -> np.ndarray:
        raise ConfigError(f"{self.path} lacks the tensor inputs.{name}")


def _parse(path: Path, text: str | None) -> dict[str, Any]:
    try:
        config = json.loads(text or "")
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ConfigError(f'{path} is no recording: its metadata has no JSON under "config"')
    return config


def _autoencoder(
    config: AutoencoderConfig,
    recorded: Mapping[str, Any],
    params: Params,
    inputs: _Recorded,
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
    inputs: _Recorded,
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
        tokens = Tokens(jnp.asarray(inputs["img_cond_seq"]), _ids(inputs, "img_cond_seq_ids"))
    guided = partial(
        Extras, _ids(inputs, "img_ids"), tokens=tokens, channels=inputs.get("img_cond")
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


def _ids(inputs: _Recorded, name: str) -> jax.Array:
    ids = inputs[name]
    if (ids != ids[:1]).any():
        raise ConfigError(f"{inputs.path}: inputs.{name} differs between the samples of the batch")
    return jnp.asarray(ids[0])


def _tokens(inputs: _Recorded) -> int:
    return inputs["noise"][0, 0].size // 4


def _schedule_row(name: str, expected: list[float], tokens: int, scheduler: SchedulerConfig) -> Row:
    ours = sigmas(len(expected) - 1, tokens, scheduler)
    return compare(name, ours, np.asarray(expected, np.float32), bound=SCHEDULE_BOUND)


def _check_schedules(path: Path) -> tuple[Report, Arrays]:
    recorded = _parse(path, path.read_text())
    if recorded.get("source") != "black-forest-labs/flux" or "schedules" not in recorded:
        raise ConfigError(f"{path} holds no schedules of black-forest-labs/flux")
    rows, ours = [], {}
    for entry in recorded["schedules"]:
        steps, tokens, shift = entry["num_steps"], entry["image_seq_len"], entry["shift"]
        name = f"{steps} steps, {tokens} tokens, {'shifted' if shift else 'not shifted'}"
        scheduler = DEV.scheduler if shift else SCHNELL.scheduler
        rows.append(_schedule_row(name, entry["timesteps"], tokens, scheduler))
        ours[name] = sigmas(steps, tokens, scheduler)
    return Report(title=path.name, rows=tuple(rows)), ours
