"""The objective of fine-tuning: what a batch of latents and captions costs a network that draws.

Whether it is a flow or a diffusion model, its family says (`fluxjax.families.noise_path`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fluxjax.config import PipelineConfig
from fluxjax.families import family_of
from fluxjax.families.family import AnyArray, Apply, Conditioning, Control, Extras, Family, Tokens
from fluxjax.families.noise_path import FLOW, NoisePath
from fluxjax.models.lora import adapt, join_scales, variables
from fluxjax.models.names import flatten, unflatten
from fluxjax.train.learned_variance import variational_bound
from fluxjax.train.objectives import (
    Objective,
    debiased_weights,
    learnt_times,
    snr_weights,
    squared_error,
    time_weights,
)
from fluxjax.train.step import Tree

CONTROLNET = "controlnet"
_VALIDATION = 2**31 - 1  # folded into the seed: far from every step


class Rows(NamedTuple):
    """A batch as the step takes it; `index` numbers the samples of the whole run.

    Latents are packed as the network takes them: a sequence of tokens, or rows and columns.
    Those of clips have frames before these. `reference`: latents of the pictures that these are
    made from. `mask`: what each latent of a
    token (of FLUX 2 x 2) counts, 0 to 1. `channels`: what is joined to the latents', or what a
    ControlNet sees.
    `ids`: token ids of the captions (`Family.tokenize`), for text encoders that learn.
    """

    latents: Float[AnyArray, "b *image c"]
    conditioning: Conditioning
    index: Int[AnyArray, "b"]
    reference: Float[Array, "b *image c"] | None = None
    mask: Float[Array, "b *image each"] | None = None
    channels: Float[Array, "b *image more"] | None = None
    ids: Any = None


class ControlLearner(NamedTuple):
    """A ControlNet that learns beside the network that draws; of a union its one `mode`."""

    module: nn.Module
    mode: int | None = None


def predict(
    family: Family,
    model: nn.Module,
    variables: Tree,
    x: Float[Array, "b *image c"],
    rows: Rows,
    t: Float[Array, "b"],
    ids: Float[Array, "*image axes"] | None,
    guidance: float,
    apply: Apply,
    controlnet: ControlLearner | None = None,
    controlnet_params: Tree = None,
) -> Float[Array, "b *image predicted"]:
    """The family's forward, for a batch. A reference is as large as its picture, and stands where
    that does but for the first axis. A `controlnet` sees the rows' channels."""
    tokens = None
    if rows.reference is not None:
        tokens = Tokens(rows.reference, jnp.asarray(ids).at[:, 0].set(1.0))
    extras = Extras(ids, jnp.full(t.shape, guidance), tokens, rows.channels)
    if controlnet is not None:
        assert rows.channels is not None
        mode = None if controlnet.mode is None else jnp.full(t.shape, controlnet.mode, jnp.int32)
        weights = {"params": controlnet_params}
        seen = Control(controlnet.module, weights, rows.channels, jnp.ones(()), mode)
        extras = extras._replace(channels=None, controls=(seen,))
    return family.forward(model, variables, x, t, rows.conditioning, extras, apply=apply)


def error_weights(
    objective: Objective, path: NoisePath, rows: Rows, t: Float[Array, "b"]
) -> Float[Array, "b *#shape"]:
    """What each squared error is multiplied with, by its time and by its row's mask."""
    each = time_weights(objective.weight, t)
    if objective.min_snr and not path.is_flow:
        each = snr_weights(path, t, objective.min_snr)
    elif objective.debiased and not path.is_flow:
        each = debiased_weights(path, t)
    weights = each.reshape(-1, *[1] * (rows.latents.ndim - 1))
    if rows.mask is None:
        return weights
    floor = objective.unmasked_weight
    counted = floor + (1.0 - floor) * rows.mask.astype(jnp.float32)
    # A token's channels are the outer axis, its latents the inner one (`latents.pack`).
    return weights * jnp.tile(counted, rows.latents.shape[-1] // counted.shape[-1])


def draw_noise(key: Array, objective: Objective, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Of one row, channels last; each channel as a whole moved by the objective's offset."""
    noise = jax.random.normal(key, shape)
    if not objective.noise_offset:
        return noise
    each = jax.random.normal(jax.random.fold_in(key, 1), shape[-1:])
    return noise + objective.noise_offset * each.reshape(*[1] * (len(shape) - 1), -1)


def noise_to_reference(
    noise: Float[Array, "b *image c"], rows: Rows, t: Float[Array, "b"], moved: Array
) -> Float[Array, "b *image c"]:
    """Noise with which the rows `moved` are the reference's noisy latents instead of their own, by
    a flow's path; at times below a half, in part. The flow that leads from there to the rows'
    latents is the one of this noise."""
    assert rows.reference is not None
    share = jnp.where(moved, jnp.minimum((1 - t) / t, 1), 0)
    return noise + share.reshape(-1, *[1] * (noise.ndim - 1)) * (rows.reference - rows.latents)


def path_loss(
    family: Family,
    path: NoisePath,
    model: nn.Module,
    objective: Objective,
    variables: Tree,
    rows: Rows,
    noise: Float[Array, "b *image c"],
    t: Float[Array, "b"],
    ids: Float[Array, "*image axes"] | None,
    apply: Apply,
    *controlled: Any,
) -> Float[Array, ""]:
    """The mean over rows at given times and noise. `controlled`: a ControlNet and its weights."""
    x = path.state(t).of(rows.latents, noise)
    told, guidance = path.told(t), objective.guidance
    given = family, model, variables, x, rows, told, ids, guidance, apply
    predicted = predict(*given, *controlled)
    bound = 0.0
    if path.learns_variance:
        predicted, values = jnp.split(predicted, 2, axis=-1)
        latents = jnp.asarray(rows.latents)
        bound = variational_bound(path, predicted, values, latents, x, t).mean()
    target = path.target(t).of(rows.latents, noise)
    weights = error_weights(objective, path, rows, t)
    if family.counted is not None:
        weights = weights * family.counted(model, rows.channels)
    return squared_error(predicted, target, weights) + bound


@partial(jax.jit, static_argnames=("family", "path", "model", "objective", "apply", "controlnet"))
def fixed_loss(
    family: Family,
    path: NoisePath,
    model: nn.Module,
    objective: Objective,
    variables: Tree,
    rows: Rows,
    quantiles: Float[Array, "b"],
    seed: Int[Array, ""],
    ids: Float[Array, "*image axes"] | None,
    mu: Float[Array, ""],
    apply: Apply = nn.Module.apply,
    controlnet: ControlLearner | None = None,
    controlnet_params: Tree = None,
) -> Float[Array, ""]:
    """The training loss at given quantiles of the timestep density, with noise by sample."""
    key = jax.random.fold_in(jax.random.key(seed), _VALIDATION)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows.index)
    noise = jax.vmap(lambda k: draw_noise(k, objective, rows.latents.shape[1:]))(keys)
    t = learnt_times(objective, path, quantiles, mu)
    given = family, path, model, objective, variables, rows, noise, t, ids, apply
    return path_loss(*given, controlnet, controlnet_params)


def assemble(
    component: str, model: nn.Module, trained: Tree, frozen: dict[str, Tree]
) -> dict[str, Tree]:
    """By component, parameters for `lora.variables`: LoRAs over their frozen bases, all three by
    component, or all of the `component` that draws in the compute dtype, of which `frozen["rest"]`
    is what does not learn, by component with text encoders; or a ControlNet beside it, where it is
    `frozen["base"]`."""
    if "params" in frozen:
        bases, scales = frozen["params"], frozen["scales"]
        return {
            name: adapt(bases[name], join_scales(trained[name], scales[name])) for name in bases
        }
    by_component = trained if component in trained else {component: trained}
    rest = flatten(frozen.get("rest", {}))
    whole = {**by_component, component: unflatten({**rest, **flatten(by_component[component])})}
    # Before layers are gathered, so that half the bytes travel.
    cast = jax.tree.map(lambda leaf: leaf.astype(model.dtype), whole)  # pyright: ignore[reportAttributeAccessIssue]
    if "base" in frozen:
        return {component: frozen["base"], CONTROLNET: cast[component]}
    return cast


class Learner(NamedTuple):
    """What the loss must know of a pipeline; by default FLUX.1's."""

    path: NoisePath = FLOW
    component: str = "transformer"
    """The network that draws."""
    text_encoders: int = 0
    """How many there are."""
    silenced: Callable[[Conditioning, Conditioning, Any], Conditioning] | None = None
    """What is heard where some of them, by row, are not but the empty prompt's."""
    controlnet: ControlLearner | None = None
    """That learns beside the network."""
    zeros: bool = False
    """Whether nothing, not the empty prompt, is heard where a caption is dropped."""

    @classmethod
    def of(cls, config: PipelineConfig, controlnet: ControlLearner | None = None) -> Learner:
        family = family_of(config.class_name)
        silenced = family.silenced and partial(family.silenced, config)
        encoders = len(config.text_encoders)
        zeros = config.force_zeros_for_empty_prompt
        return cls(family.path(config), config.denoiser, encoders, silenced, controlnet, zeros)


_FLUX = Learner()


def finetune_loss(
    family: Family,
    model: nn.Module,
    objective: Objective,
    apply: Apply = nn.Module.apply,
    encoders: Mapping[str, nn.Module] | None = None,
    of: Learner = _FLUX,
):
    """`loss(trained, key, rows, frozen, empty, ids, mu, empty_ids)`: a scalar, a mean over rows.

    `encoders`: text encoders that learn, by component; they read the rows' `ids`, and `empty_ids`
    where a caption is dropped. `of`: what the pipeline says.
    A row's timestep, noise and dropped caption depend on the key and its `index` alone, so that
    they are the same in any split of the batch over devices, processes and accumulation.
    """

    def draw(key: Array, index: Array, shape: tuple[int, ...]):
        time_key, noise_key, drop_key = jax.random.split(jax.random.fold_in(key, index), 3)
        noise = draw_noise(noise_key, objective, shape)
        each = jax.random.uniform(jax.random.fold_in(drop_key, 1), (of.text_encoders,))
        moved = jax.random.uniform(jax.random.fold_in(drop_key, 2)) < objective.from_reference
        return jax.random.uniform(time_key), noise, jax.random.uniform(drop_key), each, moved

    def loss(
        trained: Tree,
        key: Array,
        rows: Rows,
        frozen: dict[str, Tree],
        empty: Conditioning,
        ids: Float[Array, "*image axes"] | None,
        mu: Float[Array, ""],
        empty_ids: Any = None,
    ) -> Float[Array, ""]:
        shape = rows.latents.shape[1:]
        quantiles, noise, chance, each, moved = jax.vmap(lambda i: draw(key, i, shape))(rows.index)
        drop = chance < objective.caption_dropout

        def heard(dropped: Array, said: Array) -> Array:
            return jnp.where(drop.reshape(-1, *[1] * (said.ndim - 1)), dropped, said)

        # What a picture's size is stays said.
        empty = empty._replace(sizes=rows.conditioning.sizes)
        conditioning = jax.tree.map(heard, empty, rows.conditioning)
        params = assemble(of.component, model, trained, frozen)
        if encoders:
            assert family.encode_anew is not None
            said = jax.tree.map(heard, empty_ids, rows.ids)
            anew = family.encode_anew(encoders, params, said, conditioning, apply=apply)
            conditioning = jax.tree.map(heard, empty, anew) if of.zeros else anew
        if of.silenced is not None and objective.encoder_dropout:
            conditioning = of.silenced(conditioning, empty, each < objective.encoder_dropout)
        rows = rows._replace(conditioning=conditioning)
        t = learnt_times(objective, of.path, quantiles, mu)
        if objective.from_reference:
            noise = noise_to_reference(noise, rows, t, moved)
        leaves = variables(params[of.component])
        given = family, of.path, model, objective, leaves, rows, noise, t, ids, apply
        return path_loss(*given, of.controlnet, params.get(CONTROLNET))

    return loss
