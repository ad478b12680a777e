"""What a recorded file holds: weights, inputs and outputs of the original PyTorch code.

A recording is a safetensors file with `weights.*` under the original names, `inputs.*`,
`outputs.*`, and the network's configuration as JSON in its metadata under "config".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxjax.checkpoint.placement import load_tree
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import ConfigError
from fluxjax.diff.report import Row, compare
from fluxjax.networks import network_of
from fluxjax.parallel.rules import param_shardings
from fluxjax.shapes import Params

FORWARD_BOUND = 1e-5
SAMPLING_BOUND = 1e-4
SCHEDULE_BOUND = 1e-6  # BFL, Open-Sora and diffusers round float32 in another order

Arrays = dict[str, np.ndarray]


class Inputs(dict[str, np.ndarray]):
    """Inputs by name; a missing one is a sentence, not a KeyError."""

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self.path = path

    def __missing__(self, name: str) -> np.ndarray:
        raise ConfigError(f"{self.path} lacks the tensor inputs.{name}")

    def positions(self, name: str) -> jax.Array:
        """Ids that are recorded for each sample of the batch and must be the same for all."""
        ids = self[name]
        if (ids != ids[:1]).any():
            raise ConfigError(
                f"{self.path}: inputs.{name} differs between the samples of the batch"
            )
        return jnp.asarray(ids[0])


@dataclass(frozen=True)
class Recording:
    """One safetensors file of the original code's weights, inputs and outputs."""

    path: Path
    config: Mapping[str, Any]
    """What the metadata tell."""
    weights: Mapping[str, Any]
    """Lazy tensors under the original names."""
    inputs: Inputs
    outputs: Arrays

    def params(self, network: Any, dialect: str, devices: Mesh | None) -> Params:
        """The weights of `network`, a configuration, from names in `dialect`.

        Raises engine.MappingError listing every tensor that does not fit, ConfigError naming one
        with NaN or infinite values.
        """
        template = abstract_params(network)
        places = None if devices is None else param_shardings(network, template, devices)
        table = network_of(network).dialect(dialect).table(network)
        return load_tree(self.weights, table, template, shardings=places)

    def rows(self, ours: Arrays, *, sampled: float | None = None) -> list[Row]:
        """Ours beside what is recorded; `sampled`: the bound of latents, those of a run."""
        latents = FORWARD_BOUND if sampled is None else sampled
        return [
            compare(
                f"outputs.{name}",
                ours[name],
                expected,
                bound=latents if name.startswith("latents") else FORWARD_BOUND,
            )
            for name, expected in self.outputs.items()
        ]


def read_recording(path: Path) -> Recording:
    """Raises ConfigError for a file that is none."""
    tensors, metadata = read_safetensors(path)
    config = parse(path, metadata.get("config"))
    groups: dict[str, dict[str, Any]] = {"weights": {}, "inputs": {}, "outputs": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group not in groups:
            raise ConfigError(f"{path}: {name} is none of weights.*, inputs.* and outputs.*")
        groups[group][rest] = tensor if group == "weights" else tensor.read()
    inputs = Inputs(path, groups["inputs"])
    return Recording(path, config, groups["weights"], inputs, groups["outputs"])


def parse(path: Path, text: str | None) -> dict[str, Any]:
    """The JSON object that describes a recording. Raises ConfigError where there is none."""
    try:
        config = json.loads(text or "")
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ConfigError(f'{path} is no recording: its metadata has no JSON under "config"')
    return config
