"""What an adapter beside a dense layer or a convolution adds to the layer's output.

`leaves` are those that `fluxjax.models.lora` describes; all is computed in the adapter's own dtype.
Source: Hu et al. 2021 (LoRA); Liu et al. 2024 (DoRA) and PEFT's `tuners/lora/dora.py`; LyCORIS'
`modules/lokr.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.models.products import Precision, affine

Leaves = Mapping[str, Array]


def adapted(
    y: Float[Array, "*rows features"],
    inputs: Float[Array, "*rows k"],
    kernel: Float[Array, "k features"],
    bias: Float[Array, "features"] | None,
    leaves: Leaves,
    precision: Precision = None,
) -> Float[Array, "*rows features"]:
    """`y` = inputs kernel + bias, as the adapter changes it. Its `scale` is never trained."""
    scale = jax.lax.stop_gradient(leaves["scale"])
    if "w1" in leaves:
        added = _kronecker(inputs, leaves, precision) * scale
    else:
        low = affine(inputs.astype(leaves["a"].dtype), leaves["a"], precision=precision)
        added = raised(low, leaves, precision)
    if "magnitude" not in leaves:
        return (y + added).astype(y.dtype)
    one_row = (*(1,) * (y.ndim - 1), -1)
    ratio = _ratio(kernel, leaves, scale).reshape(one_row)
    plain = y if bias is None else y - bias.reshape(one_row)
    return (y + (ratio - 1) * plain + ratio * added).astype(y.dtype)


def raised(
    low: Float[Array, "*rows rank"], leaves: Leaves, precision: Precision = None
) -> Float[Array, "*rows features"]:
    """low b scale: what an adapter adds, of its `rank` numbers for each row."""
    scale = jax.lax.stop_gradient(leaves["scale"])
    if not scale.ndim:
        return affine(low, leaves["b"], precision=precision) * scale
    # The rows of a picture (those of its steps, say) lie together.
    each = jnp.repeat(scale, low.shape[0] // scale.shape[0], axis=0)
    each = each.reshape(each.shape[0], *(1,) * (low.ndim - 2), -1)
    return affine(low * each, leaves["b"], precision=precision)


def _ratio(
    kernel: Float[Array, "k features"], leaves: Leaves, scale: Float[Array, ""]
) -> Float[Array, "features"]:
    """The magnitude by the norm of what it is of, which as in PEFT has no gradient; 1 where a layer
    of a stack is not adapted."""
    product = leaves["a"] @ leaves["b"]
    changed = kernel.astype(product.dtype) + product * scale
    norm = jax.lax.stop_gradient(jnp.linalg.norm(changed, axis=0))
    return jnp.where(scale == 0, 1.0, leaves["magnitude"] / norm)


def _kronecker(
    inputs: Float[Array, "*rows k"], leaves: Leaves, precision: Precision
) -> Float[Array, "*rows features"]:
    """inputs times the Kronecker product, which is not made, of w1 and another: w2, or a b."""
    w1 = leaves["w1"]
    x = inputs.astype(w1.dtype).reshape(*inputs.shape[:-1], w1.shape[0], -1)
    if "w2" in leaves:
        x = affine(x, leaves["w2"], precision=precision)
    else:
        low = affine(x, leaves["a"], precision=precision)
        x = affine(low, leaves["b"], precision=precision)
    y = affine(jnp.swapaxes(x, -1, -2), w1, precision=precision)
    return jnp.swapaxes(y, -1, -2).reshape(*inputs.shape[:-1], -1)
