"""Where activations lie: as the kernels that they meet.

Where a kernel is split over `fsdp`, so is the batch it meets, and one of the two must be gathered;
between `tensor` and `fsdp` the compiler, left to itself, gathers activations in some layers, which
moves half as much again. Inputs and outputs of dense layers are therefore told how they lie;
modules know nothing of it. Attention kernels, into which the compiler does not look, run on each
device's own pictures and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.models.attention import spread_kernels
from fluxjax.networks.network import Network
from fluxjax.parallel.mesh import BATCH, batch_parts
from fluxjax.parallel.rules import SPECS, role_of


def pin(x: jax.Array, mesh: Mesh, features: Any = None) -> jax.Array:
    """`x` with its first axis over the mesh's batch axes and its last over `features`.

    Axes that do not divide are left whole; those between first and last stay as they are.
    """
    context = jax.sharding.get_abstract_mesh()  # inside a shard_map: that one's
    first = BATCH if x.shape[0] % batch_parts(mesh) == 0 else None
    last = features if features and x.shape[-1] % mesh.shape[features] == 0 else None
    spec = P(first, *(P.UNCONSTRAINED,) * (x.ndim - 2), last)
    sharding = NamedSharding(mesh if context.empty else context, spec)
    return jax.lax.with_sharding_constraint(x, sharding)


@contextmanager
def activations_on(mesh: Mesh, network: Network) -> Iterator[None]:
    """While a `network` is traced inside, dense layers' inputs and outputs and attention's q, k and
    v are told how they lie."""
    with pinned_layers(mesh, network), attention_on(mesh):
        yield


def attention_on(
    mesh: Mesh, batch: tuple[str, ...] = BATCH, heads: str | None = "tensor"
) -> AbstractContextManager:
    """While networks are traced inside, attention kernels run on parts of batch and heads.

    What does not divide by the axes is whole on every device.
    """
    return spread_kernels(partial(attend_in_parts, mesh, batch, heads))


def attend_in_parts(
    mesh: Mesh,
    batch: tuple[str, ...],
    heads: str | None,
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_lengths: jax.Array | None = None,
) -> jax.Array:
    """`attend(q, k, v, key_lengths)` of each device's part of batch and heads.

    Outside the partitioner, which cannot look into kernels.
    Inside a shard_map over some axes this is one over the others, and over all of them nothing.
    """
    context = jax.sharding.get_abstract_mesh()
    taken = set() if context.empty else set(context.manual_axes)  # by a shard_map around this one
    if taken == set(mesh.axis_names):
        return attend(q, k, v, key_lengths)
    parts = math.prod(mesh.shape[axis] for axis in batch)
    spec = P(
        batch if q.shape[0] % parts == 0 else None,
        None,
        heads if heads and q.shape[2] % mesh.shape[heads] == 0 else None,
    )
    spread: Any = jax.shard_map(
        attend,
        mesh=mesh if context.empty else context,
        axis_names=set(mesh.axis_names) - taken,
        in_specs=(spec, spec, spec, P(spec[0])),
        out_specs=spec,
        check_vma=False,  # kernels say nothing of what differs between devices
    )
    return spread(q, k, v, key_lengths)


def pinned_layers(mesh: Mesh, network: Network) -> AbstractContextManager:
    """While a `network` is traced inside, every dense layer's inputs and outputs are pinned."""

    whole = (None, None)

    def over_tensor(axes: Any) -> str | None:
        return "tensor" if axes == "tensor" or "tensor" in (axes or ()) else None

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Dense) or context.method_name != "__call__":
            return call(*args, **kwargs)
        role = role_of(network, module.path)
        inputs, outputs = map(over_tensor, SPECS[role].get("kernel", whole) if role else whole)
        outputs = None if role == "modulation" else outputs
        return pin(call(pin(args[0], mesh, inputs), *args[1:], **kwargs), mesh, outputs)

    return nn.intercept_methods(intercept)
