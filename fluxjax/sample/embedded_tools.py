"""The embedded model with a tool that it has learnt, chosen by what it is given. Without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fluxjax.config import ConfigError
from fluxjax.hub import embedded_adapter
from fluxjax.sample.sources import TINY, Sources

TOOLS = {"control": "tiny-canny", "reference": "tiny-edit", "mask": "tiny-fill"}
"""By a picture that is given: the embedded model that has learnt to draw with it."""
_LEARNT = {"control": "to follow edges", "reference": "to edit", "mask": "to fill"}


def with_tool(
    sources: Sources, asked: Sequence[Mapping[str, Any]], note: Callable[[str], None]
) -> Sources:
    """The embedded model as it has learnt to use the pictures in `asked`, settings of each line of
    prompts; any other model, and one with adapters or ControlNets of one's own, as it is.

    Raises ConfigError where only some of them have a control, which no other tool draws with."""
    pictures = {_picture_of(settings) for settings in asked}
    learnt = {name for name, tool in TOOLS.items() if embedded_adapter(tool) is not None}
    if not _is_plain(sources):
        return sources
    if len(pictures) > 1 and "control" in pictures & learnt:
        raise ConfigError(
            f"of the prompts some have a control and some have none: --model {TOOLS['control']} "
            "draws those with one, so give them a file of their own"
        )
    (picture,) = pictures if len(pictures) == 1 else (None,)
    if picture not in learnt:
        return sources
    note(f"--model {TOOLS[picture]} draws this, the embedded model that learnt {_LEARNT[picture]}")
    return dataclasses.replace(sources, model=TOOLS[picture])


def require_tool(sources: Sources, given: Collection[str]) -> None:
    """Raises ConfigError, which names the model to load, for pictures that the embedded model alone
    can make nothing of. (By a mask it can draw without having learnt it.)"""
    for picture in ("control", "reference"):
        tool = TOOLS[picture]
        if picture in given and _is_plain(sources) and embedded_adapter(tool) is not None:
            raise ConfigError(
                f"the embedded model has not learnt {_LEARNT[picture]} as it is: "
                f'load_pipeline("{tool}") draws with a {picture}'
            )


def _is_plain(sources: Sources) -> bool:
    return sources.model == TINY and not (sources.lora or sources.controlnet)


def _picture_of(settings: Mapping[str, Any]) -> str | None:
    """A mask with a strength below 1, or a soft one, asks for inpainting, which any model does; but
    a noise mask, or none, for what reads masks."""
    inpaints = (settings.get("strength") or 1.0) < 1.0 or settings.get("soft_mask")
    inpaints = inpaints and settings.get("noise_mask") is None
    masked = not inpaints and (settings.get("mask") or settings.get("expand")) is not None
    there = {name: settings.get(name) is not None for name in TOOLS} | {"mask": masked}
    return next((name for name, is_there in there.items() if is_there), None)
