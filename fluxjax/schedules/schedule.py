"""A run of any sampler as a table: what one scan (`fluxjax.sample.denoise`) does step by step.

Every sampler whose steps are linear in its state, the network's output and noise is such a table:
Euler, DDIM, DPM++ 2M and 3M, Heun, UniPC, and the ancestral ones. Tables are made in numpy, before
anything is compiled; only the number of latents in the state and which columns there are decide
about compilation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

SMALLEST_BUCKET = 4


class Schedule(NamedTuple):
    """The steps of a run. The state is n latents Z, of which Z[0] is the picture so far:

        m = gains * network(scales * Z[0], times), rounded to the state's dtype
        p = clips @ [Z[0]; m], clamped
        Z = matrices @ [Z; m; p; noise], in float32, rounded to the state's dtype
        Z[0] = Z[0] where the picture is drawn, elsewhere keep @ [picture; noise]

    The rounding of m is diffusers' and BFL's: a step size times a bfloat16 output is bfloat16. The
    step size itself: see `with_gains_in`. A column that is None is not computed, and p not without
    `clips`.
    """

    times: Float[np.ndarray, "steps"]
    """What the network reads: for flow matching the noise level, 1 (noise) to 0."""
    gains: Float[np.ndarray, "steps"]
    active: Bool[np.ndarray, "steps"]
    """Steps that are not are skipped: those of padding, and those of other parts of the run."""
    scales: Float[np.ndarray, "steps"] | None = None
    """None: 1."""
    matrices: Float[np.ndarray, "steps n columns"] | None = None
    """None: n = 1 and Z + m, which is what every Euler step is."""
    keep: Float[np.ndarray, "steps 2"] | None = None
    """None: all of the picture is drawn."""
    clips: Float[np.ndarray, "steps 3"] | None = None
    """Of Z[0] and of m in the predicted picture p, and the largest value that p may have. Samplers
    that do not clamp have zeros."""
    quantiles: Float[np.ndarray, "steps 2"] | None = None
    """Dynamic thresholding in place of that largest value: p is clamped to the quantile [0] of its
    absolute values, which is taken to lie from 1 to [1], and divided by it."""
    log_variances: Float[np.ndarray, "steps 2"] | None = None
    """The network predicts, in a second half of its channels, where from -1 to 1 the logarithm of
    the noise's variance lies between these two; the noise is scaled accordingly."""
    thresholds: Float[np.ndarray, "steps"] | None = None
    """From which grey of its mask on the picture is drawn; None: both are blended by the mask."""

    @property
    def latents(self) -> int:
        """n, the number of latents in the state."""
        return 1 if self.matrices is None else self.matrices.shape[1]

    @property
    def first(self) -> int:
        """The first step that is active."""
        return int(np.argmax(self.active))

    @property
    def steps(self) -> int:
        """How many there are, up to the last that is active."""
        return int(np.max(np.flatnonzero(self.active), initial=-1)) + 1

    def part(self, first: int, last: int) -> Schedule:
        """The same table, so the same program, running only the steps first ... last - 1."""
        steps = np.arange(len(self.times))
        return self._replace(active=self.active & (first <= steps) & (steps < last))


def with_gains_in(schedule: Schedule, dtype: Any) -> Schedule:
    """As diffusers steps along noise levels that lie where the latents do, a GPU or a CPU: the step
    size, a tensor without axes, takes the dtype of the output it is multiplied with.

    PyTorch keeps a step size in float32 only if it is a Python number, as BFL's, or a CPU's tensor
    beside a GPU's.
    """
    return schedule._replace(gains=schedule.gains.astype(dtype).astype(np.float32))


def pad(schedule: Schedule) -> Schedule:
    """With steps that are skipped, up to the bucket's length; their numbers repeat the last's."""
    steps = len(schedule.times)
    missing = bucket(steps) - steps

    def longer(column: np.ndarray) -> np.ndarray:
        return np.pad(column, [(0, missing)] + [(0, 0)] * (column.ndim - 1), mode="edge")

    columns = (None if column is None else longer(column) for column in schedule)
    return Schedule(*columns).part(0, steps)  # pyright: ignore[reportArgumentType]


def bucket(steps: int) -> int:
    """The compiled number of steps that runs `steps`: 4, 8, 16, 32, ... 1024."""
    return max(SMALLEST_BUCKET, 1 << (max(steps, 1) - 1).bit_length())
