"""What quantising cost: the written files are read back and compared with their source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.convert.convert import Conversion
from fluxjax.networks import network_of

_ROWS = 256  # compared at once
_FORWARD = 5 * 10**8  # parameters above which no forward is tried: it is computed in float32


def report(conversion: Conversion) -> Iterator[str]:
    """A few lines per quantised network: bytes, errors of layers, error of a forward.

    Errors are relative: L2 of the difference over L2 of the source's values.
    """
    written = open_source(conversion.destination)
    for (name, network), weights in zip(
        conversion.networks.items(), conversion.weights, strict=True
    ):
        errors = dict(_errors(network, written[name]))
        if not errors:
            continue
        before = sum(tensor.nbytes for tensor in network.tensors.values())
        worst = max(errors, key=lambda layer: errors[layer])
        words = network_of(network.config).words
        yield f"{words}: {before / 1e6:.1f} MB before, {weights.nbytes / 1e6:.1f} MB after"
        mean = np.mean(list(errors.values()))
        yield (
            f"{words}: error of {len(errors)} quantised layers: {mean:.3g} on average, "
            f"{errors[worst]:.3g} at worst ({worst})"
        )
        count = sum(tensor.size for tensor in network.tensors.values())
        if count <= _FORWARD:
            yield f"{words}: error of one forward {_forward_error(network, written[name]):.3g}"
        else:
            yield f"{words}: too large for a forward here"


def _errors(source: OpenNetwork, written: OpenNetwork) -> Iterator[tuple[str, float]]:
    for name, tensor in written.tensors.items():
        if tensor.packed is not None:
            yield name, relative_error(tensor, source.tensors[name])


def relative_error(tensor: Tensor, expected: Tensor) -> float:
    """0 where both are zero."""
    difference = total = 0.0
    for start in range(0, tensor.shape[0], _ROWS):
        stop = min(start + _ROWS, tensor.shape[0])
        there = expected.rows(start, stop).astype(np.float32)
        error = tensor.rows(start, stop).astype(np.float32) - there
        difference += float(np.vdot(error, error))
        total += float(np.vdot(there, there))
    return float(np.sqrt(difference / total)) if total else 0.0


def _forward_error(network: OpenNetwork, written: OpenNetwork) -> float:
    description = network_of(network.config)
    module = description.build(network.config)
    inputs = description.inputs(network.config)

    @jax.jit
    def forward(params: Any, inputs: Any) -> Any:
        return module.apply({"params": params}, **inputs)

    expected, got = (
        np.asarray(forward(one.params(stacked=False, dtype=np.float32), inputs))
        for one in (network, written)
    )
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
