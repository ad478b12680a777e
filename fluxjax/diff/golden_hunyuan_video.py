"""HunyuanVideo's transformer and sampler against recordings of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxjax.checkpoint.component_json import parse_config
from fluxjax.config import ConfigError, HunyuanVideoConfig, SchedulerConfig
from fluxjax.diff.recordings import SAMPLING_BOUND, SCHEDULE_BOUND, Arrays, Inputs, Recording
from fluxjax.diff.report import Row, compare
from fluxjax.models.hunyuan_video import HunyuanVideoTransformer
from fluxjax.models.latents import pack_video, unpack_video
from fluxjax.parallel.apply import apply_on
from fluxjax.sample.denoise import Kept, denoise
from fluxjax.schedules.flow_euler import flow_euler, sigmas
from fluxjax.schedules.schedule import pad

# How much of a given first frame the noise of a run holds.
GIVEN_SHARE = 0.001


def check(recording: Recording, devices: Mesh | None) -> tuple[list[Row], Arrays]:
    """Raises ConfigError for a recording that lacks something."""
    recorded = recording.config
    try:
        network = parse_config(HunyuanVideoConfig, recorded["config"], recording.path)
        ours = _transformer(network, recording, devices)
        expected = np.asarray(recorded["schedule"], np.float32)
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
    model = HunyuanVideoTransformer(config)
    guidance = None
    if config.guidance_embeds:  # numpy divides exactly, XLA does not
        guidance = jnp.asarray(inputs["guidance"] / np.float32(1000))

    @jax.jit
    def forward(variables: Any, x: Any) -> Any:
        text = x["encoder_hidden_states"], x["encoder_attention_mask"], x["pooled_projections"]
        given = x["hidden_states"], x["timestep"], *text, guidance
        return apply_on(devices, model, variables, *given)

    levels = np.asarray(recorded["schedule"], np.float32)
    outputs = {"forward": forward(variables, dict(inputs))}
    scales = {"latents": None, "latents_true_cfg": recorded.get("true_cfg_scale")}
    for name in recording.outputs.keys() & scales.keys():
        run = _Run(config, model, devices, inputs, float(recorded["guidance"]))
        outputs[name] = run(variables, levels, scales[name])
    return {name: np.asarray(value) for name, value in outputs.items()}


class _Run:
    """Euler steps over recorded levels, with a first frame where one is recorded."""

    def __init__(
        self,
        config: HunyuanVideoConfig,
        model: HunyuanVideoTransformer,
        devices: Mesh | None,
        inputs: Inputs,
        guidance: float,
    ) -> None:
        self.config, self.model, self.devices = config, model, devices
        self.inputs, self.guidance = inputs, guidance
        self.size = inputs["noise"].shape[2:]

    def __call__(self, variables: Any, levels: np.ndarray, true_cfg: float | None) -> Any:
        schedule, kept, channels = pad(flow_euler(levels)), None, None
        state = self.inputs["noise"]
        if self.config.image_condition_type is not None:
            state, kept, channels = self._first_frame(state)
        if kept is not None:
            keep = np.tile(np.array([1.0, 0.0], np.float32), (len(schedule.times), 1))
            schedule = schedule._replace(keep=keep)
        passes = np.full((len(schedule.times), 0 if true_cfg is None else 1), true_cfg or 0.0)
        text = self._text([""] if true_cfg is None else ["", "negative_"])
        given = {"state": self._packed(state), "channels": channels, "kept": kept, "text": text}
        weights = jnp.asarray(passes, jnp.float32)
        (latents,) = jax.jit(self._denoise)(variables, given, schedule, weights)
        _, rows, columns = self.size
        frames = unpack_video(latents, rows, columns, self.config.patch_size)
        # Where a first frame was joined, what is drawn of it is dropped.
        return frames[:, :, 1:] if channels is not None else frames

    def _packed(self, latents: Any) -> jax.Array:
        return jnp.asarray(pack_video(latents, self.config.patch_size))

    def _text(self, prefixes: list[str]) -> dict[str, jax.Array]:
        names = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
        return {
            name: jnp.concatenate([jnp.asarray(self.inputs[p + name]) for p in prefixes])
            for name in names
        }

    def _first_frame(self, noise: np.ndarray) -> tuple[Any, Kept | None, Any]:
        """The start, what is kept of it, and what is joined to its channels."""
        image, first = self.inputs["image_latents"], np.zeros((1, 1, self.size[0], 1, 1))
        first[:, :, 0] = 1.0
        first = np.broadcast_to(first, (len(noise), 1, *self.size)).astype(np.float32)
        state = (1 - GIVEN_SHARE) * noise + GIVEN_SHARE * image
        if self.config.image_condition_type == "latent_concat":
            joined = np.concatenate([image * first, first], axis=1)
            return state, None, self._packed(joined)
        picture = self._packed(np.broadcast_to(image, noise.shape))
        drawn = 1 - self._packed(np.broadcast_to(first, noise.shape))
        state = state * (1 - first) + image * first
        return state, Kept(drawn, picture, jnp.zeros_like(picture)), None

    def _denoise(self, variables: Any, given: Mapping[str, Any], schedule: Any, passes: Any) -> Any:
        def method(name: str, *args: Any) -> Any:
            return apply_on(self.devices, self.model, variables, *args, method=name)

        text, channels = given["text"], given["channels"]
        states, pooled = text["encoder_hidden_states"], text["pooled_projections"]
        batch, tokens = len(states), given["state"].shape[1]
        lengths = text["encoder_attention_mask"].sum(axis=1).astype(jnp.int32)
        scales = jnp.full(batch, self.guidance) if self.config.guidance_embeds else None
        times = 1000 * jnp.asarray(schedule.times)
        each = method("step_modulations", times, pooled, scales)
        rope = method("positions", *self.size, states.shape[1])
        replaced = method("replaced", *self.size)

        def step(x: Any, one: Any) -> Any:
            time, modulations = one
            refined = method("embed_text", states, jnp.full(batch, time), lengths)
            if channels is not None:
                x = jnp.concatenate([x, channels], axis=-1)
            return method("denoise", x, refined, modulations, rope, tokens + lengths, replaced)

        return denoise(step, (times, each), (given["state"],), schedule, passes, kept=given["kept"])
