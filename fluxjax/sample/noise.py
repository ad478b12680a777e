"""Gaussian noise that equals what PyTorch's CPU generator draws for a seed, without PyTorch.

Source: ATen's `CPUGeneratorImpl`, `normal_fill` (native/cpu/DistributionTemplates.h) and
`normal_distribution` (core/DistributionsHelper.h).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from fluxjax.config import ConfigError
from fluxjax.sample.settings import SEED_LIMIT, Noise

_BLOCK = 16  # Box-Muller runs over blocks of 16: eight radii, then eight angles


def check_seed(seed: int) -> int:
    """Returns `seed`; raises ConfigError unless 0 <= seed < 2**64."""
    if not 0 <= seed < SEED_LIMIT:
        raise ConfigError(f"seed must be from 0 to 2**64 - 1, got {seed}")
    return seed


class TorchGenerator:
    """`torch.Generator().manual_seed(seed)`: Mersenne twister 19937, of the seed's low 32 bits."""

    def __init__(self, seed: int):
        # RandomState's stream is frozen by numpy's compatibility policy and seeds as PyTorch does.
        self._twister = np.random.RandomState(check_seed(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def _bits(self, count: int) -> np.ndarray:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def randn(self, shape: Sequence[int], dtype: DTypeLike = np.float32) -> np.ndarray:
        """`torch.randn(shape, generator=self, dtype=dtype)` for float32, bfloat16 and float16.

        Equal to 2e-6 in float32 (the vectorised logarithm and sine differ in the last bits); a
        16-bit type is the float32 draw, rounded.
        """
        dtype = np.dtype(dtype)
        if dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise ConfigError(f"noise is drawn in float32, bfloat16 or float16, not in {dtype}")
        count = math.prod(shape)
        if count < _BLOCK:
            return np.array([self._scalar() for _ in range(count)]).astype(dtype).reshape(shape)
        rest = count % _BLOCK
        values = _box_muller(self._bits(count - rest))
        if rest:
            # There is no incomplete block: the last 16 values are drawn again. In float32 the
            # uniforms of the incomplete block have been used up by then, in 16-bit types not.
            self._bits(rest if dtype == np.float32 else 0)
            values = np.concatenate([values[: count - _BLOCK], _box_muller(self._bits(_BLOCK))])
        return values.astype(dtype).reshape(shape)

    def _scalar(self) -> float:
        """Small tensors take one double after the other; every second one is a spare."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        bits = self._bits(4).astype(np.uint64)
        mask = np.uint64(2**53 - 1)
        angle, radius = (((bits[i] << np.uint64(32)) | bits[i + 1]) & mask for i in (0, 2))
        r = math.sqrt(-2.0 * math.log1p(-float(radius) * 2.0**-53))
        theta = 2.0 * math.pi * float(angle) * 2.0**-53
        self._spare = r * math.sin(theta)
        return r * math.cos(theta)


def _box_muller(bits: np.ndarray) -> np.ndarray:
    """24-bit uniforms from 32-bit words, then Box-Muller within each block of 16."""
    uniform = (bits & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)
    u1, u2 = np.split(uniform.reshape(-1, 2, _BLOCK // 2), 2, axis=1)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - u1))
    # The angle is rounded to float32 before the sine, as there: 4e-7 of angle is 2e-6 of a value.
    theta = np.float32(2.0 * math.pi) * u2
    return np.concatenate([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)


def draw(
    seed: int | Sequence[int],
    shape: tuple[int, ...],
    *,
    kind: Noise = "torch",
    dtype: DTypeLike = np.float32,
) -> Float[np.ndarray, "n c *size"]:
    """Noise for `shape` = (pictures, channels, *the latents' size).

    One seed draws the whole batch at once, a sequence draws each picture from its own seed: as
    diffusers does for one generator and for a list of them. Raises ConfigError for a seed outside
    0 ... 2**64 - 1 and for a wrong number of seeds.
    """
    return draw_each(seed, {"noise": shape}, kind=kind, dtype=dtype)["noise"]


def draw_each(
    seed: int | Sequence[int],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kind: Noise = "torch",
    dtype: DTypeLike = np.float32,
) -> dict[str, Float[np.ndarray, "rows c *size"]]:
    """Several draws, one after the other; `noise`, which is among them, has a row per picture.

    With a sequence of seeds every draw has a row per picture, and each picture's draws are those
    that it has alone. Errors are those of `draw`.
    """
    if not isinstance(seed, int):
        count = shapes["noise"][0]
        if len(seed) != count:
            raise ConfigError(f"{count} pictures need {count} seeds, got {len(seed)}")
        one = {name: (1, *shape[1:]) for name, shape in shapes.items()}
        each = [draw_each(int(s), one, kind=kind, dtype=dtype) for s in seed]
        return {name: np.concatenate([drawn[name] for drawn in each]) for name in shapes}
    if kind == "torch":
        generator = TorchGenerator(seed)
        return {name: generator.randn(shape, dtype) for name, shape in shapes.items()}
    words = jnp.array([check_seed(seed) >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    key = jax.random.wrap_key_data(words)
    # The noise of a picture does not depend on what else is drawn.
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(shapes)} | {"noise": key}
    return {
        name: np.asarray(jax.random.normal(keys[name], shape, dtype))
        for name, shape in shapes.items()
    }
