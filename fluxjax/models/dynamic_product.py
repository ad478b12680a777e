"""Products of 8 bits on both sides: rows of activations are rounded too, by scales of their own.

Source: Dettmers et al. 2022, LLM.int8() (vector-wise scales, here without its outliers); the fp8
form: Micikevicius et al. 2022, FP8 Formats for Deep Learning.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fluxjax.models.quantised import Quantised, decode
from fluxjax.quantised_kinds import DYNAMIC

_LARGEST = {"int8_dynamic": 127, "fp8_dynamic": 448}
_CONTRACTING = (((1,), (1,)), ((), ()))


def is_dynamic(kernel: Any) -> TypeGuard[Quantised]:
    """Whether a kernel is multiplied by inputs that are quantised as they come."""
    return isinstance(kernel, Quantised) and kernel.kind in DYNAMIC


def dynamic_product(x: Float[Array, "*rows k"], kernel: Quantised) -> Float[Array, "*rows n"]:
    """`x kernel` in the type of `x`, of a kernel (n, k) of a kind of `quantised_kinds.DYNAMIC`.

    int8 is multiplied by all backends, sums in int32. fp8 only by CUDA's (e4m3, sums in float32; by
    GPUs from Hopper on in their own instructions): elsewhere the kernel alone is of 8 bits.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if kernel.kind == "int8_dynamic":
        y = _rounded_product(rows, kernel)
    else:
        y = lax.platform_dependent(rows, kernel, cuda=_rounded_product, default=_decoded_product)
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _rounded_product(x: Float[Array, "r k"], kernel: Quantised) -> Float[Array, "r n"]:
    codes, sums = kernel.parts["codes"], jnp.float32
    # Times the inverse: XLA would make that of a division, other programs do not.
    inverse = np.float32(1 / _LARGEST[kernel.kind])
    absmax = jnp.abs(x).max(1, keepdims=True)
    scale = jnp.where(absmax > 0, absmax * inverse, 1)
    x = x / scale
    if kernel.kind == "int8_dynamic":
        x, sums = jnp.round(x), jnp.int32
    y = _product(x.astype(codes.dtype), codes, sums).astype(jnp.float32)
    return y * scale * _scale(kernel).T


def _decoded_product(x: Float[Array, "r k"], kernel: Quantised) -> Float[Array, "r n"]:
    return _product(x, decode(kernel), jnp.float32)


def _product(x: Array, codes: Array, sums: DTypeLike) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, codes, _CONTRACTING, precision=precision, preferred_element_type=sums)


def _scale(kernel: Quantised) -> Float[Array, "n 1"]:
    """What code 1 is worth."""
    if "scale" in kernel.parts:
        return kernel.parts["scale"]
    return kernel.parts["absmax"] * np.float32(1 / 127)
