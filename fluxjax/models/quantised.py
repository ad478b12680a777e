"""A matrix that is kept in few bits: its codes and scales, and the values they stand for.

`Quantised` is a node of parameter trees, in the place of a kernel. Its parts have the rows of the
published matrix (out, in), so that rows are taken and joined without decoding; they are arrays on
a device, lazy tensors of a file, or shapes. Written once for numpy and for JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from fluxjax.models.gguf_blocks import BLOCK_TYPES, decode_blocks
from fluxjax.quantised_kinds import DYNAMIC

GROUP = 64  # elements of nf4 and fp4 that share a scale
# Quantiles of the normal distribution, and bitsandbytes' float of four bits.
# Source: Dettmers et al. 2023, QLoRA, appendix E; bitsandbytes' `create_fp4_map`.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = (0.0052083334885537624, 0.66666668653, 1.0, 0.33333334327, 0.5, 0.16666667163, 0.25)
FP4 = (0.0, *_FP4, 0.0, *(-x for x in _FP4))
LEVELS = {"nf4": NF4, "fp4": FP4}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """`kind`: "int8", "fp8", "nf4", "fp4", a block type of GGUF, or one of DYNAMIC.

    Parts: `blocks` of GGUF (out, bytes); `codes` (out, in), or two to a byte, the first in the high
    half; `scale` (out, 1) or `absmax` (out, 1), the value of code 127; of nf4 and fp4 (out, in/64).
    """

    kind: str = field(metadata={"static": True})
    parts: dict[str, Any]

    def map(self, change: Callable[[Any], Any]) -> Quantised:
        return Quantised(self.kind, {name: change(part) for name, part in self.parts.items()})

    @property
    def columns(self) -> int:
        """in."""
        if self.kind in BLOCK_TYPES:
            kind = BLOCK_TYPES[self.kind]
            return self.parts["blocks"].shape[-1] // kind.size * kind.elements
        return self.parts["codes"].shape[-1] * (2 if self.kind in LEVELS else 1)

    @property
    def kernel_cuts(self) -> tuple[int, ...]:
        """The kernel's shape (..., in, out), its inputs counted in what cannot be taken apart: the
        groups of columns that share a scale."""
        *layers, rows, columns = self.shape
        if self.kind in BLOCK_TYPES:
            columns //= BLOCK_TYPES[self.kind].elements
        elif self.kind in LEVELS:
            columns = self.parts["absmax"].shape[-1]
        return *layers, columns, rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., out, in)."""
        return (*next(iter(self.parts.values())).shape[:-1], self.columns)


def abstract(kind: str, shape: tuple[int, ...]) -> Quantised | None:
    """Shapes of a kernel (..., in, out) in codes of one of `quantised_kinds.LOADED`.

    None where its columns are not whole blocks.
    """
    *layers, columns, rows = shape
    name = kind.upper() if kind.upper() in BLOCK_TYPES else kind
    codes = DYNAMIC.get(name, name)
    widths: dict[str, tuple[int, Any]]
    if name in BLOCK_TYPES:
        block, size = BLOCK_TYPES[name].elements, BLOCK_TYPES[name].size
        widths = {"blocks": (columns // block * size, np.uint8)}
    elif name in LEVELS:
        block = GROUP
        widths = {"codes": (columns // 2, np.uint8), "absmax": (columns // GROUP, np.float32)}
    elif codes == "int8":
        block, widths = 1, {"codes": (columns, np.int8), "absmax": (1, np.float32)}
    else:
        fp8 = jax.numpy.float8_e4m3fn
        block, widths = 1, {"codes": (columns, fp8), "scale": (1, np.float32)}
    if columns % block:
        return None
    return Quantised(
        name,
        {
            part: jax.ShapeDtypeStruct((*layers, rows, width), dtype)
            for part, (width, dtype) in widths.items()
        },
    )


def decode(matrix: Quantised) -> Any:
    """(..., out, in) in float32."""
    parts = matrix.parts
    if matrix.kind in BLOCK_TYPES:
        return decode_blocks(matrix.kind, parts["blocks"])
    if matrix.kind in LEVELS:
        return four_bits(parts["codes"], parts["absmax"], LEVELS[matrix.kind])
    values = parts["codes"].astype(np.float32)
    return values * parts["scale"] if "scale" in parts else values * parts["absmax"] / 127


def four_bits(codes: Any, absmax: Any, levels: Any) -> Any:
    """(..., out, in/2) bytes and (..., out, groups) scales -> (..., out, in)."""
    xp = codes.__array_namespace__()
    table = xp.asarray(levels, dtype=np.float32)
    values = table[xp.stack([codes >> 4, codes & 15], axis=-1)]
    groups = values.reshape(*absmax.shape, -1) * absmax[..., None]
    return groups.reshape(*codes.shape[:-1], -1)
