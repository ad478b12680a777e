"""The dense layer of transformers and text encoders, with an optional low-rank adapter (LoRA).

Its kernel may be kept in few bits.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fluxjax.models.adapter import adapted
from fluxjax.models.fetched_blocks import fetched
from fluxjax.models.products import Precision, affine, joined_columns, takes_stored
from fluxjax.models.quantised import Quantised, decode

COLLECTION = "lora"


class Dense(nn.Dense):
    """y = x W + b, and + (x a) b scale where "lora" has `a`, `b` and `scale` at this path.

    What else may be there, see `fluxjax.models.lora`.

    As in PEFT the low-rank path is computed in the adapter's own dtype and added before the result
    is cast, so that a float32 adapter trains over bfloat16 weights.
    """

    precision: Precision = None
    promote_dtype: Any = promote_dtype  # flax's own type cannot be checked at run time

    def _stored(self, shape: tuple[int, int]) -> Any:
        """The parameter (k, features), brought from the host where it lies there: in the body of a
        scan only one layer's is."""
        if self.has_variable("params", "kernel"):
            stored = self.get_variable("params", "kernel")
            kernel = jax.tree.map(fetched, stored)
            if isinstance(kernel, Quantised) or kernel is not stored:
                return kernel
        return self.param("kernel", self.kernel_init, shape, self.param_dtype)

    @nn.compact
    def __call__(self, *inputs: Float[Array, "*rows _"]) -> Float[Array, "*rows features"]:
        """Of x, or of parts of its last axis."""
        shape = sum(part.shape[-1] for part in inputs), self.features
        stored = self._stored(shape)
        kernel = stored
        if isinstance(stored, Quantised):
            kernel = decode(stored).astype(self.param_dtype).T
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        *x, kernel, bias = self.promote_dtype(*inputs, kernel, bias, dtype=self.dtype)
        as_stored = takes_stored(stored, self.precision)
        y = affine(tuple(x), stored if as_stored else kernel, bias, self.precision)
        if not self.has_variable(COLLECTION, "scale"):
            return y
        leaves = self.variables[COLLECTION]
        return adapted(y, joined_columns(inputs), kernel, bias, leaves, self.precision)


class Part(nn.Module, kw_only=True):
    """A part of a network of dense layers: the types it computes in and holds.

    `precision` is that of the dense layers' products, see `fluxjax.models.products`.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    precision: Precision = None

    @property
    def types(self) -> dict[str, Any]:
        """These fields, for the parts of this part."""
        return {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }

    def dense(self, features: int, **options: Any) -> Dense:
        return Dense(features, **self.types, **options)
