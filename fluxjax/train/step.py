"""The training state and one jitted update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fluxjax.models.compilation import compiler_options
from fluxjax.models.products import Precision

Tree = Any


class TrainState(NamedTuple):
    """All that an exact resume needs; random numbers are folded from the seed and `step`."""

    step: jax.Array
    params: Tree
    ema: Tree  # None where no average is kept
    opt_state: Tree
    skipped: jax.Array  # updates left out because loss or gradient was not finite


def init_state(
    params: Tree, optimizer: optax.GradientTransformation, *, ema: bool = True
) -> TrainState:
    """Step 0 of these parameters, with an average of them if `ema`."""
    # A copy: the step donates its state, and donating one buffer twice is an error.
    average = jax.tree.map(jnp.copy, params) if ema else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, average, optimizer.init(params), jnp.copy(zero))


def make_step(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float,
    static_argnames: tuple[str, ...] = (),
    precision: Precision = None,
    accumulate: int = 1,
    out_shardings: Any = None,
    donate: bool | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `step(state, *args, **static) -> (state, metrics)`.

    `loss(params, key, *args, **static)` gives the scalar to minimise; its key depends on the seed
    and the step alone. An update whose loss or gradient is not finite is skipped and counted.
    `precision`: that of the network in `loss`, which decides about the compiler's options.
    `accumulate`: the batch, then the first of `args`, is computed in so many parts one after the
    other; a loss that is a mean over rows gives the update of the whole. `out_shardings`: those of
    state and metrics. `donate`: the new state takes the place of the old one; by default not on
    CPUs, where XLA would copy the moments first (25 ms of 245 for the embedded model).
    """
    if donate is None:
        donate = jax.default_backend() != "cpu"

    gradient = jax.value_and_grad(loss)
    if accumulate > 1:
        gradient = _accumulated(gradient, accumulate)

    def step(state: TrainState, *args, **static):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value, grads = gradient(state.params, key, *args, **static)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the average would remember the initial noise: warm the decay up.
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
        new = (params, ema, opt_state)
        old = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        state = TrainState(state.step + 1, params, ema, opt_state, state.skipped + ~good)
        return state, {"loss": value, "gradient_norm": norm, "skipped": state.skipped}

    return jax.jit(
        step,
        donate_argnums=0 if donate else (),
        static_argnames=static_argnames,
        compiler_options=compiler_options(precision),
        out_shardings=out_shardings,
    )


def _accumulated(gradient: Callable, parts: int) -> Callable:
    """The same mean value and gradient, `parts` of the batch at a time."""

    def split(x: jax.Array) -> jax.Array:
        # Every parts-th row: rows that lie on one device stay there.
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def accumulated(params: Tree, key: jax.Array, batch: Tree, *rest, **static):
        def add(total: Tree, part: Tree):
            return jax.tree.map(jnp.add, total, gradient(params, key, part, *rest, **static)), None

        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, start, jax.tree.map(split, batch))
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated
