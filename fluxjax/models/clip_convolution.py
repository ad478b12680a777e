"""Convolutions over frames, rows and columns, as each kind of device does them best.

XLA's on CPUs are slow in three dimensions. There a convolution is the sum of those over rows and
columns, one for each frame of the kernel: 1.3 to 1.8 times faster at the autoencoders' sizes on two
cores of an AMD EPYC.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from fluxjax.models.attention import platform


def convolve_clips(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "kt kh kw c d"],
    window_strides: tuple[int, int, int],
    padding: Any,
    **options: Any,
) -> Float[Array, "b t2 h2 w2 d"]:
    """`jax.lax.conv_general_dilated` of channels-last clips, whose options these are, and what
    `flax.linen.Conv` takes in its place."""
    grouped = options.get("feature_group_count", 1) > 1
    if platform() != "cpu" or grouped:
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    assert padding == "VALID", "frames are padded before they are convolved"
    stride, *strides = window_strides
    frames = (x.shape[1] - kernel.shape[0]) // stride + 1
    dimensions = ("NHWC", "HWIO", "NHWC")
    total: Any = 0
    for i, taps in enumerate(kernel):
        seen = x[:, i : i + (frames - 1) * stride + 1 : stride]
        total += jax.lax.conv_general_dilated(
            seen.reshape(-1, *seen.shape[2:]),
            taps,
            strides,
            padding,
            dimension_numbers=dimensions,
            precision=options.get("precision"),
        )
    return total.reshape(-1, frames, *total.shape[1:])
