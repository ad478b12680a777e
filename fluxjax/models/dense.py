"""The dense layer of the FLUX transformer, with an optional low-rank adapter (LoRA) beside it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from fluxjax.models.bfloat16_products import dot_general
from fluxjax.models.bias_and_scale import add_bias

COLLECTION = "lora"


class Dense(nn.Dense):
    """y = x W + b, and + (x a) b scale where "lora" has `a`, `b` and `scale` at this path.

    As in PEFT the low-rank path is computed in the adapter's own dtype and added before the result
    is cast, so that a float32 adapter trains over bfloat16 weights. `scale` is never trained.
    Source: Hu et al. 2021, LoRA; PEFT's `tuners/lora/layer.py`.
    """

    dot_general: Any = dot_general
    promote_dtype: Any = promote_dtype  # flax's own type cannot be checked at run time

    @nn.compact
    def __call__(self, inputs: Float[Array, "*rows k"]) -> Float[Array, "*rows features"]:
        shape = inputs.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        x, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision)
        if bias is not None:
            y = add_bias(y, bias)
        if not self.has_variable(COLLECTION, "a"):
            return y
        a, b, scale = (self.get_variable(COLLECTION, name) for name in ("a", "b", "scale"))
        low = _product(_product(inputs.astype(a.dtype), a), b)
        return (y + low * jax.lax.stop_gradient(scale)).astype(y.dtype)


def _product(x: Array, kernel: Array) -> Array:
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
