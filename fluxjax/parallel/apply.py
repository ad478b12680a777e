"""Networks on a mesh: the same modules, parameters and methods, applied across devices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from fluxjax.config.choices import SequenceAttention
from fluxjax.networks import network_of
from fluxjax.networks.network import TokenSplit
from fluxjax.parallel.activations import activations_on, attend_in_parts, pin
from fluxjax.parallel.mesh import BATCH
from fluxjax.parallel.sequence import AXIS, Layout, attention_over, group_size


def apply_on(
    mesh: Mesh | None,
    module: Any,
    variables: Any,
    *args: Any,
    sequence: SequenceAttention = "auto",
    method: Any = None,
    mutable: Any = False,
    capture_intermediates: Any = False,
    **options: Any,
) -> Any:
    """`module.apply(variables, *args, ...)` of any network on `mesh`, for use inside a compiled
    program; without a mesh just that.

    Parameters are placed by `rules.param_shardings`. `sequence`: how attention works where the mesh
    splits the tokens, see `parallel.sequence`. Captured intermediates are whole and in the order of
    tokens on every mesh.
    """
    kept = {"mutable": mutable, "capture_intermediates": capture_intermediates}
    if mesh is None:
        return module.apply(variables, *args, method=method, **kept, **options)
    network = network_of(module.config)
    split, called = network.token_split, method in (None, "__call__")
    if split is None or mesh.shape[AXIS] == 1 or not (called or method == split.method):
        with activations_on(mesh, network):
            return module.apply(variables, *args, method=method, **kept, **options)
    if not called:
        return _split(mesh, module, split, sequence, kept, variables, *args, **options)
    states: dict[Any, Any] = {}

    def run(name: str, *inputs: Any) -> Any:
        returned = apply_on(
            mesh, module, variables, *inputs, sequence=sequence, method=name, **kept
        )
        if mutable is False:
            return returned
        states.update(flatten_dict(returned[1]))
        return returned[0]

    out = run(split.method, *split.whole(run, *args, **options))
    out = split.result(run, out, *args, **options)
    return out if mutable is False else (out, unflatten_dict(states))


def _split(
    mesh: Mesh,
    module: nn.Module,
    split: TokenSplit,
    sequence: SequenceAttention,
    kept: dict[str, Any],
    variables: Any,
    *args: Any,
) -> Any:
    """`split.method` of `module` with text and image tokens split over `sequence`.

    `kept`: flax's `mutable` and `capture_intermediates`; with `mutable` the result is (out, state).
    """
    config: Any = module.config  # pyright: ignore[reportAttributeAccessIssue]
    kind: Any = module.attention  # pyright: ignore[reportAttributeAccessIssue]
    places = split.arguments[: len(args)]
    arguments = list(zip(places, args, strict=True))
    lengths = {"text": 0} | {
        where[0]: jax.tree.leaves(value)[0].shape[where[1]]
        for where, value in arguments
        if isinstance(where, tuple) and jax.tree.leaves(value)
    }
    heads = split.heads(config)
    layout = Layout(lengths["text"], lengths["image"], mesh.shape[AXIS], split.text_last)
    # The partitioner gathers batch and heads around a collective that it did not make itself.
    tensor = mesh.shape["tensor"]
    group = group_size(layout.devices, heads, sequence, tensor)
    over = "tensor" if heads % (tensor * group) == 0 else None

    def spread(layout: Layout) -> Any:
        attention = attention_over(layout, heads, sequence, kind, tensor)
        return partial(attend_in_parts, mesh, BATCH, over, attention)

    alone = {"image_attention": spread(layout._replace(text=0))} if split.image_attention else {}
    inner = module.clone(attention=spread(layout), **alone)

    def part(variables: Any, *pieces: tuple[Any, ...]) -> Any:
        whole = map(_joined, places, pieces)
        with activations_on(mesh, network_of(config)):
            return inner.apply(variables, *whole, method=split.method, **kept)

    out: Any = jax.shard_map(
        part,
        mesh=mesh,
        axis_names={AXIS},
        in_specs=(
            P(),
            *(_specs(where, value) for where, value in arguments),
        ),
        out_specs=P(None, AXIS),
        check_vma=False,  # as inside, where attention kernels are spread
    )(variables, *(_pieces(layout, mesh, *argument) for argument in arguments))
    if kept["mutable"] is False:
        return layout.in_order(out, lengths["image"])
    apply = partial(module.apply, method=split.method, **kept)
    whole = jax.eval_shape(apply, variables, *args)
    return jax.tree.map(lambda x, like: layout.in_order(x, like.shape[1]), out, whole)


_Place = tuple[str, int] | Mapping[str, int] | None
"""Of `TokenSplit.arguments`."""


def _specs(where: _Place, value: Any) -> Any:
    """Of an argument's pieces over the devices of AXIS."""

    def spec(axis: int) -> P:
        return P(*(None,) * axis, AXIS)

    if isinstance(where, tuple):
        return spec(where[1])
    if where is None:
        return P()
    # One piece, a struct.
    return (type(value)(*(spec(where[n]) if n in where else P() for n in value._fields)),)


def _joined(where: _Place, pieces: tuple[Any, ...]) -> Any:
    """On one device, the argument that `_pieces` took apart."""
    if not isinstance(where, tuple) or len(pieces) == 1:
        return pieces[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x, where[1]), *pieces)


def _pieces(layout: Layout, mesh: Mesh, where: _Place, value: Any) -> tuple[Any, ...]:
    """What is split of an argument: its tokens, or, where they are joint, text and image."""
    if where is None:
        return (value,)
    if not isinstance(where, tuple):
        fields = {n: _pieces(layout, mesh, ("image", where[n]), getattr(value, n)) for n in where}
        return (value._replace(**{name: piece for name, (piece,) in fields.items()}),)
    kind, axis = where

    def cut(start: int, stop: int | None) -> Any:
        def one(x: Array) -> Array:
            x = jax.lax.slice_in_dim(x, start, stop, axis=axis)
            missing = -x.shape[axis] % layout.devices
            if missing:
                x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
            return pin(x, mesh) if axis == 1 else x

        return jax.tree.map(one, value)

    if kind == "joint":
        first = layout.image if layout.text_last else layout.text
        return cut(0, first), cut(first, None)
    return (cut(0, None),)
