"""A schedule written down by running a sampler's own formulas on unit vectors in place of latents.

A latent is a vector over COLUMNS: which weights of the state, the network's output, the clamped
picture and the noise make it. So each sampler reads like its paper, in float64, and what comes out
are the step matrices of `Schedule`.
"""

from __future__ import annotations

from typing import NamedTuple, SupportsFloat

import numpy as np
from jaxtyping import Bool, Float

from fluxjax.config import ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.schedules.schedule import Schedule

Latent = Float[np.ndarray, "columns"]

# The state, alike for all samplers, so that they share one program.
SAMPLE, ANCHOR, FIRST, SECOND, THIRD, SUM = range(6)
"""x; an x to go back to; former outputs, pictures or slopes, the latest first; a sum of outputs."""
LATENTS = 6
COLUMNS = 9
X, FROM, H1, H2, H3, ADDED, OUTPUT, CLAMPED, NOISE = np.eye(COLUMNS)


LEAST_THRESHOLD = 1e-4  # a grey has steps of 1/255


class Run(NamedTuple):
    """A sampler's run of a number of steps."""

    schedule: Schedule
    draws: Bool[np.ndarray, "evaluations"]
    """Where noise is drawn, which is not everywhere that it is used: later draws depend on it."""
    levels: Float[np.ndarray, "evaluations 2"]
    """How much of a clean picture and of noise a latent holds before each evaluation."""
    scale: float = 1.0
    """What noise from a unit normal is multiplied with at the start."""
    order: int = 1
    """Evaluations for each step, by which image to image counts."""

    @property
    def keeping(self) -> Schedule:
        """The schedule for inpainting: what is kept has the next evaluation's noise, at last none.

        With a soft mask white is painted in all steps and black in none (ComfyUI's
        `DifferentialDiffusion`).
        """
        keep = np.append(self.levels[1:], [[1.0, 0.0]], axis=0).astype(np.float32)
        times = self.schedule.times
        # Black is below every threshold, that of timestep 0 too, with which many runs end and some
        # that are left one step begin.
        first = times[self.schedule.first]
        thresholds = np.clip(times / first if first else times + 1, LEAST_THRESHOLD, 1)
        return self.schedule._replace(keep=keep, thresholds=thresholds.astype(np.float32))

    @property
    def evaluations(self) -> int:
        """How often the network is run."""
        return self.schedule.steps - self.schedule.first

    def until(self, time: int) -> Run:
        """The evaluations from noise to `time`; what is left has later ones' noise."""
        n = int((self.schedule.times >= time).sum())
        columns = (None if column is None else column[:n] for column in self.schedule)
        schedule = Schedule(*columns)  # pyright: ignore[reportArgumentType]
        return self._replace(schedule=schedule, draws=self.draws[:n], levels=self.levels[:n])

    def first_after(self, time: int) -> int:
        """The first evaluation after those, and of samplers with two a step the first of a step, as
        diffusers counts."""
        count = len(self.schedule.times)
        left = int((self.schedule.times < time).sum())
        return count - left - (self.order == 2 and left % 2 == 0)


class StepTable:
    """Collects the evaluations of a run. `config` is complete."""

    def __init__(self, config: SamplerConfig):
        self.config = config
        self.times: list[float] = []
        self.scales: list[float] = []
        self.gains: list[float] = []
        self.matrices: list[np.ndarray] = []
        self.clips: list[tuple[float, float, float]] = []
        self.log_variances: list[tuple[float, float]] = []
        self.draws: list[bool] = []
        self.levels: list[tuple[float, float]] = []
        self._clip = (0.0, 0.0, 1.0)

    @property
    def thresholds(self) -> bool:
        return bool(self.config.thresholding)

    @property
    def clamps(self) -> bool:
        return self.thresholds or bool(self.config.clip_sample)

    def clamped(self, picture: Latent) -> Latent:
        """The predicted picture as the sampler goes on with it; of x and the output alone."""
        if not self.clamps:
            return picture
        limit = self.config.clip_sample_range or 1.0
        self._clip = (float(picture @ X), float(picture @ OUTPUT), float(limit))
        return CLAMPED

    def add(
        self,
        time: SupportsFloat,
        rows: dict[int, Latent],
        level: tuple[float, float],
        *,
        scale: float = 1.0,
        gain: float = 1.0,
        draws: bool = False,
        log_variances: tuple[float, float] | None = None,
    ) -> None:
        """One evaluation. `rows`: the latents of the state that change.

        OUTPUT in them is the network's output itself; `gain` says with what it is multiplied before
        it is rounded.
        """
        matrix = np.eye(LATENTS, COLUMNS)
        for row, latent in rows.items():
            matrix[row] = latent
        weights = np.array(self._clip)
        with np.errstate(divide="ignore", invalid="ignore"):
            matrix[:, 6] = np.where(matrix[:, 6] == 0, 0, matrix[:, 6] / gain)
            weights[1] = weights[1] / gain if weights[1] else 0.0
        self.times.append(float(time))
        self.scales.append(scale)
        self.gains.append(gain)
        self.matrices.append(matrix)
        self.clips.append(tuple(weights))
        self.draws.append(draws)
        self.levels.append(level)
        if log_variances is not None:
            self.log_variances.append(log_variances)

    def run(self, *, scale: float = 1.0, order: int = 1) -> Run:
        """Raises ConfigError where the formulas gave something that is not finite."""
        config, count = self.config, len(self.times)
        limits = (config.dynamic_thresholding_ratio, config.sample_max_value)
        schedule = Schedule(
            times=np.array(self.times, np.float32),
            gains=np.array(self.gains, np.float32),
            active=np.ones(count, np.bool_),
            scales=np.array(self.scales, np.float32),
            matrices=np.array(self.matrices, np.float32),
            # Also where nothing is clamped: changing the sampler compiles nothing.
            clips=np.array(self.clips, np.float32),
            quantiles=np.tile(np.array(limits, np.float32), (count, 1))
            if self.thresholds
            else None,
            log_variances=np.array(self.log_variances, np.float32) if self.log_variances else None,
        )
        columns = [column for column in schedule if column is not None]
        if not all(np.isfinite(column).all() for column in columns):
            raise ConfigError(
                f"{config.sampler} has no finite step with these settings: {_suspicious(config)}"
            )
        return Run(schedule, np.array(self.draws), np.array(self.levels), scale, order)


def _suspicious(config: SamplerConfig) -> str:
    names = (
        "prediction_type",
        "rescale_betas_zero_snr",
        "final_sigmas_type",
        "solver_type",
        "lower_order_final",
        "predict_x0",
        "beta_schedule",
    )
    values = {name: getattr(config, name) for name in names}
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value is not None)
