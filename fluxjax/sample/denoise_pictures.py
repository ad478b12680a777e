"""Latents of pictures from noise, as pure functions: all passes of guidance are one batch."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fluxjax.families.family import (
    AnyArray,
    Apply,
    Conditioning,
    Control,
    Extras,
    Family,
    LeftOut,
    Tokens,
)
from fluxjax.models.absent import with_zeros
from fluxjax.models.lora import stack_passes, variables
from fluxjax.models.transformer_blocks import ImagePrompt
from fluxjax.sample import denoise as sampler
from fluxjax.sample.ip_adapter import Attended
from fluxjax.schedules.schedule import Schedule
from fluxjax.shapes import Params

WHOLE = ("schedule", "passes", "control_scales", "image_prompt_scales", "rescale", "left_out")
"""Of Drawn: the same for all pictures."""


class Drawn(NamedTuple):
    """What `denoise_pictures` draws with: what is in WHOLE is data for all pictures, the rest has a
    row for each."""

    schedule: Schedule
    passes: Float[AnyArray, "steps differences *frames"]
    conditionings: tuple[Conditioning, ...]
    """One for each pass."""
    guidance: Float[AnyArray, "n"]
    reference: Float[AnyArray, "n c rows columns"] | None = None
    """Latents of a picture to edit, perhaps of another size."""
    channels: tuple[Float[AnyArray, "n more *size"], ...] | None = None
    """Of each pass what is joined to the state's channels."""
    kept: sampler.Kept | None = None
    """Its mask has one channel."""
    controls: tuple[tuple[AnyArray, Int[AnyArray, "n"] | None], ...] = ()
    """Of each ControlNet what it sees, latents or pixels, and its mode."""
    image_prompts: tuple[tuple[Attended, ...], ...] = ()
    """Of each pass and each IP-Adapter, where there are any."""
    control_scales: tuple[Float[AnyArray, "steps"], ...] = ()
    image_prompt_scales: tuple[Float[AnyArray, "layers"], ...] = ()
    noise: Float[AnyArray, "n steps c *size"] | None = None
    """What each step adds, where a sampler may."""
    rescale: Float[AnyArray, ""] | None = None
    """Of guidance; None: 0."""
    left_out: LeftOut | None = None
    """Skip-layer guidance."""


@partial(jax.jit, static_argnames=("family", "module", "controlnets", "apply"))
def before_steps(
    family: Family,
    module: Any,
    controlnets: tuple[Any, ...],
    params: Params,
    controlnet_params: tuple[Params, ...],
    state: sampler.State,
    drawn: Drawn,
    apply: Apply = nn.Module.apply,
) -> Any:
    """What `denoise_pictures` takes as `each`: of every step what is the same whatever the picture.

    Parameters that only steps use may be absent.
    """
    nets = controlnets, controlnet_params
    return _hoisted(family, module, nets, params, state, drawn, apply)[0]


@partial(jax.jit, static_argnames=("family", "module", "controlnets", "apply"))
def denoise_pictures(
    family: Family,
    module: Any,
    controlnets: tuple[Any, ...],
    params: Params,
    controlnet_params: tuple[Params, ...],
    state: sampler.State,
    drawn: Drawn,
    each: Any = None,
    apply: Apply = nn.Module.apply,
) -> sampler.State:
    """Runs the schedule on a state of unpacked latents, (n, c, h, w) or (n, c, frames, h, w).

    `params` may come with a LoRA (`fluxjax.models.lora.adapt`). `controlnets` are modules, with a
    picture for each in `drawn`. With `each`, which `before_steps` gives, those parameters may be
    absent that it alone uses.
    """
    size = state[0].shape[2:]
    nets = controlnets, controlnet_params
    hoisted, step, alone = _hoisted(family, module, nets, params, state, drawn, apply)
    each, by_itself = hoisted if each is None else each
    packed = tuple(family.pack(latents).values for latents in state)
    kept = None
    if drawn.kept is not None:
        mask = jnp.broadcast_to(drawn.kept.mask, state[0].shape)
        kept = jax.tree.map(lambda x: family.pack(x).values, drawn.kept._replace(mask=mask))
    noise = None
    if drawn.noise is not None:
        noise = jax.vmap(lambda latents: family.pack(latents).values)(jnp.asarray(drawn.noise))
    packed = sampler.denoise(
        step,
        each,
        packed,
        drawn.schedule,
        drawn.passes,
        alone=None if alone is None else (alone, by_itself),
        noise=noise,
        kept=kept,
        rescale=drawn.rescale,
    )
    return tuple(family.unpack(tokens, *size) for tokens in packed)


def _hoisted(
    family: Family,
    module: Any,
    controlnets: tuple[tuple[Any, ...], tuple[Params, ...]],
    params: Params,
    state: sampler.State,
    drawn: Drawn,
    apply: Apply,
) -> tuple[tuple[Any, Any], sampler.Step, sampler.Step | None]:
    """`Family.hoist` of all passes, and of the first alone where weights of frames, as Open-Sora's
    guidance has them, may leave steps to it.

    All are one batch, not several passes over the weights, unless their texts have several lengths
    (Redux beside a negative prompt).
    """
    lengths = [heard.sequence.shape[1] for heard in drawn.conditionings]
    ends = [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    spans = [slice(*ends) for ends in zip([0, *ends], [*ends, len(lengths)], strict=True)]
    hoist = partial(_hoisted_passes, family, module, controlnets, params, state, drawn, apply)
    found = [hoist(span) for span in spans]
    by_itself, alone = None, None
    if drawn.passes.ndim == 3 and len(lengths) > 1:
        by_itself, alone = hoist(slice(0, 1))
    if len(found) == 1:
        each, step = found[0]
        return (each, by_itself), step, alone

    def each_span(x: Array, each: Any) -> Array:
        rows = len(x) // len(lengths)
        parts = zip(jnp.split(x, [end * rows for end in ends]), each, found, strict=True)
        return jnp.concatenate([run(part, one) for part, one, (_, run) in parts])

    return (tuple(each for each, _ in found), by_itself), each_span, alone


def _hoisted_passes(
    family: Family,
    module: Any,
    controlnets: tuple[tuple[Any, ...], tuple[Params, ...]],
    params: Params,
    state: sampler.State,
    drawn: Drawn,
    apply: Apply,
    span: slice,
) -> tuple[Any, sampler.Step]:
    """Of the passes of `span`, stacked in the batch."""
    heard = drawn.conditionings[span]
    positions, many = family.pack(state[0]).positions, len(heard)
    stack = partial(jax.tree.map, lambda *leaves: jnp.concatenate(leaves))
    reference = None
    if drawn.reference is not None:
        tokens = family.pack(drawn.reference, reference=True)
        reference = Tokens(stack(*[tokens.values] * many), tokens.positions)
    channels = None
    if drawn.channels is not None:
        channels = stack(*(family.pack(one).values for one in drawn.channels[span]))
    nets = zip(*controlnets, drawn.controls, drawn.control_scales, strict=True)
    first = drawn.conditionings[0] if span.start else None
    controls = tuple(
        Control(net, {"params": weights}, seen, scale, mode, first)
        for net, weights, (seen, mode), scale in nets
    )
    attended: Any = stack(*drawn.image_prompts[span]) if drawn.image_prompts else ()
    prompts = tuple(
        ImagePrompt(jnp.moveaxis(keys, 1, 0), jnp.moveaxis(values, 1, 0), jnp.asarray(scale))
        for (keys, values), scale in zip(attended, drawn.image_prompt_scales, strict=True)
    )
    guidance = jnp.tile(drawn.guidance, many)
    extras = Extras(positions, guidance, reference, channels, controls, prompts, drawn.left_out)
    return family.hoist(
        module,
        stack_passes(variables(with_zeros(params)), many),
        drawn.schedule.times,
        stack(*heard),
        extras,
        apply=apply,
    )
