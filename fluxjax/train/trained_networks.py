"""What learns in a run, and what it is laid over: networks, their weights and their LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fluxjax.checkpoint.source import open_component
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import FluxPipelineConfig, LoraConfig
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.lora import init_lora, split_scales, with_magnitudes
from fluxjax.models.stacking import scan_by_default
from fluxjax.networks import network_of
from fluxjax.parallel.rules import param_shardings, shardings_by_component, state_shardings
from fluxjax.quantised_kinds import NONE
from fluxjax.train.recipe import FinetuneRecipe
from fluxjax.train.step import TrainState, Tree, init_state
from fluxjax.train.wider_input import added_inputs, widen


class TrainedNetworks(NamedTuple):
    """The modules that a step runs. `encoders`: text encoders that learn, by component.

    `trained`: LoRAs by component over `frozen["params"]`, without `frozen["scales"]`, both by
    component too; or all of the transformer, where nothing is frozen.
    """

    model: FluxTransformer
    encoders: dict[str, nn.Module]
    frozen: dict[str, Tree]
    trained: Tree


def load_networks(
    recipe: FinetuneRecipe, base: FluxPipelineConfig, config: FluxPipelineConfig, mesh: Mesh
) -> TrainedNetworks:
    """On the mesh. `base`: what the model is before training, perhaps with fewer inputs."""
    lora, dtype = recipe.method == "lora", recipe.compute_dtype
    stacked = scan_by_default(network_of(config.transformer).blocks(config.transformer))
    stored = dtype if lora else jnp.dtype("float32")
    model = FluxTransformer(
        config.transformer,
        dtype=dtype,
        param_dtype=stored,
        scan_layers=stacked,
        remat=recipe.remat,
        attention=recipe.attention,
    )
    network = open_component(recipe.model_folder, "transformer", base.transformer)
    template, _ = network.template(stacked=stacked, quantise=recipe.quantise if lora else NONE)
    where = param_shardings(base.transformer, template, mesh)
    params = network.fill(template, dtype=stored, shardings=where)
    params = widen(params, base.transformer, config.transformer)
    if not lora:
        return TrainedNetworks(model, {}, {}, params)
    bases, encoders = {"transformer": params}, dict[str, nn.Module]()
    for component in list(recipe.lora.components)[1:]:
        of = config.networks[component]
        template = abstract_params(of, stacked=stacked)
        bases[component] = open_component(recipe.model_folder, component, of).fill(
            template, dtype=dtype, shardings=param_shardings(of, template, mesh)
        )
        fields = {"dtype": dtype, "param_dtype": dtype, "remat": recipe.remat != "none"}
        encoders[component] = network_of(of).build(of, scan_layers=stacked, **fields)
    added = added_inputs(base.transformer, config.transformer)

    def start() -> tuple[Tree, Tree]:
        return initial_loras(recipe.lora, config, recipe.seed, stacked=stacked, added=added)

    where = shardings_by_component(config.networks, jax.eval_shape(start), mesh)
    trained, scales = jax.jit(start, out_shardings=where)()
    if recipe.lora.kind == "dora":

        def started(trained: Tree, bases: Tree) -> Tree:
            return {name: with_magnitudes(trained[name], bases[name]) for name in trained}

        trained = jax.jit(started, out_shardings=where[0])(trained, bases)
    return TrainedNetworks(model, encoders, {"params": bases, "scales": scales}, trained)


def initial_loras(
    lora: LoraConfig,
    config: FluxPipelineConfig,
    seed: int,
    *,
    stacked: bool,
    added: Mapping[str, int],
) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """What is trained and the scales, by component. `added`: the transformer's new inputs."""
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 2)
    trained, scales = {}, {}
    for component, own in lora.components.items():
        abstract = abstract_params(config.networks[component], stacked=stacked)
        new = added if component == "transformer" else {}
        trained[component], scales[component] = split_scales(init_lora(key, abstract, own, new))
    return trained, scales


def initial_state(
    config: FluxPipelineConfig,
    trained: Tree,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool,
    by_component: bool,
) -> TrainState:
    """On the mesh, as the weights lie; takes the place of `trained`."""

    def start(params: Tree) -> TrainState:
        return init_state(params, optimizer, ema=ema)

    shapes = jax.eval_shape(start, trained)
    if by_component:
        where: Any = shardings_by_component(config.networks, shapes, mesh)
    else:
        where = state_shardings(config.transformer, shapes, mesh)
    return jax.jit(start, out_shardings=where, donate_argnums=0)(trained)
