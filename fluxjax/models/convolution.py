"""Convolutions of pictures, with an optional low-rank adapter (LoRA)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array, Float

from fluxjax.models.adapter import raised
from fluxjax.models.dense import COLLECTION, Part
from fluxjax.models.products import own_precision

_AXES = ("NHWC", "HWIO", "NHWC")


class Convolution(nn.Conv):
    """y = x * W + b, and + (x * a) b scale where "lora" has `a`, `b` and `scale` at this path.

    `a` has the kernel's size, its outputs are the rank; see `fluxjax.models.lora`. As in PEFT all
    of that is computed in the adapter's own dtype.
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))
    promote_dtype: Any = promote_dtype  # flax's own type cannot be checked at run time

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        y = super().__call__(x)
        if not self.has_variable(COLLECTION, "scale"):
            return y
        leaves = self.variables[COLLECTION]
        a = leaves["a"]
        low = lax.conv_general_dilated(
            x.astype(a.dtype),
            a,
            self.strides,
            self.padding,
            dimension_numbers=_AXES,
            precision=own_precision(a.dtype),
        )
        return (y + raised(low, leaves)).astype(y.dtype)


def convolution(part: Part, features: int, size: int, name: str, *, stride: int = 1) -> Convolution:
    """Padded alike on both sides: where the stride is 2, XLA's "SAME" would not."""
    edge = (size // 2, size // 2)
    return Convolution(
        features,
        (size, size),
        (stride, stride),
        (edge, edge),
        dtype=part.dtype,
        param_dtype=part.param_dtype,
        precision=own_precision(part.dtype),
        name=name,
    )
