"""The parameter tree of a network as shapes only: what a checkpoint must fill."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fluxjax.checkpoint.quantised.parts import codes_of, form_of
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.models.absent import absent, is_node
from fluxjax.models.names import flatten, is_stacked, published_name, unflatten
from fluxjax.models.quantised import abstract
from fluxjax.models.stacking import unstack_layers
from fluxjax.networks import Config, network_of

Part = Literal["all", "before", "steps"]
"""Of a network's parameters those that a run needs before its first step, or in its steps."""


def abstract_params(config: Config, *, stacked: bool = False) -> dict[str, Any]:
    """Tree of float32 ShapeDtypeStructs, without the outer {"params": ...}. Computes nothing.

    `stacked`: repeated blocks carry a leading layer axis, as the networks with scan_layers=True
    expect; a network that scans nothing has but one form.
    """
    # Scanned networks are traced in a time that does not grow with the layers, and once.
    with _LOCK:
        tree = _traced(config)
    return jax.tree.map(lambda leaf: leaf, tree) if stacked else unstack_layers(tree)


_LOCK = threading.Lock()


@cache
def _traced(config: Config) -> dict[str, Any]:
    network = network_of(config)
    module = network.build(config, scan_layers=True)
    inputs = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in network.inputs(config).items()
    }
    init = partial(module.init, method=network.method)
    return jax.eval_shape(init, jax.ShapeDtypeStruct((2,), jnp.uint32), **inputs)["params"]


def quantised_template(tree: Mapping[str, Any], config: Config, kind: str) -> dict[str, Any]:
    """A template in which the matrices of `Network.quantised` are codes of `kind`, as shapes.

    Those whose columns are not whole blocks stay as they are.
    """
    pattern = network_of(config).quantised
    flat = flatten(tree)
    for path, leaf in flat.items():
        name = published_name(path, 0 if is_stacked(path) else None)
        if path[-1] == "kernel" and re.fullmatch(pattern, name):
            flat[path] = abstract(kind, leaf.shape) or leaf
    return unflatten(flat)


def kept_template(
    tree: Mapping[str, Any], config: Config, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """A template in which the dense kernels have the codes of `tensors`, where these have any; and
    the names of stacked ones that must be values, since their layers' codes are of several forms.
    """
    flat, mixed = flatten(tree), []
    for path, leaf in flat.items() if network_of(config).quantised else ():
        layers = leaf.shape[:1] if is_stacked(path) else ()
        if path[-1] != "kernel" or len(leaf.shape) - len(layers) != 2:
            continue
        names = [published_name(path, i) for i in (range(*layers) if layers else (None,))]
        packed = [codes_of(tensors[name]) for name in names]
        first = packed[0]
        if first is None or len({one and form_of(one) for one in packed}) > 1:
            mixed += [names[0]] if any(packed) else []
            continue
        flat[path] = first.map(lambda p, n=layers: jax.ShapeDtypeStruct((*n, *p.shape), p.dtype))
    return unflatten(flat), mixed


def part_of(template: Mapping[str, Any], config: Config, part: Part) -> dict[str, Any]:
    """The template with `Absent` for what is not of that part of a run."""
    if part == "all":
        return dict(template)
    pattern, flat = network_of(config).before_steps, flatten(template)
    for path, leaf in flat.items():
        name = published_name(path, 0 if is_stacked(path) else None)
        if bool(re.fullmatch(pattern, name)) != (part == "before"):
            flat[path] = absent(leaf)
    return unflatten(flat)


def in_dtype(template: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Shapes of the parameters where values have `dtype`; codes stay as they are."""

    def cast(leaf: Any) -> Any:
        return leaf if is_node(leaf) else jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(cast, dict(template), is_leaf=is_node)
