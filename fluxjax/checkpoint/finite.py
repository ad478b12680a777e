"""Weights that are NaN or infinite are refused where they are read, by the tensor's name.

One such value makes every picture and every update NaN, long after anything tells which it was.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.tensors import Tensor
from fluxjax.config import ConfigError
from fluxjax.models.gguf_blocks import BLOCK_TYPES
from fluxjax.models.quantised import Quantised

_CHUNK = 2**19  # bytes that stay in a core's cache while they are looked at twice


def only_finite(tensor: Tensor, name: str) -> Tensor:
    """The same tensor; reading it raises ConfigError if what is read has NaN or infinite values."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor
    return replace(tensor, rows=partial(_finite_rows, tensor, name))


def _finite_rows(tensor: Tensor, name: str, start: int, stop: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # of a cast: said below
        array = tensor.rows(start, stop)
    if not is_finite(array):
        raise _refusal(name, array)
    return array


def only_finite_codes(packed: Quantised, name: str) -> Quantised:
    """The same codes; reading a part raises ConfigError if values would not be finite.

    Of GGUF's blocks the scales are looked at: all else in them is whole numbers.
    """
    if packed.kind not in BLOCK_TYPES:
        return packed.map(lambda part: only_finite(part, name))
    kind = BLOCK_TYPES[packed.kind]

    def checked(part: Tensor) -> Tensor:
        def rows(start: int, stop: int) -> np.ndarray:
            array = np.ascontiguousarray(part.rows(start, stop))
            blocks = array.reshape(-1, kind.size)
            for at in kind.halves:
                scales = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)
                if not is_finite(scales):
                    raise _refusal(name, scales)
            return array

        return replace(part, rows=rows)

    return packed.map(checked)


def _refusal(name: str, array: np.ndarray) -> ConfigError:
    return ConfigError(
        f"{name} has values that are not finite ({not_finite(array)}): the file is damaged or was "
        "saved wrongly"
    )


def is_finite(array: np.ndarray) -> bool:
    """As np.isfinite(array).all(), without an array of booleans, for every float there is.

    As integers, the bits of floats of one sign are in order of magnitude, with infinity and NaN
    at the end: among signed integers the last are those above zero, among unsigned those below.
    """
    width = 8 * array.dtype.itemsize
    signed, unsigned = np.dtype(f"int{width}"), np.dtype(f"uint{width}")
    largest = int(np.array(jnp.finfo(array.dtype).max, array.dtype).view(signed))
    bits = array.ravel(order="K").view(signed)  # of a transposed array, too, a view
    step = _CHUNK // array.dtype.itemsize
    return all(
        chunk.max() <= largest and chunk.view(unsigned).max() <= largest + 2 ** (width - 1)
        for chunk in (bits[start : start + step] for start in range(0, bits.size, step))
    )


def not_finite(array: np.ndarray) -> str:
    """How many values are NaN and how many infinite, in words: "1 NaN, 2 infinite"."""
    nan = int(np.isnan(array).sum())
    infinite = int(array.size - np.isfinite(array).sum()) - nan
    counts = {"NaN": nan, "infinite": infinite}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
