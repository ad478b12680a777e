"""Open-Sora 2.0's transformer, sampler, schedules, sizes and prompts against recordings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxjax.config import ConfigError, OpenSoraConfig
from fluxjax.config.video_sizes import video_sizes
from fluxjax.diff.recordings import (
    SAMPLING_BOUND,
    SCHEDULE_BOUND,
    Arrays,
    Inputs,
    Recording,
)
from fluxjax.diff.report import Row, compare
from fluxjax.families import OPEN_SORA, Conditioning, Extras
from fluxjax.families.noise_path import OPEN_SORA_FLOW
from fluxjax.models.latents import pack_video, unpack_video, video_ids
from fluxjax.models.open_sora import OpenSoraTransformer
from fluxjax.models.video_condition import VideoCondition, given_frames, given_lengths, put_back
from fluxjax.networks import NETWORKS
from fluxjax.parallel.apply import apply_on
from fluxjax.sample.denoise import denoise
from fluxjax.schedules.flow_euler import flow_euler
from fluxjax.schedules.open_sora import VideoGuidance, open_sora_levels, open_sora_passes
from fluxjax.schedules.schedule import Schedule, pad
from fluxjax.text.video_prompt import video_prompt


def check(recording: Recording, devices: Mesh | None) -> tuple[list[Row], Arrays]:
    """Raises ConfigError for a recording that lacks something."""
    if not recording.weights:
        ours = _conditions(recording)
        return recording.rows(ours), ours
    config = recording.config
    try:
        network = _network(config["config"])
        transformer = _transformer(network, recording, devices)
        schedule = _schedule_row(recording)
    except KeyError as missing:
        raise ConfigError(f"{recording.path}: the recorded configuration lacks {missing}") from None
    return [*recording.rows(transformer, sampled=SAMPLING_BOUND), schedule], transformer


def _network(params: Mapping[str, Any]) -> OpenSoraConfig:
    dialect = NETWORKS[OpenSoraConfig].dialect("bfl")
    assert dialect.from_original is not None
    return dialect.from_original(params)


def _transformer(config: OpenSoraConfig, recording: Recording, devices: Mesh | None) -> Arrays:
    """One forward of the three passes at the recorded timesteps, and the run."""
    inputs, recorded = recording.inputs, recording.config
    dialect = "fused" if recorded["config"]["fused_qkv"] else "bfl"
    variables = {"params": recording.params(config, dialect, devices)}
    model = OpenSoraTransformer(config, timestep_rounding="bfl")
    patch, noise, apply = config.patch_size, inputs["noise"], partial(apply_on, devices)
    frames, rows, columns = size = noise.shape[2:]
    if (inputs.positions("img_ids") != video_ids(frames, rows, columns, patch)).any():
        raise ConfigError(f"{recording.path}: inputs.img_ids are not those of latents of {size}")

    def latents(tokens: Any) -> Any:
        return jnp.moveaxis(jnp.asarray(unpack_video(tokens, rows, columns, patch)), 1, -1)

    def tokens(latents: Any) -> Any:
        return jnp.asarray(pack_video(jnp.moveaxis(latents, -1, 1), patch))

    def heard(given: Any) -> tuple[Conditioning, Extras]:
        text = Conditioning(given["txt"], None, given["vec"])
        return text, Extras(OPEN_SORA.pack(noise).positions, channels=latents(given["cond"]))

    @jax.jit
    def forward(variables: Any, given: Any) -> Any:
        state, t = latents(given["packed"]), given["timesteps"]
        told = heard(given)
        return tokens(OPEN_SORA.forward(model, variables, state, t, *told, apply=apply))

    @jax.jit
    def run(variables: Any, given: Any, schedule: Schedule, passes: Any) -> Any:
        told = heard(given)
        each, step = OPEN_SORA.hoist(model, variables, schedule.times, *told, apply=apply)
        state = (OPEN_SORA.pack(given["noise"]).values,)
        return denoise(step, each, state, schedule, passes)

    schedule = pad(flow_euler(np.asarray(recorded["schedule"], np.float32)))
    arrays: Any = dict(inputs)
    (drawn,) = run(variables, arrays, schedule, _passes(recorded, len(schedule.times)))
    outputs = {
        "forward": forward(variables, arrays),
        "latents_packed": tokens(drawn),
        "latents": OPEN_SORA.unpack(drawn, *size),
    }
    return {name: np.asarray(value) for name, value in outputs.items()}


def _passes(recorded: Mapping[str, Any], padded: int) -> jax.Array:
    guidance = VideoGuidance(
        text=recorded["guidance"],
        image=recorded["guidance_img"],
        text_oscillates=recorded["text_osci"],
        image_oscillates=recorded["image_osci"],
        by_frame=recorded["scale_temporal_osci"],
    )
    pictures = recorded["cond"].startswith("i2v")
    steps = len(recorded["schedule"]) - 1
    weights = open_sora_passes(steps, recorded["latent_frames"], guidance, pictures=pictures)
    missing = [(0, padded - steps), (0, 0), (0, 0)]
    return jnp.asarray(np.pad(weights, missing, mode="edge"))


def _schedule_row(recording: Recording) -> Row:
    expected, recorded = recording.config["schedule"], recording.config
    rows, columns = recording.inputs["noise"].shape[3:]
    tokens = rows * columns // recorded["config"]["patch_size"] ** 2
    levels = open_sora_levels(len(expected) - 1, tokens, recorded["latent_frames"])
    return compare("schedule", levels, np.asarray(expected, np.float32), bound=SCHEDULE_BOUND)


def _conditions(recording: Recording) -> Arrays:
    """Masks and given frames of every kind, those put back, and a pair of training."""
    inputs = recording.inputs
    drawn = jnp.asarray(inputs["z"])
    ours: dict[str, Any] = {}
    for kind in get_args(VideoCondition):
        given = given_frames(kind, drawn.shape, *_references(inputs, kind))
        ours[f"masks.{kind}"], ours[f"masked_ref.{kind}"] = given
        # The original puts them back in the first video of a batch alone.
        ours[f"latents.{kind}"] = drawn.at[0].set(put_back(kind, drawn, given)[0])
    alpha, normal = recording.config["alpha"], jnp.asarray(inputs["normal"])
    t = jax.nn.sigmoid(normal)
    ours["t"] = t = alpha * t / (1.0 + (alpha - 1.0) * t)
    data, noise = jnp.asarray(inputs["x_0"]), jnp.asarray(inputs["x_1"])
    ours["x_t"] = OPEN_SORA_FLOW.state(t).of(data, noise)
    ours["target"] = OPEN_SORA_FLOW.target(t).of(data, noise)
    return {name: np.asarray(value) for name, value in ours.items()}


def _references(inputs: Inputs, kind: str) -> tuple[Any, Any]:
    first, last = given_lengths(kind)
    if "i2v" in kind:
        head = inputs["reference_head"] if first else None
        return head, inputs["reference_tail"] if last else None
    video = {0: None, 9: inputs["reference_short"], 17: inputs["reference_video"]}
    return video[first], video[last]


def check_tables(path: Path, recorded: Mapping[str, Any]) -> tuple[list[Row], Arrays]:
    """Recorded schedules, or prompts and sizes. Raises ConfigError where there are none."""
    if "schedules" in recorded:
        checked = map(_shifted, recorded["schedules"])
    elif "sizes" in recorded and "prompts" in recorded:
        checked = [_sizes(recorded["sizes"]), _prompts(recorded["prompts"])]
    else:
        raise ConfigError(f"{path} holds neither schedules nor prompts and sizes")
    rows, ours = [], {}
    for name, found, expected, bound in checked:
        ours[name] = found
        rows.append(compare(name, found, expected, bound=bound))
    return rows, ours


Checked = tuple[str, np.ndarray, np.ndarray, float]


def _shifted(entry: Mapping[str, Any]) -> Checked:
    steps, tokens, frames = (entry[k] for k in ("num_steps", "image_seq_len", "num_frames"))
    levels = open_sora_levels(steps, tokens, frames)
    name = f"{steps} steps, {tokens} tokens, {frames} frames"
    return name, levels, np.asarray(entry["timesteps"], np.float32), SCHEDULE_BOUND


def _sizes(entries: list[Mapping[str, Any]]) -> Checked:
    """Every size, and how many each table has."""

    def table(entry: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        return video_sizes(entry["resolution"], entry["unit"], training=entry["training"])

    nothing = (0, 0)
    found = [table(entry).get(entry["aspect_ratio"], nothing) for entry in entries]
    expected = [entry["height_width"] for entry in entries]
    kinds = {_kind(entry): entry for entry in entries}
    found += [(len(table(entry)), 0) for entry in kinds.values()]
    expected += [(sum(_kind(e) == kind for e in entries), 0) for kind in kinds]
    return "sizes", np.asarray(found, np.float32), np.asarray(expected, np.float32), 0.0


def _kind(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["resolution"], entry["unit"], entry["training"]


def _prompts(entries: list[Mapping[str, Any]]) -> Checked:
    """1 for each prompt that is written as recorded."""
    found = [video_prompt(e["prompt"], e["fps"], e["motion_score"]) == e["text"] for e in entries]
    return "prompts", np.asarray(found, np.float32), np.ones(len(entries), np.float32), 0.0
