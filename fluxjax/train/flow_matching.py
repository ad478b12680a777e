"""The objective of fine-tuning: what a batch of latents and captions costs a FLUX transformer.

Source: Liu et al. 2022 (rectified flow); Esser et al. 2024 (SD3).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fluxjax.families.family import AnyArray, Apply, Conditioning, Extras, Family, Tokens
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.lora import adapt, join_scales, variables
from fluxjax.train.objectives import (
    Objective,
    density_times,
    time_weights,
    velocity_loss,
)
from fluxjax.train.step import Tree

_VALIDATION = 2**31 - 1  # folded into the seed: far from every step


class Rows(NamedTuple):
    """A batch as the step takes it; `index` numbers the samples of the whole run.

    `reference`: latents of the pictures that these are made from. `mask`: what each of a token's
    2 x 2 latents counts, 0 to 1. `channels`: what is joined to the latents' (Fill and Control).
    `ids`: token ids of the captions (`Family.tokenize`), for text encoders that learn.
    """

    latents: Float[AnyArray, "b image c"]
    conditioning: Conditioning
    index: Int[AnyArray, "b"]
    reference: Float[Array, "b image c"] | None = None
    mask: Float[Array, "b image 4"] | None = None
    channels: Float[Array, "b image more"] | None = None
    ids: Any = None


def predict(
    family: Family,
    model: FluxTransformer,
    variables: Tree,
    x: Float[Array, "b image c"],
    rows: Rows,
    t: Float[Array, "b"],
    ids: Float[Array, "image 3"],
    guidance: float,
    apply: Apply,
) -> Float[Array, "b image c"]:
    """The family's forward, for a batch. A reference is as large as its picture, and stands where
    that does but for the first axis."""
    tokens = None
    if rows.reference is not None:
        tokens = Tokens(rows.reference, jnp.asarray(ids).at[:, 0].set(1.0))
    extras = Extras(ids, jnp.full(t.shape, guidance), tokens, rows.channels)
    return family.forward(model, variables, x, t, rows.conditioning, extras, apply=apply)


def error_weights(
    objective: Objective, rows: Rows, t: Float[Array, "b"]
) -> Float[Array, "b #image #c"]:
    """What each squared error is multiplied with, by its timestep and by its row's mask."""
    weights = time_weights(objective.weight, t)[:, None, None]
    if rows.mask is None:
        return weights
    floor = objective.unmasked_weight
    counted = floor + (1.0 - floor) * rows.mask.astype(jnp.float32)
    # A token's channels are the outer axis, its latents the inner one (`latents.pack`).
    return weights * jnp.tile(counted, rows.latents.shape[-1] // counted.shape[-1])


@partial(jax.jit, static_argnames=("family", "model", "objective", "apply"))
def fixed_loss(
    family: Family,
    model: FluxTransformer,
    objective: Objective,
    variables: Tree,
    rows: Rows,
    quantiles: Float[Array, "b"],
    seed: Int[Array, ""],
    ids: Float[Array, "image 3"],
    mu: Float[Array, ""],
    apply: Apply = nn.Module.apply,
) -> Float[Array, ""]:
    """The training loss at given quantiles of the timestep density, with noise by sample."""
    key = jax.random.fold_in(jax.random.key(seed), _VALIDATION)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows.index)
    drawn = jax.vmap(lambda k: jax.random.normal(k, rows.latents.shape[1:]))(keys)
    t = density_times(objective, quantiles, mu)
    x = jnp.asarray(family.noised(rows.latents, drawn, t))
    predicted = predict(family, model, variables, x, rows, t, ids, objective.guidance, apply)
    return velocity_loss(
        predicted, family.target(rows.latents, drawn), error_weights(objective, rows, t)
    )


def assemble(model: FluxTransformer, trained: Tree, frozen: dict[str, Tree]) -> dict[str, Tree]:
    """By component, parameters for `lora.variables`: LoRAs over their frozen bases, all three by
    component, or all of the transformer in the compute dtype."""
    if "params" in frozen:
        bases, scales = frozen["params"], frozen["scales"]
        return {
            name: adapt(bases[name], join_scales(trained[name], scales[name])) for name in bases
        }
    # Before layers are gathered, so that half the bytes travel.
    return {"transformer": jax.tree.map(lambda leaf: leaf.astype(model.dtype), trained)}


def finetune_loss(
    family: Family,
    model: FluxTransformer,
    objective: Objective,
    apply: Apply = nn.Module.apply,
    encoders: Mapping[str, nn.Module] | None = None,
):
    """`loss(trained, key, rows, frozen, empty, ids, mu, empty_ids)`: a scalar, a mean over rows.

    `encoders`: text encoders that learn, by component; they read the rows' `ids`, and `empty_ids`
    where a caption is dropped.
    A row's timestep, noise and dropped caption depend on the key and its `index` alone, so that
    they are the same in any split of the batch over devices, processes and accumulation.
    """

    def draw(key: Array, index: Array, shape: tuple[int, ...]):
        time_key, noise_key, drop_key = jax.random.split(jax.random.fold_in(key, index), 3)
        noise = jax.random.normal(noise_key, shape)
        return jax.random.uniform(time_key), noise, jax.random.uniform(drop_key)

    def loss(
        trained: Tree,
        key: Array,
        rows: Rows,
        frozen: dict[str, Tree],
        empty: Conditioning,
        ids: Float[Array, "image 3"],
        mu: Float[Array, ""],
        empty_ids: Any = None,
    ) -> Float[Array, ""]:
        shape = rows.latents.shape[1:]
        quantiles, noise, chance = jax.vmap(lambda i: draw(key, i, shape))(rows.index)
        drop = chance < objective.caption_dropout

        def heard(dropped: Array, said: Array) -> Array:
            return jnp.where(drop.reshape(-1, *[1] * (said.ndim - 1)), dropped, said)

        conditioning = jax.tree.map(heard, empty, rows.conditioning)
        params = assemble(model, trained, frozen)
        if encoders:
            said = jax.tree.map(heard, empty_ids, rows.ids)
            conditioning = family.encode_anew(encoders, params, said, conditioning, apply=apply)
        rows = rows._replace(conditioning=conditioning)
        t = density_times(objective, quantiles, mu)
        x = jnp.asarray(family.noised(rows.latents, noise, t))
        leaves = variables(params["transformer"])
        predicted = predict(family, model, leaves, x, rows, t, ids, objective.guidance, apply)
        return velocity_loss(
            predicted, family.target(rows.latents, noise), error_weights(objective, rows, t)
        )

    return loss
