"""What ControlNets and IP-Adapters add to FLUX.1's tokens, in one forward and hoisted for a run.

Source: diffusers `FluxControlNetPipeline`; with classifier-free guidance both passes take the
samples of the prompt's, as there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.config import FluxConfig
from fluxjax.families.family import Apply, Conditioning, Control, Extras
from fluxjax.models import latents as layout
from fluxjax.models.controlnet import ControlSamples
from fluxjax.models.flux import Guides, Modulations, spread

Each = tuple[tuple[Float[Array, "*steps"], Modulations], ...]
"""Of each ControlNet, of a step or of all, the scale of its samples and its modulations."""


def forward_controls(
    config: FluxConfig,
    x: Float[Array, "b image d"],
    t: Float[Array, " b"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply,
) -> Guides:
    """Of `extras`, for one forward of a transformer of `config`."""
    found = []
    for control in extras.controls:
        n, heard = len(control.picture), control.heard or conditioning
        text, vector = heard.sequence[:n], jnp.asarray(heard.vector)
        samples = apply(
            control.module,
            control.variables,
            x[:n],
            _seen(control),
            text,
            vector[:n],
            t[:n],
            extras.positions,
            layout.text_ids(text.shape[1]),
            _guidance(control, extras),
            control.mode,
        )
        found.append(_scaled(control.scale, samples))
    return _guides(config, extras, found, len(x))


def hoist_controls(
    config: FluxConfig,
    times: Float[Array, "steps"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply,
) -> tuple[Each, Callable[[Array, Each], Guides]]:
    """`forward_controls` for the steps of a run. Steps in which a scale is 0 cost nothing."""
    hoisted = [_hoist(one, times, conditioning, extras, apply) for one in extras.controls]

    def add(x: Array, each: Each) -> Guides:
        found = [
            _unless_zero(scale, partial(run, x, modulations))
            for (_, run), (scale, modulations) in zip(hoisted, each, strict=True)
        ]
        return _guides(config, extras, found, len(x))

    return tuple(each for each, _ in hoisted), add


def _hoist(
    control: Control,
    times: Float[Array, "steps"],
    conditioning: Conditioning,
    extras: Extras,
    apply: Apply,
) -> tuple[Any, Callable[[Array, Modulations], ControlSamples]]:
    def method(name: str, *args: Any) -> Any:
        return apply(control.module, control.variables, *args, method=name)

    n, dtype = len(control.picture), control.module.dtype
    heard = control.heard or conditioning
    vector = jnp.asarray(heard.vector)[:n]
    sequence = heard.sequence[:n].astype(dtype)
    rope = method("rope", layout.text_ids(sequence.shape[1]), jnp.asarray(extras.positions))
    text = method("embed_text", sequence, control.mode)
    seen = method("embed_control", _seen(control).astype(dtype))
    guidance = _guidance(control, extras)
    each = method("step_modulations", times, vector, guidance)

    def run(x: Array, modulations: Modulations) -> ControlSamples:
        return method("samples", x[:n].astype(dtype), seen, text, modulations, rope)

    return (control.scale, each), run


def _seen(control: Control) -> Array:
    """As the network takes it: pixels, or packed latents."""
    picture = jnp.asarray(control.picture)
    ready = control.module.config.sees_pixels or picture.ndim == 3
    return picture if ready else jnp.asarray(layout.pack(picture))


def _guidance(control: Control, extras: Extras) -> Any:
    if extras.guidance is None or not control.module.config.guidance_embeds:
        return None
    return extras.guidance[: len(control.picture)]


def _scaled(scale: Any, samples: ControlSamples) -> ControlSamples:
    return jax.tree.map(lambda x: (scale * x.astype(jnp.float32)).astype(x.dtype), samples)


def _unless_zero(scale: Array, run: Callable[[], ControlSamples]) -> ControlSamples:
    def nothing() -> ControlSamples:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run))

    return jax.lax.cond(scale != 0, lambda: _scaled(scale, run()), nothing)


def _guides(config: FluxConfig, extras: Extras, found: list[ControlSamples], rows: int) -> Guides:
    """Samples for `rows` rows, spread over the blocks of the transformer, and the image prompt."""
    if not found:
        return Guides(prompts=extras.image_prompts)
    repeat = extras.controls[0].module.config.sees_pixels

    def each(kind: str, blocks: int, **how: bool) -> tuple[Any, Any]:
        total = _sum([getattr(one, kind) for one in found])
        if total is None:
            return None, None
        rows_each = jnp.tile(total, (1, rows // total.shape[1], 1, 1))
        return rows_each, spread(len(total), blocks, **how)

    double, double_index = each("double", config.num_layers, repeat=repeat)
    single, single_index = each("single", config.num_single_layers)
    return Guides(double, single, double_index, single_index, extras.image_prompts)


def _sum(samples: list[Array | None]) -> Array | None:
    """One by one as many as the shortest has, and none where the first has none.

    Source: diffusers `FluxMultiControlNetModel`.
    """
    if samples[0] is None:
        return None
    given = [one for one in samples if one is not None]
    shortest = min(map(len, given))
    return reduce(operator.add, [one[:shortest] for one in given])
