"""Optimisers, learning rates over time and clipping, chosen by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon, prodigy

from fluxjax.config import ConfigError
from fluxjax.train.settings import OptimizerSettings

Tree = Any
Rates = Callable[[Any], Any]  # step -> learning rate

FACTORS = ("a", "b", "w1", "w2")  # matrices of a LoRA or LoKr
# Of AdamW's learning rate: Lion takes steps of unit size (Chen et al. 2023 advise 3 to 10 times
# less); Prodigy finds its own, which is multiplied by this.
_RELATIVE = {"lion": 1 / 3}


def peak_rate(settings: OptimizerSettings, default: float) -> float:
    """The highest learning rate; `default` is AdamW's for the method."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return 1.0 if settings.name == "prodigy" else default * _RELATIVE.get(settings.name, 1.0)


def learning_rates(settings: OptimizerSettings, steps: int, default: float) -> Rates:
    """The learning rate of each step; `default` as of `peak_rate`."""
    peak = peak_rate(settings, default)
    warmup = min(settings.warmup, steps // 10)
    if settings.schedule == "constant":
        rest = optax.constant_schedule(peak)
    elif settings.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(1, steps - warmup), settings.final)
    else:
        rest = optax.linear_schedule(peak, settings.final * peak, max(1, steps - warmup))
    # The first update has a learning rate above 0: it would be lost otherwise.
    warm = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([warm, rest], [warmup]) if warmup else rest


def text_encoder_share(settings: OptimizerSettings, default: float) -> float:
    """Of the learning rate the share that text encoders have; `default` as of `peak_rate`.

    Raises ConfigError where it would be a share of nothing.
    """
    own, peak = settings.text_encoder_learning_rate, peak_rate(settings, default)
    if own is None or own == peak:
        return 1.0
    if not peak:
        raise ConfigError(
            f"text_encoder_learning_rate {own:g} follows the course of learning_rate, which is 0"
        )
    return own / peak


def make_optimizer(
    settings: OptimizerSettings, rates: Rates, shares: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Clipping, then the optimiser of that name; any tree of parameters or of LoRA factors.

    `shares`: of the learning rate, for parts of the tree by their key at its root.
    """
    decay: dict[str, Any] = {"weight_decay": settings.weight_decay}
    b1, b2 = settings.b1, settings.b2
    if settings.name == "adamw":
        inner = optax.adamw(rates, b1, b2, settings.eps, mask=matrices, **decay)
    elif settings.name == "lion":
        # Its own b2, 0.99, unless another than AdamW's default is asked for.
        inner = optax.lion(rates, b1, 0.99 if b2 == 0.999 else b2, mask=matrices, **decay)
    elif settings.name == "adafactor":
        # An absolute learning rate as AdamW's, and decay scaled by it as there.
        inner = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(mask=matrices, **decay),
            optax.scale_by_learning_rate(rates),
        )
    elif settings.name == "prodigy":
        inner = _prodigy(settings, rates)
    else:
        # RMS-matched to AdamW's updates (0.2, Liu et al. 2025), so one learning rate serves both.
        inner = muon(
            rates,
            weight_decay_mask=matrices,
            adam_b1=b1,
            adam_b2=b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=muon_dimensions,
            **decay,
        )
    chain = [optax.clip_by_global_norm(settings.clip)] * bool(settings.clip)
    chain += [inner, *itertools.starmap(_share, (shares or {}).items())]
    return optax.chain(*chain) if len(chain) > 1 else optax.with_extra_args_support(inner)


def _share(part: str, share: float) -> optax.GradientTransformation:
    """A step is its learning rate times something, decay included: to scale it scales the rate."""

    def scaled(updates: Tree, params: Tree) -> Tree:
        return {**updates, part: jax.tree.map(lambda leaf: leaf * share, updates[part])}

    return optax.stateless(scaled)


def _prodigy(settings: OptimizerSettings, rates: Rates) -> optax.GradientTransformation:
    """optax's, which decays every leaf, with its decay on matrices alone."""
    b1, b2 = settings.b1, settings.b2
    inner = prodigy(rates, (b1, b2), eps=settings.eps, safeguard_warmup=True)

    def update(updates: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
        after: Any
        moved, after = inner.update(updates, state, params)
        bias = (1 - b2**after.count) ** 0.5 / (1 - b1**after.count)
        rate = settings.weight_decay * state.estim_lr * rates(state.count) * bias

        def decayed(update: jax.Array, leaf: jax.Array, matrix: bool) -> jax.Array:
            return update - rate * leaf if matrix else update

        return jax.tree.map(decayed, moved, params, matrices(params)), after

    return optax.GradientTransformationExtraArgs(inner.init, update)


def muon_optimizer(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Muon on hidden matrices, AdamW elsewhere, one learning rate for both (RMS-matched, 0.2)."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            learning_rate,
            weight_decay=weight_decay,
            adam_b2=0.99,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        ),
    )


def _names(path: tuple) -> list[str]:
    return [str(getattr(p, "key", p)) for p in path]


def matrices(params: Tree) -> Tree:
    """True for kernels, embeddings and LoRA factors, which are decayed; not norms and biases."""
    names = ("kernel", "embedding", *FACTORS)
    return jax.tree.map_with_path(lambda path, _: _names(path)[-1] in names, params)


def muon_dimensions(params: Tree) -> Tree:
    """Which leaves Muon orthogonalises: hidden matrices, as (inputs, outputs).

    Embeddings, input and output layers, norms and biases go to AdamW. A stacked leaf's leading axis
    (layer) is a batch axis.
    """
    first_and_last = (
        "conv_in",
        "conv_out",
        "x_embedder",
        "context_embedder",
        "cond_in",
        "pos_embed",
        "proj_out",
    )

    def spec(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        names = _names(path)
        factor = names[-1] in FACTORS
        # Below a component's name, if there are several; of a clip's networks one name further in.
        ends = ("conv_in", "conv_out")
        outer = any(name in first_and_last for name in names[:2])
        outer = outer or any(name.startswith(ends) for name in names[-3:-1])
        if (names[-1] != "kernel" and not factor) or (outer and not factor):
            return None
        if leaf.ndim not in (2, 3, 4, 5):
            return None
        inputs = tuple(range(leaf.ndim - 1)) if leaf.ndim >= 4 else leaf.ndim - 2
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=leaf.ndim - 1)

    return jax.tree.map_with_path(spec, params)
