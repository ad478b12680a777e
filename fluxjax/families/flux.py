"""FLUX.1: CLIP and T5, a transformer over packed latents, flow matching.

Source: diffusers `FluxPipeline`, `FluxKontextPipeline`; BFL `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fluxjax.config import (
    ConfigError,
    FluxPipelineConfig,
    OpenSoraPipelineConfig,
    PipelineConfig,
    SchedulerConfig,
)
from fluxjax.config.latents import PATCH, latent_size
from fluxjax.config.sampler import SamplerConfig
from fluxjax.families.family import (
    Apply,
    Conditioning,
    Extras,
    Family,
    Guidance,
    Steps,
    Tokens,
    second_prompts,
)
from fluxjax.families.flux_controls import Each as OfControls
from fluxjax.families.flux_controls import forward_controls, hoist_controls
from fluxjax.families.flux_tasks import TASKS, joined, mask_channels, tasks_of, widened
from fluxjax.families.noise_path import FLOW
from fluxjax.models import latents as layout
from fluxjax.models import lora
from fluxjax.models.clip import CLIPTextModel, CLIPTextOutput
from fluxjax.models.controlnet import FluxControlNet
from fluxjax.models.embeddings import TimestepRounding
from fluxjax.models.flux import FluxTransformer, Modulations
from fluxjax.models.t5 import T5Encoder
from fluxjax.schedules.flow_euler import flow_euler, sigmas, start_step
from fluxjax.schedules.step_table import Run
from fluxjax.shapes import Params
from fluxjax.text.cut_prompts import left_out

if TYPE_CHECKING:
    from fluxjax.text.tokenizers import PromptTokenizer


Each = tuple[Modulations, OfControls]
"""What each step of a run has of its own."""


class PromptIds(NamedTuple):
    """Token ids of a batch of prompts."""

    clip: Int[Array | np.ndarray, "b l"]
    t5: Int[Array | np.ndarray, "b text"]


def tokenize(
    tokenizers: Sequence[PromptTokenizer],
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_sequence_length: int,
) -> tuple[PromptIds, list[str]]:
    """Token ids, and one line for each prompt whose end T5 does not read, with that end's first and
    last words.

    T5 reads `prompts_2` where given. CLIP's 77 tokens are cut silently while T5 hears the whole:
    CLIP only sets the mood. Raises ValueError when the numbers of prompts differ.
    """
    second = second_prompts(prompts, prompts_2)
    clip, t5 = tokenizers
    heard, read = clip(prompts), t5(second, max_sequence_length)
    ids = PromptIds(heard.input_ids, read.input_ids)
    return ids, left_out(read.removed, max_sequence_length)


@partial(jax.jit, static_argnames=("encoders", "apply"))
def encode_prompts(
    encoders: tuple[CLIPTextModel, T5Encoder],
    params: tuple[Params, Params],
    ids: PromptIds,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """T5's states, of its padding too as FLUX was trained, and CLIP's pooled state."""
    (clip, t5), (clip_params, t5_params) = encoders, params
    vector = _pooled(clip, clip_params, ids, apply)
    states = jnp.asarray(apply(t5, lora.variables(t5_params), ids.t5))
    return Conditioning(states, None, vector)


def encode_anew(
    encoders: Mapping[str, Any],
    params: Mapping[str, Params],
    ids: PromptIds,
    heard: Conditioning,
    *,
    apply: Apply = nn.Module.apply,
) -> Conditioning:
    """`heard`, with what some of the encoders, by component, say now in place of what they said."""
    if "text_encoder" in encoders:
        vector = _pooled(encoders["text_encoder"], params["text_encoder"], ids, apply)
        heard = heard._replace(vector=vector)
    if "text_encoder_2" in encoders:
        t5 = encoders["text_encoder_2"]
        states = jnp.asarray(apply(t5, lora.variables(params["text_encoder_2"]), ids.t5))
        heard = heard._replace(sequence=states)
    return heard


def _pooled(clip: CLIPTextModel, params: Params, ids: PromptIds, apply: Apply) -> Any:
    output = apply(clip, lora.variables(params), ids.clip)
    assert isinstance(output, CLIPTextOutput)
    return output.pooler_output


def text_shapes(
    config: FluxPipelineConfig | OpenSoraPipelineConfig, count: int, length: int, dtype: Any
) -> tuple[PromptIds, Conditioning]:
    """Shapes of what `tokenize` and `encode_prompts` make of `count` prompts."""
    spec: Any = jax.ShapeDtypeStruct
    clip = spec((count, config.text_encoder.max_position_embeddings), jnp.int32)
    t5 = spec((count, length), jnp.int32)
    sequence = spec((count, length, config.text_encoder_2.d_model), dtype)
    vector = spec((count, config.text_encoder.hidden_size), dtype)
    return PromptIds(clip, t5), Conditioning(sequence, None, vector)


def state_shape(config: FluxPipelineConfig, width: int, height: int) -> tuple[int, int, int]:
    """(channels, rows, columns) of the latents of a picture of `width` x `height` pixels.

    Raises ConfigError unless both are positive multiples of 16.
    """
    return config.vae.latent_channels, *latent_size(width, height, config.vae)


def pack(latents: Float[Array | np.ndarray, "n c h w"], *, reference: bool = False) -> Tokens:
    """2 x 2 latents as one token. A reference's positions have another first axis."""
    positions = layout.image_ids(*latents.shape[2:], index=int(reference))
    return Tokens(layout.pack(latents), positions)


def run(config: FluxPipelineConfig, steps: Steps, rows: int, columns: int) -> Run:
    """Of a picture of so many latent rows and columns; see `flow_euler`.

    `steps.sampler` is one of `ON_FLOW`; another sampler and other sigmas run in the program that
    all samplers share. Raises ConfigError for what a flow does not have.
    """
    return flow_run(config.scheduler, steps, rows * columns // PATCH**2)


def flow_run(scheduler: SchedulerConfig, steps: Steps, tokens: int) -> Run:
    """`run` of any model that is a flow; the times are noise levels."""
    if steps.eta:
        raise ConfigError("eta is how much noise DDIM adds, and this model is a flow")
    if steps.shift is not None:
        scheduler = replace(scheduler, use_dynamic_shifting=False, shift=steps.shift)
    if steps.sampler is None and steps.spacing is None and steps.sigmas is None:
        levels = sigmas(steps.count, tokens, scheduler)
        plain = flow_euler(levels, first=steps.first)
        left = np.stack([1 - levels[:-1], levels[:-1]], axis=-1)
        return Run(plain, np.zeros(len(left), np.bool_), left)
    if not isinstance(steps.count, int):
        raise ConfigError("own sigmas are stepped along by the model's own sampler")
    from fluxjax.schedules.samplers import chosen, sampler_run  # a dozen files, seldom asked for

    own = SamplerConfig(
        sampler="FlowMatchEulerDiscreteScheduler",
        num_train_timesteps=scheduler.num_train_timesteps,
        shift=scheduler.shift,
        use_dynamic_shifting=scheduler.use_dynamic_shifting,
    )
    asked = chosen(own, steps.sampler, spacing=steps.spacing, sigmas=steps.sigmas)
    mu = scheduler.mu(tokens) if scheduler.use_dynamic_shifting else None
    choices: dict[str, Any] = {"mu": mu}
    if asked.sampler.startswith("FlowMatch"):
        choices["own"] = np.linspace(1.0, 1.0 / steps.count, steps.count).tolist()
    order = sampler_run(asked, steps.count, **choices).order if steps.first else 1
    found = sampler_run(asked, steps.count, steps.first * order, **choices)
    times = found.schedule.times / np.float32(scheduler.num_train_timesteps)
    return found._replace(schedule=found.schedule._replace(times=times))


def started(
    image: Float[np.ndarray, "n c h w"], noise: Float[np.ndarray, "n c h w"], run: Run
) -> Float[np.ndarray, "n c h w"]:
    """The latents before the first step that is run: the image with as much noise as that has."""
    level = np.asarray(run.schedule.times[[run.schedule.first]], noise.dtype)
    return np.asarray(FLOW.state(level).of(image, noise))


def scale(config: PipelineConfig, asked: Guidance) -> float | None:
    """Of classifier-free guidance; None where there is one pass.

    Raises ConfigError for a scale with nothing to guide away from, and the other way round.
    """
    if asked.negative_prompt is None and asked.true_cfg != 1:
        raise ConfigError('true_cfg needs a negative_prompt; an empty one ("") will do')
    if asked.negative_prompt is not None and asked.true_cfg <= 1:
        raise ConfigError("negative_prompt needs true_cfg above 1, such as true_cfg=3.5")
    return asked.true_cfg if asked.negative_prompt is not None else None


def networks(
    config: FluxPipelineConfig, rounding: TimestepRounding, **fields: Any
) -> tuple[FluxTransformer, tuple[FluxControlNet, ...]]:
    """The one that draws and its ControlNets, with the rounding of timesteps of whom `rounding`
    names."""
    fields["timestep_rounding"] = rounding
    controlnets = tuple(FluxControlNet(one, **fields) for one in config.controlnets)
    return FluxTransformer(config.transformer, **fields), controlnets


def passes(steps: int, true_cfg: float | None) -> Float[np.ndarray, "steps differences"]:
    """How the passes are added up, see `fluxjax.sample.denoise.combined`.

    One pass, or with `true_cfg` two, the prompt's and the negative one's.
    """
    return np.full((steps, 0 if true_cfg is None else 1), true_cfg or 0.0, np.float32)


def forward(
    module: FluxTransformer,
    variables: Params,
    x: Float[Array, "b image d"],
    t: Float[Array, " b"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
    **capture: Any,
) -> Any:
    """The velocity (noise - data) of packed latents at the noise levels `t`, 1 = pure noise.

    `variables` is what `Module.apply` takes (see `fluxjax.models.lora.variables`). With `capture`,
    flax's `mutable` and `capture_intermediates`, the result is (velocity, state).
    """
    guides: tuple[Any, ...] = ()
    if extras.controls or extras.image_prompts:
        guides = (forward_controls(module.config, x, t, conditioning, extras, apply=apply),)
    returned: Any = apply(
        module,
        variables,
        _seen(x, extras),
        conditioning.sequence,
        conditioning.vector,
        t,
        _positions(extras),
        layout.text_ids(conditioning.sequence.shape[1]),
        _guidance(module, extras),
        *guides,
        **capture,
    )
    length = x.shape[1]
    return (returned[0][:, :length], returned[1]) if capture else returned[:, :length]


def hoist(
    module: FluxTransformer,
    variables: Params,
    times: Float[Array, "steps"],
    conditioning: Conditioning,
    extras: Extras,
    *,
    apply: Apply = nn.Module.apply,
) -> tuple[Each, Callable[[Array, Each], Array]]:
    """`forward` for the steps of a run: one entry per step, and what each step does with its own.

    Rotary tables, text and modulations are the same whatever the picture is: they are computed
    here, once, and all modulations in one pass over their weights.
    """

    def method(name: str, *args: Any) -> Any:
        return apply(module, variables, *args, method=name)

    length = conditioning.sequence.shape[1]
    rope = method("rope", layout.text_ids(length), _positions(extras))
    text = method("embed_text", conditioning.sequence.astype(module.dtype))
    each = method("step_modulations", times, conditioning.vector, _guidance(module, extras))
    controls, add = hoist_controls(module.config, times, conditioning, extras, apply=apply)

    def step(x: Array, each: Each) -> Array:
        modulations, controls = each
        x = x.astype(module.dtype)
        guides = (add(x, controls),) if controls or extras.image_prompts else ()
        out = method("denoise", _seen(x, extras), text, modulations, rope, *guides)
        return out[:, : x.shape[1]]

    return (each, controls), step


def _seen(x: Array, extras: Extras) -> Array:
    """The tokens that the network sees, of which the first are the state's."""
    if extras.channels is not None:
        x = jnp.concatenate([x, extras.channels.astype(x.dtype)], axis=-1)
    if extras.tokens is not None:
        x = jnp.concatenate([x, extras.tokens.values.astype(x.dtype)], axis=1)
    return x


def _positions(extras: Extras) -> Array:
    if extras.tokens is None:
        return jnp.asarray(extras.positions)
    return jnp.concatenate([jnp.asarray(extras.positions), jnp.asarray(extras.tokens.positions)])


def _guidance(module: FluxTransformer, extras: Extras) -> Any:
    return extras.guidance if module.config.guidance_embeds else None


def shift(config: FluxPipelineConfig, rows: int, columns: int) -> float:
    """As in sampling."""
    return config.scheduler.mu(rows * columns // PATCH**2)


FLUX = Family(
    tasks=TASKS,
    tasks_of=tasks_of,
    joined=joined,
    widened=widened,
    mask_channels=mask_channels,
    tokenize=tokenize,
    encode=encode_prompts,
    encode_anew=encode_anew,
    text_shapes=text_shapes,
    scale=scale,
    networks=networks,
    state_shape=state_shape,
    pack=pack,
    unpack=layout.unpack,
    run=run,
    first_step=start_step,
    started=started,
    passes=passes,
    forward=forward,
    hoist=hoist,
    path=lambda config: FLOW,
    shift=shift,
)
