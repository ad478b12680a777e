"""Networks under their original code's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxjax.checkpoint.placement import load_tree
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import as_tensor
from fluxjax.networks import Config, network_of


def from_bfl_params(
    weights: Mapping[str, Any],
    config: Config,
    *,
    shardings: Any = None,
) -> dict[str, Any]:
    """Arrays (or lazy tensors) under BFL's names -> our parameters as JAX arrays.

    Raises engine.MappingError listing every tensor that does not fit `config`, ConfigError naming
    one with NaN or infinite values.
    """
    lazy = {name: as_tensor(value) for name, value in weights.items()}
    template = abstract_params(config)
    table = network_of(config).dialect("bfl").table(config)
    return load_tree(lazy, table, template, shardings=shardings)
