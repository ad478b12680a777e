"""HunyuanVideo's transformer and sampler against recordings of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxjax.checkpoint.component_json import parse_config
from fluxjax.config import ConfigError, HunyuanVideoConfig, SchedulerConfig
from fluxjax.diff.recordings import SAMPLING_BOUND, SCHEDULE_BOUND, Arrays, Inputs, Recording
from fluxjax.diff.report import Row, compare
from fluxjax.families import HUNYUAN_VIDEO, Conditioning, Extras
from fluxjax.families.hunyuan_image_to_video import begun
from fluxjax.models.hunyuan_video import HunyuanVideoTransformer
from fluxjax.parallel.apply import apply_on
from fluxjax.sample.denoise import denoise
from fluxjax.schedules.flow_euler import flow_euler, sigmas
from fluxjax.schedules.schedule import Schedule, pad


def check(recording: Recording, devices: Mesh | None) -> tuple[list[Row], Arrays]:
    """Raises ConfigError for a recording that lacks something."""
    recorded = recording.config
    try:
        network = parse_config(HunyuanVideoConfig, recorded["config"], recording.path)
        ours = _transformer(network, recording, devices)
        expected = _levels(recorded)
        scheduler = SchedulerConfig(shift=recorded["shift"], use_dynamic_shifting=False)
    except KeyError as missing:
        raise ConfigError(f"{recording.path}: the recorded configuration lacks {missing}") from None
    levels = sigmas(len(expected) - 1, 1, scheduler)
    schedule = compare("schedule", levels, expected, bound=SCHEDULE_BOUND)
    return [*recording.rows(ours, sampled=SAMPLING_BOUND), schedule], ours


def _transformer(config: HunyuanVideoConfig, recording: Recording, devices: Mesh | None) -> Arrays:
    """One forward and the runs."""
    inputs, recorded = recording.inputs, recording.config
    variables = {"params": recording.params(config, "published", devices)}
    model, apply = HunyuanVideoTransformer(config), partial(apply_on, devices)
    positions = HUNYUAN_VIDEO.pack(inputs["noise"]).positions

    @jax.jit
    def forward(variables: Any, given: Any) -> Any:
        x, channels = _last(given["hidden_states"]), None
        drawn = config.out_channels // config.patch_size**2
        if x.shape[-1] > drawn:  # a first frame and, after it, which frame that is
            channels = jnp.concatenate([x[..., -1:], x[..., drawn:-1]], axis=-1)
        extras = Extras(positions, given.get("guidance"), channels=channels)
        heard = x[..., :drawn], given["timestep"], _heard(given), extras
        return jnp.moveaxis(HUNYUAN_VIDEO.forward(model, variables, *heard, apply=apply), -1, 1)

    @jax.jit
    def run(variables: Any, given: Any, schedule: Schedule, passes: Any) -> Any:
        texts = [_heard(given, prefix) for prefix in ("", "negative_")[: passes.shape[1] + 1]]
        heard = jax.tree.map(lambda *each: jnp.concatenate(each), *texts)
        guidance = jnp.full(len(heard.sequence), recorded["guidance"], jnp.float32)
        start, channels = given["start"], given.get("channels")
        joined = None if channels is None else jnp.concatenate([channels] * len(texts))
        told = 1000 * schedule.times, heard, Extras(positions, guidance, channels=joined)
        each, step = HUNYUAN_VIDEO.hoist(model, variables, *told, apply=apply)
        (drawn,) = denoise(step, each, (start,), schedule, passes)
        if channels is not None and kind == "token_replace":
            drawn = jnp.where(channels[..., :1] > 0, channels[..., 1:], drawn)
        # Where a first frame was joined, what is drawn of it is dropped.
        return jnp.moveaxis(drawn[:, 1:] if kind == "latent_concat" else drawn, -1, 1)

    arrays: Any = dict(inputs)
    if config.guidance_embeds:  # numpy divides exactly, XLA does not
        arrays["guidance"] = inputs["guidance"] / np.float32(1000)
    kind, schedule = config.image_condition_type, pad(flow_euler(_levels(recorded)))
    arrays["start"] = _last(inputs["noise"])
    if kind is not None:
        arrays["start"] = _last(begun(inputs["image_latents"], inputs["noise"]))
        arrays["channels"] = _given(inputs)
    outputs = {"forward": forward(variables, arrays)}
    scales = {"latents": None, "latents_true_cfg": recorded.get("true_cfg_scale")}
    for name in recording.outputs.keys() & scales.keys():
        passes = HUNYUAN_VIDEO.passes(len(schedule.times), scales[name])
        outputs[name] = run(variables, arrays, schedule, jnp.asarray(passes))
    return {name: np.asarray(value) for name, value in outputs.items()}


def _levels(recorded: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(recorded["schedule"], np.float32)


def _last(latents: Any) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(latents), 1, -1)


def _heard(given: Any, prefix: str = "") -> Conditioning:
    sequence, mask, vector = (
        jnp.asarray(given[prefix + name])
        for name in ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    )
    return Conditioning(sequence, mask.astype(jnp.int32), vector)


def _given(inputs: Inputs) -> jax.Array:
    """Of each place whether it is given, and what."""
    noise, image = _last(inputs["noise"]), _last(inputs["image_latents"])
    first = jnp.zeros((*noise.shape[:-1], 1)).at[:, 0].set(1.0)
    return jnp.concatenate([first, image * first], axis=-1)
