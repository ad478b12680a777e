"""ControlNets of a run: their folders, their pictures, and how strong each one is when.

Source: diffusers `FluxControlNetPipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fluxjax.checkpoint.lora.scaled_file import scaled_files
from fluxjax.checkpoint.source import OpenNetwork, open_network
from fluxjax.config import (
    CONTROL_MODES,
    CONTROLS,
    ConfigError,
    ControlNetConfig,
    PipelineConfig,
)
from fluxjax.families import family_of
from fluxjax.families.family import AnyArray
from fluxjax.hub import find
from fluxjax.sample.edges import canny_edges
from fluxjax.sample.reference import pixels
from fluxjax.schedules.schedule import Schedule

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from fluxjax.sample.given_pictures import Given
    from fluxjax.sample.settings import Settings

Scaled = tuple[str, float]


class ControlInput(NamedTuple):
    """What one ControlNet is given."""

    picture: Float[AnyArray, "_ c *size"] | Float[AnyArray, "_ height width 3"]
    """Latents or pixels, a row for each picture or one for all."""
    mode: int | None = None
    scale: float = 1.0
    range: tuple[float, float] = (0.0, 1.0)
    """Parts of the run, 0 to 1, between which it counts."""

    def rows(self, count: int) -> tuple[AnyArray, Int[np.ndarray, " count"] | None]:
        """What each of `count` pictures is drawn with: control picture and mode."""
        seen = np.broadcast_to(self.picture, (count, *self.picture.shape[1:]))
        return seen, None if self.mode is None else np.full(count, self.mode, np.int32)

    def scales(self, schedule: Schedule) -> Float[np.ndarray, "steps"]:
        """Of each step of `schedule`; parts are those of the steps that are run."""
        start, end = self.range
        first, count = schedule.first, schedule.steps - schedule.first
        steps = np.arange(len(schedule.times)) - first
        counts = ~((steps / count < start) | ((steps + 1) / count > end))
        return np.where(counts, self.scale, 0.0).astype(np.float32)


def given_controlnets(given: Any) -> list[Scaled]:
    """(folder, scale) of each of what Python gives: "FOLDER", "FOLDER:SCALE", (FOLDER, SCALE), or
    a list of these. Raises ConfigError for too many."""
    found = scaled_files(given)
    if len(found) > len(CONTROLS):
        raise ConfigError(f"at most {len(CONTROLS)} ControlNets go together, got {len(found)}")
    return found


def open_controlnets(folders: Sequence[Scaled], config: PipelineConfig) -> list[OpenNetwork]:
    """Of each folder, opened once where it is named again.

    Raises FileNotFoundError, and ConfigError for one that belongs to another model.
    """
    opened: dict[str, OpenNetwork] = {}
    if folders and not any("ControlNet" in name for name in family_of(config.class_name).tasks):
        raise ConfigError(f"a ControlNet goes with FLUX.1 alone, not with {config.class_name}")
    for folder, _ in folders:
        if folder not in opened:
            path = find(folder, "checkpoint")
            if not path.exists():
                raise FileNotFoundError(f"there is no ControlNet folder {path}")
            opened[folder] = open_network(path, "controlnet")
            opened[folder].config.require_same_model(path, config.networks[config.denoiser])
    return [opened[folder] for folder, _ in folders]


def control_settings(mode: Any, scale: Any, between: Any) -> dict[str, Any]:
    """The settings of what Python gives: one value or a list of them; None of a mode is left out,
    as of a ControlNet that has none. Raises nothing: `Settings` checks them."""

    def listed(values: Any) -> Any:
        return list(values) if isinstance(values, list | tuple) else [values]

    found: dict[str, Any] = {}
    if mode is not None:
        found["control_mode"] = [
            str(one) if type(one) is int else one for one in listed(mode) if one is not None
        ]
    if scale is not None:
        found["control_scale"] = listed(scale)
    if between is not None:
        pairs = listed(between)
        pairs = [pairs] if not any(isinstance(one, list | tuple) for one in pairs) else pairs
        found["control_range"] = [end for pair in pairs for end in listed(pair)]
    return found


def check_controls(config: PipelineConfig, settings: Settings, given: Given) -> None:
    """Raises ConfigError, which says what the ControlNets take, for settings that do not fit."""
    nets, controls = len(config.controlnets), len(given.controls)
    if not nets:
        for name in ("control_mode", "control_scale", "control_range"):
            if getattr(settings, name) is not None:
                raise ConfigError(
                    f"{name} is for ControlNets, and this model has none: give "
                    "a folder of one as controlnet"
                )
        if controls > 1:
            raise ConfigError(f"this model takes one control, got {controls}")
        return
    _each(settings.control_scale, nets, "control_scale")
    _each(settings.control_range, nets, "control_range", 2)
    if controls > 1:
        _each(given.controls, nets, "control")
    modes_of(config.controlnets, settings.control_mode)


def modes_of(nets: Sequence[ControlNetConfig], modes: Sequence[str] | None) -> list[int | None]:
    """The number of each ControlNet's mode. Raises ConfigError for a wrong one, or none."""
    unions = [net for net in nets if net.num_mode]
    known = ", ".join(CONTROL_MODES)
    if not unions:
        if modes:
            raise ConfigError(
                "control_mode is for union ControlNets, and this one knows one kind "
                "of picture: leave it out"
            )
        return [None] * len(nets)
    if not modes:
        raise ConfigError(
            f"a union ControlNet needs a control_mode, the kind of its control: {known}"
        )
    numbers = [
        CONTROL_MODES.get(mode, -1) if mode in CONTROL_MODES else int(mode)
        for mode in _each(modes, len(unions), "control_mode")
    ]
    for mode, number, net in zip(modes, numbers, unions, strict=False):
        if number >= net.num_mode:
            raise ConfigError(
                f"control_mode {mode}: this ControlNet has the modes 0 to {net.num_mode - 1}"
            )
    left = iter(numbers)
    return [next(left) if net.num_mode else None for net in nets]


def _each(values: Sequence[Any] | None, count: int, name: str, size: int = 1) -> list[Any]:
    """One of `values` (or `size` of them) for each of `count`; one serves all."""
    values = () if values is None else values
    groups = [
        values[i] if size == 1 else tuple(values[i : i + size]) for i in range(0, len(values), size)
    ]
    if len(groups) == 1:
        return groups * count
    if groups and len(groups) != count:
        raise ConfigError(
            f"{name} is given {len(groups)} times for {count} ControlNets: give it "
            "once, or once for each"
        )
    return groups


def control_pictures(
    config: PipelineConfig, given: Given, settings: Settings
) -> dict[str, Float[np.ndarray, "1 height width 3"]]:
    """Pixels of what each ControlNet (or FLUX.1 Control) sees, by the names of CONTROLS; with
    `canny` the edges of photographs, of several of those whose mode is canny."""
    if not given.controls:
        return {}
    size = settings.width, settings.height
    nets = config.controlnets
    count = max(1, len(nets))
    modes = modes_of(nets, settings.control_mode) if nets else [None]
    canny = CONTROL_MODES["canny"]
    of_photo = [mode == canny for mode in modes]
    of_photo = of_photo if any(of_photo) else [True] * count

    def seen(picture: Picture, photo: bool) -> Float[np.ndarray, "1 height width 3"]:
        if photo and settings.canny is not None:
            picture = canny_edges(picture, *size, settings.canny)
        return pixels(picture, *size)

    pictures = _each(given.controls, count, "control")
    return {
        name: seen(picture, photo)
        for name, picture, photo in zip(CONTROLS, pictures, of_photo, strict=False)
    }


def control_inputs(
    config: PipelineConfig,
    settings: Settings,
    scales: Sequence[float],
    pictures: Sequence[AnyArray],
) -> tuple[ControlInput, ...]:
    """Of each ControlNet; `scales` are those that they were loaded with, `pictures` what each
    sees."""
    nets = config.controlnets
    modes = modes_of(nets, settings.control_mode)
    chosen = _each(settings.control_scale, len(nets), "control_scale") or scales
    ranges = _each(settings.control_range, len(nets), "control_range", 2)
    ranges = ranges or [(0.0, 1.0)] * len(nets)
    return tuple(map(ControlInput, pictures, modes, chosen, ranges))
