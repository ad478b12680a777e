"""Whether a picture's size can fit, told before anything is loaded or compiled.

A lower bound: weights as they lie on the device, and of the activations only those that must be
there at the same time. What it refuses cannot be drawn; what it lets through may still be too
large. XLA's own count for the embedded model on a CPU is 2.5 times the activations here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fluxjax.config import IP_IMAGES, ConfigError
from fluxjax.config.tiling import Tiling

if TYPE_CHECKING:
    from fluxjax.sample.pipeline import Pipeline
    from fluxjax.sample.settings import Settings

_CGROUP = Path("/sys/fs/cgroup")


def require_room(pipe: Pipeline, settings: Settings, pictures: int = 1) -> None:
    """Raises ConfigError where so many pictures at once cannot fit, with the sizes."""
    free = available_bytes()
    if free is None:
        return
    weights, activations = weight_bytes(pipe), activation_bytes(pipe, settings, pictures)
    if weights + activations > free:
        what = "clip" if settings.frames > 1 else "picture"
        several = f"{pictures} {what}s" if pictures > 1 else f"a {what}"
        raise ConfigError(
            f"{several} of {settings.width} x {settings.height} pixels cannot fit: it takes "
            f"{_size(weights)} for weights and at least {_size(activations)} besides, and "
            f"{_size(free)} are free. Try a smaller size"
            + (", --dtype bfloat16" if pipe.dtype.itemsize > 2 else "")
            + ", or more devices (--mesh)"
        )


def weight_bytes(pipe: Pipeline) -> int:
    """On one device, of what is not loaded yet."""
    import jax

    from fluxjax.sample.programs import NAMES, components

    def size(component: str) -> int:
        if pipe.is_loaded(component):
            return 0
        leaves = jax.tree.leaves(pipe.executables.weights(component))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    together = {frozenset(components(pipe.config, name)) for name in NAMES}
    if not pipe.offload:
        together = {frozenset().union(*together)}
    networks = max(sum(map(size, names)) for names in together) // _devices(pipe)
    # Readers are on the first device, whatever there is of others.
    others = [one.reader.weight_bytes for one in (pipe.redux, pipe.image_prompter) if one]
    if pipe.refiner is not None:
        others.append(weight_bytes(pipe.refiner.pipe))
    return max([networks, *others]) if pipe.offload else networks + sum(others)


def activation_bytes(pipe: Pipeline, settings: Settings, pictures: int = 1) -> int:
    """On one device, of the larger one of denoising and decoding."""
    from fluxjax.networks import network_of
    from fluxjax.sample.decoding import TILE
    from fluxjax.sample.programs import UNTILED_LATENTS

    config, scale, settings = pipe.config, pipe.config.vae.scale, pipe.as_drawn(settings)
    size = settings.width, settings.height, settings.frames
    latents = math.prod(pipe.family.shape_of(config, *size)[1:])
    seen, text = latents * (2 if settings.reference else 1), settings.max_sequence_length
    text += 0 if pipe.redux is None else pipe.redux.count
    guided = pipe.family.scale(config, settings.asked_guidance)
    passes = pipe.family.passes(1, guided).shape[1] + 1
    denoiser = config.networks[config.denoiser]
    denoising = pictures * passes * network_of(denoiser).held(denoiser, seen, text)
    denoising += pictures * sum(network_of(n).held(n, latents, text) for n in config.controlnets)
    denoising += pictures * passes * _image_prompts(pipe, settings)
    decoded = min(latents, TILE**2) if latents > UNTILED_LATENTS else latents * pictures
    decoded *= scale**2
    if config.tiling is not None:
        decoded = pictures * math.prod(_tile(settings, config.tiling))
    # The last stage of the decoder at full size: a layer's input and output.
    decoding = decoded * config.vae.block_out_channels[0] * 2
    most = max(denoising, decoding) * pipe.dtype.itemsize // _devices(pipe)
    if pipe.refiner is None:
        return most
    return max(most, activation_bytes(pipe.refiner.pipe, settings, pictures))


def _image_prompts(pipe: Pipeline, settings: Settings) -> int:
    """Keys and values of all IP-Adapters, of one picture in one pass."""
    if pipe.image_prompter is None:
        return 0
    given = sum(getattr(settings, name) is not None for name in IP_IMAGES)
    return 2 * sum(map(math.prod, pipe.image_prompter.shapes(max(given, 1))))


def _tile(settings: Settings, tiling: Tiling) -> Iterator[int]:
    """Rows, columns and frames of what is decoded at once."""
    sides = (
        (settings.height, tiling.rows),
        (settings.width, tiling.columns),
        (settings.frames, tiling.frames),
    )
    for whole, tiles in sides:
        yield whole if tiles is None else min(whole, tiles.size)


def _devices(pipe: Pipeline) -> int:
    """That share the work and have memory of their own; CPU devices share the host's."""
    import jax

    return 1 if pipe.mesh is None or jax.default_backend() == "cpu" else pipe.mesh.size


def available_bytes() -> int | None:
    """What the first device can still take; of a CPU the host's, within its container."""
    import jax

    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit.isdigit():
            used = int((_CGROUP / "memory.current").read_text())
            lines = (_CGROUP / "memory.stat").read_text().splitlines()
            cached = sum(int(x.split()[1]) for x in lines if x.startswith("inactive_file "))
            free.append(int(limit) - used + cached)
    except (OSError, ValueError, IndexError):  # another system, or another kind of group
        pass
    return min(free, default=None)


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
