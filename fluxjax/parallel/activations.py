"""Where activations lie: as the table of rules has the kernels that they meet.

Where a kernel is split over `fsdp`, so is the batch it meets, and one of the two must be gathered;
between `tensor` and `fsdp` the compiler, left to itself, gathers activations in some layers, which
moves half as much again. Inputs and outputs of dense layers are therefore told how they lie;
modules know nothing of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.parallel.mesh import BATCH, batch_parts
from fluxjax.parallel.rules import matching_rules


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


def activations_on(mesh: Mesh) -> AbstractContextManager:
    """While networks are traced inside, every dense layer's inputs and outputs are pinned."""

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.Dense) or context.method_name != "__call__":
            return call(*args, **kwargs)
        rules = matching_rules("/".join((*module.path, "kernel")))
        inputs, outputs = (
            "tensor" if axes == "tensor" or "tensor" in (axes or ()) else None
            for axes in (rules[0][1] if rules else (None, None))
        )
        if module.name == "linear":  # modulation: a vector per picture, which all tokens take
            outputs = None
        return pin(call(pin(args[0], mesh, inputs), *args[1:], **kwargs), mesh, outputs)

    return nn.intercept_methods(intercept)
