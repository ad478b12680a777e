"""Autoencoders of clips against recordings: whole, with posterior noise, and in tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxjax.checkpoint.component_json import original_config, parse_config
from fluxjax.config import CausalAutoencoderConfig, ConfigError, DCAutoencoderConfig, from_dict
from fluxjax.config.tiling import WHOLE, Tiles, Tiling
from fluxjax.diff.recordings import Arrays, Recording
from fluxjax.diff.report import Row
from fluxjax.models.causal_autoencoder import posterior
from fluxjax.models.video_tiles import decode_tiled, encode_tiled
from fluxjax.networks import network_of
from fluxjax.parallel.tiles import tiles_on


def check_diffusers(recording: Recording, devices: Mesh | None) -> tuple[list[Row], Arrays]:
    """Raises ConfigError for a recording that lacks something."""
    values = recording.config
    config = parse_config(CausalAutoencoderConfig, values.get("config", {}), recording.path)

    def tiles(axis: str) -> Tiles:
        names = (f"tile_sample_{kind}_{axis}" for kind in ("min", "stride"))
        return Tiles(*(_recorded(recording, values, name) for name in names))

    frames = tiles("num_frames")
    tilings = {
        "framewise": Tiling(frames=frames),
        "tiled": Tiling(rows=tiles("height"), columns=tiles("width"), frames=frames),
    }
    return _check(recording, config, tilings, devices)


def check_open_sora(recording: Recording, devices: Mesh | None) -> tuple[list[Row], Arrays]:
    """Raises ConfigError for a recording that lacks something."""
    config = original_config(recording.config.get("config", {}))
    space, frames = _tiles(recording, "sample_size", "sample_tsize")
    tilings = {
        "spatially_tiled": Tiling(rows=space, columns=space),
        "tiled": Tiling(rows=space, columns=space, frames=frames),
    }
    return _check(recording, config, tilings, devices)


def check_dc(recording: Recording, devices: Mesh | None) -> tuple[list[Row], Arrays]:
    """Raises ConfigError for a recording that lacks something."""
    values = recording.config.get("config", {})
    config = from_dict(DCAutoencoderConfig, values)
    space, frames = _tiles(recording, "spatial_tile_size", "temporal_tile_size")
    tilings = {"tiled": Tiling(rows=space, columns=space, frames=frames)}
    return _check(recording, config, tilings, devices, random=False)


def _tiles(recording: Recording, *names: str) -> tuple[Tiles, ...]:
    """Of Open-Sora's sizes, and the part that two tiles share."""
    values = recording.config["config"]
    stride = 1 - _recorded(recording, values, "tile_overlap_factor")
    sizes = [_recorded(recording, values, name) for name in names]
    return tuple(Tiles(size, int(size * stride)) for size in sizes)


def _recorded(recording: Recording, values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ConfigError(f"{recording.path}: the recorded configuration lacks {name}")
    return values[name]


def _check(
    recording: Recording,
    config: CausalAutoencoderConfig | DCAutoencoderConfig,
    tilings: Mapping[str, Tiling],
    devices: Mesh | None,
    random: bool = True,
) -> tuple[list[Row], Arrays]:
    """Everything recorded: latents are scaled, and what is long is in tiles, one on each device.

    `random`: whether latents have a spread."""
    inputs, factor = recording.inputs, config.latent_factor
    params, together = tiles_on(devices, recording.params(config, "published", None))
    model = network_of(config).build(config)

    @cache
    def encoded(name: str, tiling: Tiling) -> Any:
        clip = np.moveaxis(inputs[name], 1, -1)
        return encode_tiled(model, params, clip, tiling, **together)

    def latents(name: str, tiling: Tiling) -> Any:
        code = encoded(name, tiling)
        return factor * (posterior(code).mean if random else code)

    def sampled() -> Any:
        noise = np.moveaxis(inputs["posterior_noise"], 1, -1)
        mean, logvar = posterior(encoded("video", WHOLE))
        return factor * (mean + jnp.exp(logvar / 2) * noise)

    def decoded(name: str, tiling: Tiling) -> np.ndarray:
        unscaled = np.moveaxis(inputs[name], 1, -1) / np.float32(factor)
        return decode_tiled(model, params, unscaled, tiling, **together)

    known: dict[str, Callable[[], Any]] = {
        "latents": lambda: latents("video", WHOLE),
        "image_latents": lambda: latents("image", WHOLE),
        "video": lambda: decoded("latents", WHOLE),
    }
    if random:
        known["latents_sampled"] = sampled
        known["logvar"] = lambda: posterior(encoded("video", WHOLE)).logvar
    for name, tiling in tilings.items():
        known[f"latents_{name}"] = lambda t=tiling: latents("long_video", t)
        known[f"video_{name}"] = lambda t=tiling: decoded("long_latents", t)
    unknown = ", ".join(sorted(recording.outputs.keys() - known.keys()))
    if unknown:
        raise ConfigError(f"{recording.path}: no autoencoder of clips gives outputs.{unknown}")
    ours = {name: np.moveaxis(np.asarray(known[name]()), -1, 1) for name in recording.outputs}
    return recording.rows(ours), ours
