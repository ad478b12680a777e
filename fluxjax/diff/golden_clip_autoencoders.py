"""Autoencoders of clips against recordings: whole, with posterior noise, and in tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.checkpoint.component_json import parse_config
from fluxjax.config import CausalAutoencoderConfig, ConfigError
from fluxjax.config.tiling import WHOLE, Tiles, Tiling
from fluxjax.diff.recordings import Arrays, Recording
from fluxjax.diff.report import Row
from fluxjax.models.autoencoder import Posterior
from fluxjax.models.causal_autoencoder import CausalAutoencoder, posterior
from fluxjax.models.clip_tiles import decode_tiled, encode_tiled
from fluxjax.networks import NETWORKS
from fluxjax.parallel.mesh import AXES, replicated


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
    values = recording.config.get("config", {})
    read = partial(_recorded, recording, values)
    dialect = NETWORKS[CausalAutoencoderConfig].dialect("published")
    assert dialect.from_original is not None
    config = dialect.from_original(values)
    overlap = read("tile_overlap_factor")
    space, frames = (
        Tiles(size, int(size * (1 - overlap)))
        for size in (read("sample_size"), read("sample_tsize"))
    )
    tilings = {
        "spatially_tiled": Tiling(rows=space, columns=space),
        "tiled": Tiling(rows=space, columns=space, frames=frames),
    }
    return _check(recording, config, tilings, devices)


def _recorded(recording: Recording, values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ConfigError(f"{recording.path}: the recorded configuration lacks {name}")
    return values[name]


def _check(
    recording: Recording,
    config: CausalAutoencoderConfig,
    tilings: Mapping[str, Tiling],
    devices: Mesh | None,
) -> tuple[list[Row], Arrays]:
    """Everything recorded: latents are scaled, and what is long is in tiles, one on each device."""
    inputs, factor = recording.inputs, config.latent_factor
    params = recording.params(config, "published", None)
    run: dict[str, Any] = {}
    if devices is not None:
        params = jax.device_put(params, replicated(devices))
        place = NamedSharding(devices, P(AXES))
        run = {"together": devices.size, "spread": partial(jax.device_put, device=place)}
    model = CausalAutoencoder(config)

    @cache
    def encoded(name: str, tiling: Tiling) -> Posterior:
        clip = np.moveaxis(inputs[name], 1, -1)
        return posterior(encode_tiled(model, params, clip, tiling, **run))

    def sampled() -> Any:
        noise = np.moveaxis(inputs["posterior_noise"], 1, -1)
        mean, logvar = encoded("video", WHOLE)
        return mean + jnp.exp(logvar / 2) * noise

    def decoded(name: str, tiling: Tiling) -> np.ndarray:
        latents = np.moveaxis(inputs[name], 1, -1) / np.float32(factor)
        return decode_tiled(model, params, latents, tiling, **run)

    known: dict[str, Callable[[], Any]] = {
        "latents": lambda: encoded("video", WHOLE).mean * factor,
        "latents_sampled": lambda: sampled() * factor,
        "logvar": lambda: encoded("video", WHOLE).logvar,
        "image_latents": lambda: encoded("image", WHOLE).mean * factor,
        "video": lambda: decoded("latents", WHOLE),
    }
    for name, tiling in tilings.items():
        known[f"latents_{name}"] = lambda t=tiling: encoded("long_video", t).mean * factor
        known[f"video_{name}"] = lambda t=tiling: decoded("long_latents", t)
    unknown = ", ".join(sorted(recording.outputs.keys() - known.keys()))
    if unknown:
        raise ConfigError(f"{recording.path}: no autoencoder of clips gives outputs.{unknown}")
    ours = {name: np.moveaxis(np.asarray(known[name]()), -1, 1) for name in recording.outputs}
    return recording.rows(ours), ours
