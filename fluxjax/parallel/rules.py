"""Where every parameter lies: one table, role of the layer -> PartitionSpecs, for all networks.

The roles are the networks' own (`Network.roles`). Two layers that follow each other share out the
width between them over `tensor`: the first is split by columns (its outputs: heads, MLP channels),
the second by rows (its inputs), so that one sum over the devices ends the pair. The inputs of each
kernel are split over `fsdp`; such a kernel is gathered where it is used. Leaves of a few thousand
numbers are held by every device.

A role is told by the end of a path. Thus moments, averages and LoRA, whose paths end in those of
the parameters, lie as these do, and so do stacked blocks, with a leading layer axis. Codes of
kernels in few bits are split as the kernels are, and their scales with them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.models.quantised import Quantised
from fluxjax.models.stacking import stack_of
from fluxjax.networks import network_of
from fluxjax.networks.network import Network, Role

_COLUMNS = {
    "kernel": P("fsdp", "tensor"),
    "bias": P("tensor"),
    "embedding": P(None, "tensor"),
    # LoRA: x a b beside x kernel.
    "a": P("fsdp", None),
    "b": P(None, "tensor"),
}
SPECS: Mapping[Role, Mapping[str, P]] = {
    "columns": _COLUMNS,
    "modulation": _COLUMNS,
    "rows": {"kernel": P(("tensor", "fsdp"), None), "a": P(("tensor", "fsdp"), None)},
    "whole": {"kernel": P("fsdp", None), "embedding": P(None, "fsdp"), "a": P("fsdp", None)},
    "convolution": {"kernel": P(None, None, None, "fsdp")},
    "convolution_3d": {"kernel": P(None, None, None, None, "fsdp")},
    "copied": {},
}
"""The specs of a layer's parameters by their names; every device holds those that are not here."""


def role_of(network: Network, path: tuple[str, ...]) -> Role | None:
    """The role of the layer, or the bare parameter, at the end of `path`."""
    groups = "|".join(network.scanned)
    parts = [re.sub(rf"^({groups})_\d+(_to_\d+)?$", r"\1", part) for part in path]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((network.roles[end] for end in ends if end in network.roles), None)


def spec_of(
    network: Network, path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> P | None:
    """A leaf's spec; None if the network has no role for it, or the role's spec another rank.

    An axis that does not divide the leaf's dimension is left out, and so are axes of one device.
    """
    role = role_of(network, path[:-1])
    if role is None:
        return None if role_of(network, path) is None else P()
    axes = SPECS[role].get(path[-1], P())
    if not any(axes):
        return P()
    stacked = any((found := stack_of(part)) and found[0] in network.scanned for part in path)
    axes = (*(None,) * stacked, *axes)
    if len(axes) != len(shape):
        return None
    kept = [_dividing(axis, length, mesh) for axis, length in zip(axes, shape, strict=True)]
    return P(*kept) if any(kept) else P()


def _dividing(axes: str | tuple[str, ...] | None, length: int, mesh: Mesh | AbstractMesh) -> Any:
    """Those of `axes` by which `length` can be divided, one after the other."""
    kept: list[str] = []
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        if mesh.shape[axis] > 1 and length % mesh.shape[axis] == 0:
            kept.append(axis)
            length //= mesh.shape[axis]
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def param_shardings(config: Any, params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings of a tree of parameters (arrays or ShapeDtypeStructs) of a network, whose
    configuration is `config`.

    Raises ValueError, listing them, for parameters that have no role.
    """
    unknown: list[str] = []
    network = network_of(config)
    shardings = _shardings(lambda path: network, params, mesh, unknown)
    if unknown:
        raise ValueError("\n  ".join(["no role is known of:", *unknown]))
    return shardings


def state_shardings(config: Any, state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings of a tree that holds trees of a network's parameters: averages, moments, LoRA.

    What has no role (counters, factored moments) is held by every device.
    """
    network = network_of(config)
    return _shardings(lambda path: network, state, mesh, [])


def shardings_by_component(
    configs: Mapping[str, Any], state: Any, mesh: Mesh | AbstractMesh
) -> Any:
    """`state_shardings` of a tree with trees of several networks in it, wherever each lies under
    the name of its component."""
    networks = {name: network_of(config) for name, config in configs.items()}

    def of(path: tuple[str, ...]) -> Network | None:
        return next((networks[name] for name in path if name in networks), None)

    return _shardings(of, state, mesh, [])


def _shardings(
    network_at: Callable[[tuple[str, ...]], Network | None],
    tree: Any,
    mesh: Mesh | AbstractMesh,
    unknown: list[str],
) -> Any:
    """`unknown` receives the leaves that have no role."""

    def place(path: tuple, leaf: Any) -> Any:
        codes = leaf if isinstance(leaf, Quantised) else None
        shape = tuple(leaf.shape) if codes is None else codes.kernel_cuts
        network = network_at(_keys(path))
        spec = None if network is None else spec_of(network, _keys(path), shape, mesh)
        if spec is None:
            unknown.append(f"{'/'.join(_keys(path))} {list(leaf.shape)}")
        if codes is None or not spec:
            where = NamedSharding(mesh, spec or P())
            return where if codes is None else codes.map(lambda _: where)
        *layers, columns, rows = spec

        def of_part(part: Any) -> NamedSharding:
            return NamedSharding(mesh, P(*layers, rows, columns if part.shape[-1] > 1 else None))

        return codes.map(of_part)

    return jax.tree.map_with_path(place, tree, is_leaf=lambda leaf: isinstance(leaf, Quantised))


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that the fullest device holds of `tree` in these shardings."""
    each = jax.tree.map(
        lambda leaf, sharding: (
            math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
        ),
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(each))


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
