"""From noise to latents: one scan over the steps of a schedule, whatever the sampler and family.

Everything a caller varies is data (noise, levels, step matrices, prompt, guidance), so that only
shapes, the bucket of the step count, the number of passes and what is absent decide about
compilation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.families.family import AnyArray
from fluxjax.models.embeddings import round_to
from fluxjax.parallel.hosts import from_first
from fluxjax.schedules.schedule import Schedule

State = tuple[Float[AnyArray, "b *shape"], ...]
Step = Callable[[Any, Any], Any]
PART_SECONDS = 0.25  # between calls of `progress`


class Kept(NamedTuple):
    """What stays where `mask` is 0, and the noise with which it goes along (inpainting).

    With `Schedule.thresholds` it stays where `mask` is below the step's."""

    mask: Float[AnyArray, "b *#shape"]
    picture: Float[AnyArray, "b *shape"]
    noise: Float[AnyArray, "b *shape"]


def denoise(
    step: Step,
    each: Any,
    state: State,
    schedule: Schedule,
    passes: Float[AnyArray, "steps differences *frames"],
    *,
    alone: tuple[Step, Any] | None = None,
    noise: Float[AnyArray, "b steps *shape"] | None = None,
    kept: Kept | None = None,
    rescale: Float[AnyArray, ""] | None = None,
) -> State:
    """Run the active steps of `schedule`, as `Schedule` has them; returns the state of the end.

    `step(x, one of each)` is the network, of a family's `hoist`, on all passes stacked in the
    batch: see `combined`; a learned variance that no sampler wants is left aside. `alone`: the
    same, and its `each`, of the first pass, which is what all add up to at steps whose weights are
    all 1. The state has the dtype of its latents. `noise` is what each step adds, `rescale` how far
    guidance is brought back to the spread of the first pass.
    """

    def advance(inputs: tuple, state: State) -> State:
        row, one, by_itself, weights, drawn = inputs
        x = state[0]
        if row.scales is not None:
            x = (row.scales * x.astype(jnp.float32)).astype(x.dtype)
        many = weights.shape[0] + 1

        def all_passes(x: AnyArray) -> Array:
            predicted = step(jnp.concatenate([x] * many) if many > 1 else x, one)
            if row.log_variances is None and predicted.shape[1:] != x.shape[1:]:
                predicted, _ = _halves(predicted, x.shape)
            each_pass = predicted.astype(jnp.float32)
            total = combined(each_pass, weights)
            return total if rescale is None else _rescaled(total, each_pass[: len(x)], rescale)

        def first_pass(x: AnyArray) -> Array:
            assert alone is not None
            return alone[0](x, by_itself).astype(jnp.float32)

        if alone is None or many == 1:
            predicted = all_passes(x)
        else:
            predicted = jax.lax.cond(jnp.all(weights == 1.0), first_pass, all_passes, x)
        if row.log_variances is not None:
            predicted, variance = _halves(predicted, x.shape)
            drawn = None if drawn is None else drawn * _deviation(row.log_variances, variance)
        change = row.gains * predicted
        if x.dtype != jnp.float32:
            change = round_to(change, x.dtype)
        state = _product(row, state, change, drawn)
        return state if kept is None else (_keep(row, state[0], kept), *state[1:])

    def skip_or_advance(state: State, inputs: tuple) -> tuple[State, None]:
        return jax.lax.cond(
            inputs[0].active, partial(advance, inputs), lambda state: state, state
        ), None

    drawn = None if noise is None else jnp.moveaxis(noise, 1, 0)
    by_itself = None if alone is None else alone[1]
    return jax.lax.scan(skip_or_advance, state, (schedule, each, by_itself, passes, drawn))[0]


def combined(
    predicted: Float[Array, "passes_b *shape"], weights: Float[Array, "differences *frames"]
) -> Float[Array, "b *shape"]:
    """The passes, stacked in the batch, added up: the last one, and each weight times the
    difference of its pass to the next.

    One weight is classifier-free guidance, negative + scale (positive - negative), rounded as in
    diffusers and the original codes; two are three-way guidance. Any sum whose weights add up to 1
    can be written so. Weights of each frame of a clip are for states whose first axis after the
    batch is the frames.
    """
    each = jnp.split(predicted, weights.shape[0] + 1)
    total = each[-1]
    for i in range(weights.shape[0]):
        weight = weights[i]
        if weight.ndim:
            weight = weight.reshape(1, -1, *[1] * (total.ndim - 2))
        total = total + weight * (each[i] - each[i + 1])
    return total


def passes_run(weights: Float[AnyArray, "steps differences *frames"]) -> int:
    """How many passes a run of such steps takes, with `alone` given to `denoise`."""
    rests = (np.asarray(weights).reshape(len(weights), -1) == 1).all(axis=1)
    return int(np.where(rests, 1, weights.shape[1] + 1).sum())


def _rescaled(guided: Array, positive: Array, share: AnyArray) -> Array:
    """Guidance whose standard deviation is in part that of the prompt's pass (Lin et al. 2023)."""

    def spread(x: Array) -> Array:
        return jnp.std(x, axis=tuple(range(1, x.ndim)), ddof=1, keepdims=True)

    part = jnp.asarray(share)
    return part * guided * (spread(positive) / spread(guided)) + (1.0 - part) * guided


def _product(row: Schedule, state: State, change: Array, noise: Array | None) -> State:
    """matrices @ [Z; m; p; noise]; row by row, so that no state is copied into one array."""
    if row.matrices is None:
        (x,) = state
        return ((x.astype(jnp.float32) + change).astype(x.dtype),)
    columns = [*state, change]
    if row.clips is not None:
        columns.append(_clamped(row, state[0], change))
    columns += [] if noise is None else [noise]

    def sum_of(weights: Array, like: AnyArray) -> Array:
        terms = [weights[j] * x.astype(jnp.float32) for j, x in enumerate(columns)]
        return sum(terms[1:], terms[0]).astype(like.dtype)

    return tuple(sum_of(row.matrices[i], x) for i, x in enumerate(state))


def _clamped(row: Schedule, x: AnyArray, change: Array) -> Array:
    """The predicted picture, within its limits."""
    of_x, of_change, limit = row.clips  # pyright: ignore[reportGeneralTypeIssues]
    picture = of_x * x.astype(jnp.float32) + of_change * change
    if row.quantiles is None:
        return jnp.clip(picture, -limit, limit)
    ratio, largest = row.quantiles
    each = jnp.abs(picture).reshape(len(picture), -1)
    bound = jnp.clip(jnp.quantile(each, ratio, axis=1), 1.0, largest)
    bound = bound.reshape((-1,) + (1,) * (picture.ndim - 1))
    return jnp.clip(picture, -bound, bound) / bound


def _halves(predicted: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The prediction and its variance, along the axis that is twice as long as the state's."""
    sizes = enumerate(shape[1:], start=1)
    axis = next(i for i, size in sizes if predicted.shape[i] == 2 * size)
    mean, variance = jnp.split(predicted, 2, axis)
    return mean, variance


def _deviation(log_variances: AnyArray, variance: Array) -> Array:
    share = (variance + 1.0) / 2.0
    return jnp.exp(0.5 * (share * log_variances[1] + (1.0 - share) * log_variances[0]))


def _keep(row: Schedule, x: AnyArray, kept: Kept) -> Array:
    assert row.keep is not None, "a schedule with `keep` says how much noise is kept with a picture"
    mask, picture, noise = (leaf.astype(jnp.float32) for leaf in kept)
    if row.thresholds is not None:
        mask = (mask >= row.thresholds).astype(jnp.float32)
    other = row.keep[0] * picture + row.keep[1] * noise
    return (mask * x.astype(jnp.float32) + (1.0 - mask) * other).astype(x.dtype)


def in_parts(
    run: Callable[[Any, Schedule], Any],
    state: Any,
    schedule: Schedule,
    *,
    progress: Callable[[int], None] | None = None,
    on_step: Callable[[int, Any], None] | None = None,
    every: int = 1,
) -> Any:
    """`run(state, schedule)` in parts; the result is that of one call.

    `progress(steps done)` is called after parts of about PART_SECONDS, `on_step(steps done, state)`
    after every `every`-th step and after the last one; what it raises ends the run.
    Steps are counted from the first that is active. Parts, because a program that calls back to the
    host is kept out of the compilation cache. On several processes the clock of the first counts:
    all run the same parts.
    """
    begin = schedule.first
    steps = schedule.steps - begin
    first, size = 0, steps if progress is None else 1
    while first < steps:
        last, start = min(first + size, steps), time.perf_counter()
        if on_step is not None:
            last = min(last, first - first % every + every)
        state = wait(run(state, schedule.part(begin + first, begin + last)))
        if progress is not None:
            progress(last)
            rate = (last - first) / (time.perf_counter() - start)
            size = from_first(partial(max, 1, round(PART_SECONDS * rate)))
        if on_step is not None and (last % every == 0 or last == steps):
            on_step(last, state)
        first = last
    return state


def wait(tree: Any) -> Any:
    """Block until all arrays are computed, open to Ctrl-C (`block_until_ready` is not)."""
    for array in jax.tree.leaves(tree):
        while not array.is_ready():
            time.sleep(0.001)
        array.block_until_ready()
    return tree
