"""Compiler options for programs that are mostly matrix products."""

from __future__ import annotations

from functools import cache
from threading import Lock

import jax

from fluxjax.models.products import BFLOAT16, TILED, Precision

_LOCK = Lock()
# What a loop does in each turn stays there. On CPUs a product of bfloat16 is one of float32, and
# the conversion of all layers' weights would leave the loop over them: twice their bytes.
IN_LOOPS = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,"
    "while-loop-expensive-invariant-code-motion"
}
IN_PLACE = {**IN_LOOPS, "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compiler_options(precision: Precision = None, *, integers: bool = False) -> dict[str, str]:
    """For `jax.jit(..., compiler_options=compiler_options())` of whole programs; {} off the CPU.

    On CPUs XLA hands matrix products to YNNPACK by default. Its kernels are slower than Eigen's on
    an Intel Xeon: 1.7 times for (1536, 3072) x (3072, 3072) in float32, 1.4 times for
    (68, 192) x (192, 768); on an AMD EPYC the two are about equal. No library fusion means Eigen.
    With `precision=BFLOAT16` the products are left to YNNPACK, which has the instructions for them.
    So they are where `integers` are multiplied: 8 times faster than by Eigen with AVX-512.
    With TILED, each product is done where its kernel is converted: by default XLA converts the
    kernels of several layers beforehand, out of a loop over them or for several threads.
    """
    if jax.default_backend() != "cpu" or precision == BFLOAT16:
        return {}
    return {
        **({} if integers else _without_ynnpack()),
        **(IN_PLACE if precision == TILED else {}),
    }


def _without_ynnpack() -> dict[str, str]:
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
