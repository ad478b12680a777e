"""Compiler options for programs that are mostly matrix products."""

from __future__ import annotations

from functools import cache
from threading import Lock

import jax

from fluxjax.models.products import BFLOAT16, Precision

_LOCK = Lock()


def compiler_options(precision: Precision = None) -> dict[str, str]:
    """For `jax.jit(..., compiler_options=compiler_options())` of whole programs; {} off the CPU.

    On CPUs XLA hands matrix products to YNNPACK by default. Its kernels are slower than Eigen's on
    an Intel Xeon: 1.7 times for (1536, 3072) x (3072, 3072) in float32, 1.4 times for
    (68, 192) x (192, 768); on an AMD EPYC the two are about equal. No library fusion means Eigen.
    With `precision=BFLOAT16` the products are left to YNNPACK, which has the instructions for them.
    """
    if jax.default_backend() != "cpu" or precision == BFLOAT16:
        return {}
    # Of two threads one would read the trial's entry in the cache while the other writes it.
    with _LOCK:
        return _eigen()


@cache
def _eigen() -> dict[str, str]:
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # a jaxlib that does not know the option
        return {}
    return options
