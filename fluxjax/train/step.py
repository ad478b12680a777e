"""The training state and one jitted update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from fluxjax.models.compilation import compiler_options

Tree = Any


class TrainState(NamedTuple):
    """All that an exact resume needs; random numbers are folded from the seed and `step`."""

    step: jax.Array
    params: Tree
    ema: Tree
    opt_state: Tree
    skipped: jax.Array  # updates left out because loss or gradient was not finite


def muon_dimensions(params: Tree) -> Tree:
    """Which leaves Muon orthogonalises: hidden kernels, as (inputs, outputs) matrices.

    Embeddings, input and output layers, norms and biases go to AdamW. A stacked leaf's leading axis
    (layer) is a batch axis.
    """
    first_and_last = ("conv_in", "conv_out", "x_embedder", "context_embedder", "proj_out")

    def spec(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        names = [str(getattr(p, "key", p)) for p in path]
        outer = names[0] in first_and_last or (len(names) > 1 and names[-2].startswith("conv_in"))
        outer = outer or names[-2] == "conv_out"
        if names[-1] != "kernel" or outer or leaf.ndim not in (2, 3, 4):
            return None
        inputs = tuple(range(leaf.ndim - 1)) if leaf.ndim == 4 else leaf.ndim - 2
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=leaf.ndim - 1)

    return jax.tree.map_with_path(spec, params)


def muon_optimizer(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, clip: float = 1.0
) -> optax.GradientTransformation:
    """Muon on hidden matrices, AdamW elsewhere, one learning rate for both (RMS-matched, 0.2)."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        muon(
            learning_rate,
            weight_decay=weight_decay,
            adam_b2=0.99,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        ),
    )


def init_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    # A copy: the step donates its state, and donating one buffer twice is an error.
    ema = jax.tree.map(jnp.copy, params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, ema, optimizer.init(params), jnp.copy(zero))


def make_step(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float,
    static_argnames: tuple[str, ...] = (),
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `step(state, *args, **static) -> (state, metrics)`.

    `loss(params, key, *args, **static)` gives the scalar to minimise; its key depends on the seed
    and the step alone. An update whose loss or gradient is not finite is skipped and counted.
    """

    def step(state: TrainState, *args, **static):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value, grads = jax.value_and_grad(loss)(state.params, key, *args, **static)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average would remember the initial noise: warm the decay up.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
        new = (params, ema, opt_state)
        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        state = TrainState(state.step + 1, params, ema, opt_state, state.skipped + ~good)
        return state, {"loss": value, "gradient_norm": norm, "skipped": state.skipped}

    return jax.jit(
        step,
        donate_argnums=0,
        static_argnames=static_argnames,
        compiler_options=compiler_options(),
    )
