"""Networks in their original code's form: its configurations and its parameters' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxjax.checkpoint.placement import load_tree
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import as_tensor
from fluxjax.config import ConfigError
from fluxjax.networks import NETWORKS, Config, network_of


def config_from_bfl(params: Mapping[str, Any]) -> Any:
    """BFL's FluxParams or AutoEncoderParams (as dictionaries) -> ours.

    Raises KeyError for a missing key, ConfigError for values of no network of ours.
    """
    for network in NETWORKS.values():
        for dialect in network.dialects:
            if dialect.from_original is not None and dialect.original_key in params:
                try:
                    return dialect.from_original(params)
                except (TypeError, ZeroDivisionError) as error:
                    raise ConfigError(f"no configuration of the {network.words}: {error}") from None
    raise ConfigError(f"no network has a configuration with the keys {', '.join(sorted(params))}")


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
