"""What a network predicts -> the clean picture and the noise: x = signal picture + level noise.

Source: diffusers' schedulers; Salimans and Ho 2022 (v).
"""

from __future__ import annotations

from fluxjax.config.sampler import Prediction
from fluxjax.schedules.step_table import OUTPUT, Latent, X


def picture_and_noise(
    kind: Prediction | None, signal: float, level: float, x: Latent = X, output: Latent = OUTPUT
) -> tuple[Latent, Latent]:
    """For a flow, `signal` is 1 - `level`."""
    if kind == "v_prediction":
        return signal * x - level * output, signal * output + level * x
    if kind == "sample":
        return output, (x - signal * output) / level
    if kind == "flow_prediction":
        return x - level * output, x + signal * output
    return (x - level * output) / signal, output


def picture_in_sigmas(
    kind: Prediction | None, sigma: float, x: Latent = X, sigma_hat: float | None = None
) -> Latent:
    """The clean picture where x = picture + sigma noise. With churn x has `sigma_hat`, of which
    v-prediction takes no notice, as in diffusers."""
    if kind == "v_prediction":
        return x / (sigma**2 + 1) - sigma / (sigma**2 + 1) ** 0.5 * OUTPUT
    if kind == "sample":
        return OUTPUT
    return x - (sigma if sigma_hat is None else sigma_hat) * OUTPUT


def gain_in_sigmas(kind: Prediction | None, sigma: float) -> float:
    """What the output is multiplied with, and then rounded, before anything is added."""
    if kind == "v_prediction":
        return -sigma / (sigma**2 + 1) ** 0.5
    return 1.0 if kind == "sample" else sigma
