"""From noise to latents: the whole run is one compiled program that scans over the noise levels.

Everything a caller varies is data (noise, levels, prompt, guidance), so that only shapes, the
bucket of the step count and whether there is a negative prompt decide about compilation.
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

from fluxjax.models.embeddings import round_to
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import text_ids
from fluxjax.models.lora import variables
from fluxjax.parallel.hosts import from_first
from fluxjax.shapes import Params
from fluxjax.text.conditioning import Conditioning


class Guidance(NamedTuple):
    """`embedded` feeds the guidance embedding of distilled models (None: the model has none).

    With a `negative` prompt, every step is v = negative + true_cfg (positive - negative); the same
    embedded guidance goes into both.
    """

    embedded: Float[Array | np.ndarray, " n"] | None
    negative: Conditioning | None = None
    true_cfg: Float[Array | np.ndarray, ""] | np.floating | float = 1.0


@partial(jax.jit, static_argnames="model")
def denoise(
    model: FluxTransformer,
    params: Params,
    latents: Float[Array, "n image d"],
    levels: Float[Array, "padded"],
    conditioning: Conditioning,
    guidance: Guidance,
    img_ids: Float[Array, "all_image 3"],
    reference: Float[Array, "n reference d"] | None = None,
) -> Float[Array, "n image d"]:
    """Run every step of `levels`, the sigmas from noise to picture; equal neighbours are skipped.

    The tokens of a `reference` (FLUX.1 Kontext) follow those of the picture, as their ids do in
    `img_ids`; they get no noise and what is predicted for them is left out.
    `params` may come with a LoRA (`fluxjax.models.lora.adapt`).
    The state has the dtype of `latents`. As in diffusers' scheduler, the step is added in float32
    and rounded to that dtype; float32 latents keep a bfloat16 model's run unrounded.
    """
    method = partial(_apply, model, params)
    negative = guidance.negative
    embedded = guidance.embedded
    if negative is not None:
        # One pass over a batch of twice the size, not two passes over the weights.
        conditioning = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), conditioning, negative)
        embedded = None if embedded is None else jnp.tile(embedded, 2)
    rope = method("rope", text_ids(conditioning.prompt_embeds.shape[1]), img_ids)
    text = method("embed_text", conditioning.prompt_embeds.astype(model.dtype))
    modulations = method("step_modulations", levels[:-1], conditioning.pooled, embedded)

    def velocity(x, modulation):
        x, tokens = x.astype(model.dtype), x.shape[1]
        if reference is not None:
            x = jnp.concatenate([x, reference.astype(model.dtype)], axis=1)
        if negative is not None:
            x = jnp.concatenate([x, x])
        v = method("denoise", x, text, modulation, rope)[:, :tokens].astype(jnp.float32)
        if negative is None:
            return v
        positive, negated = jnp.split(v, 2)
        return negated + guidance.true_cfg * (positive - negated)

    def step(x, inputs):
        level, following, modulation = inputs

        def advance(x):
            change = (following - level) * velocity(x, modulation)
            if x.dtype != jnp.float32:
                change = round_to(change, x.dtype)
            return (x.astype(jnp.float32) + change).astype(x.dtype)

        return jax.lax.cond(level == following, lambda x: x, advance, x), None

    return jax.lax.scan(step, latents, (levels[:-1], levels[1:], modulations))[0]


def _apply(model: FluxTransformer, params: Params, name: str, *args) -> Any:
    return model.apply(variables(params), *args, method=name)


def part_of(levels: Float[np.ndarray, "padded"], first: int, last: int) -> np.ndarray:
    """Levels with which the same program runs only the steps first ... last - 1.

    The others get length zero and are skipped, so a run in parts, for a progress bar, compiles
    nothing and equals the run in one call.
    """
    return levels[np.clip(np.arange(len(levels)), first, last)]


def denoise_in_parts(
    run: Callable[[Any, np.ndarray], Array],
    latents: Any,
    levels: Float[np.ndarray, "padded"],
    steps: int,
    *,
    progress: Callable[[int], None] | None = None,
    on_step: Callable[[int, Any], None] | None = None,
    every: int = 1,
    seconds: float = 0.25,
) -> Any:
    """`run(latents, levels)` in parts; the result is that of one call.

    `progress(steps done)` is called after parts of about `seconds` each, `on_step(steps done,
    latents)` after every `every`-th step and after the last one; what it raises ends the run.
    Parts, because a program that calls back to the host is kept out of the compilation cache. On
    several processes the clock of the first counts: all run the same parts.
    """
    first, size = 0, steps if progress is None else 1
    while first < steps:
        last, start = min(first + size, steps), time.perf_counter()
        if on_step is not None:
            last = min(last, first - first % every + every)
        latents = wait(run(latents, part_of(levels, first, last)))
        if progress is not None:
            progress(last)
            rate = (last - first) / (time.perf_counter() - start)
            size = from_first(partial(max, 1, round(seconds * rate)))
        if on_step is not None and (last % every == 0 or last == steps):
            on_step(last, latents)
        first = last
    return latents


def wait(array: Array) -> Array:
    """Block until `array` is computed, open to Ctrl-C (`block_until_ready` is not)."""
    while not array.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
        time.sleep(0.001)
    return array.block_until_ready()
