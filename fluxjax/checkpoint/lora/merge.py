"""Adapters merged into a checkpoint's tensors, which stay lazy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fluxjax.checkpoint.finite import is_finite
from fluxjax.checkpoint.lora.changes import Change
from fluxjax.checkpoint.lora.reader import read_adapters
from fluxjax.checkpoint.opened_network import OpenNetwork, without_fp8
from fluxjax.checkpoint.pipeline_folder import adapter_defaults
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor, of_whole
from fluxjax.config import ConfigError
from fluxjax.networks import network_of
from fluxjax.shapes import Params

Scaled = tuple[Mapping[str, Change], float]
"""Changes by published name, and the strength at which they count."""


def adaptable(networks: Mapping[str, OpenNetwork]) -> dict[str, Params]:
    """What `read_adapters` asks for, of those of the networks that adapters may change."""
    return {
        name: abstract_params(network.config)
        for name, network in networks.items()
        if network_of(network.config).adapter_prefixes
    }


def merge_files(
    networks: Mapping[str, OpenNetwork], files: Sequence[tuple[Path, float]]
) -> tuple[dict[str, OpenNetwork], dict[str, Any]]:
    """The networks with the adapters of all files at their strengths, see `merge`; and how those
    files say that the model is sampled, a part of `sampling_defaults`.

    Raises also what `read_adapters` does.
    """
    templates, defaults, read = adaptable(networks), dict[str, Any](), []
    for path, strength in files:
        changes, metadata = read_adapters(path, templates)
        read.append((changes, strength))
        defaults |= adapter_defaults(path, metadata)
    merged = {
        name: merge(network, [(changes.get(name, {}), strength) for changes, strength in read])
        for name, network in networks.items()
    }
    return merged, defaults


def merge(network: OpenNetwork, adapters: Sequence[Scaled], *, dtype: Any = None) -> OpenNetwork:
    """The network with every adapter in its weights.

    Each change is formed from the weights as they are without adapters, in float32, and their sum
    is added. `dtype`: of the changed tensors, by default their own (of fp8, bfloat16). Reading a
    tensor raises ConfigError if it is not finite then. Adapters of strength 0 change nothing.
    Raises ConfigError where two adapters replace one parameter by different values, or give the
    first layer different numbers of inputs.
    """
    adapters = [(changes, strength) for changes, strength in adapters if changes and strength]
    if not adapters:
        return network
    changed = dict.fromkeys(name for changes, _ in adapters for name in changes)
    config, tensors = network.config, dict(network.tensors)
    for name in changed:
        mine = [(changes[name], strength) for changes, strength in adapters if name in changes]
        _refuse_two_values(name, mine)
        base = network.tensors[name]
        shape = base.shape
        if inputs := _inputs(name, mine):
            shape = (shape[0], inputs)
            config = replace(config, **{network_of(config).widened[1]: inputs})
        kept = np.dtype(ml_dtypes.bfloat16) if base.dtype.itemsize == 1 else base.dtype
        to = kept if dtype is None else np.dtype(dtype)
        tensors[name] = of_whole(
            shape, to, partial(_merged, network.tensors, name, mine, shape, to)
        )
    return without_fp8(replace(network, config=config, tensors=tensors))


def _refuse_two_values(name: str, mine: Sequence[tuple[Change, float]]) -> None:
    values = [change.value for change, _ in mine if change.value is not None]
    if any(not np.array_equal(values[0], value) for value in values):
        raise ConfigError(f"two adapters put different values in the place of {name}")


def _inputs(name: str, mine: Sequence[tuple[Change, float]]) -> int | None:
    """That a first layer is given where an adapter joins some."""
    asked = sorted({change.inputs for change, _ in mine if change.inputs is not None})
    if len(asked) > 1:
        raise ConfigError(
            f"two adapters make {name} read {asked[0]} and {asked[1]} inputs: they are of models "
            "that draw from different pictures, such as FLUX.1 Fill and Canny"
        )
    return asked[0] if asked else None


def _merged(
    tensors: Mapping[str, Tensor],
    name: str,
    mine: Sequence[tuple[Change, float]],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    def read(other: str) -> np.ndarray:
        base = tensors[other].read().astype(np.float32)
        missing = shape[1] - base.shape[1] if base.ndim == 2 and other == name else 0
        return np.pad(base, ((0, 0), (0, missing))) if missing else base

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # said below
        value = next((change.value for change, _ in mine if change.value is not None), None)
        new = read(name) if value is None else value.astype(np.float32)
        for change, strength in mine:
            if change.delta is not None:
                delta = change.delta(read)
                if delta.shape != new.shape:  # another adapter gives it more inputs
                    delta = np.pad(delta, ((0, 0), (0, new.shape[1] - delta.shape[1])))
                new = new + np.float32(strength) * delta
        new = new.astype(dtype)
    if not is_finite(new):
        raise ConfigError(
            f"{name} is not finite in {dtype.name} with the adapters: their strength is too large, "
            "or the type too small (float32 holds more)"
        )
    return new
