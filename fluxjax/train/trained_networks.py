"""What learns in a run, and what it is laid over: networks, their weights and their LoRAs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fluxjax.checkpoint.source import open_component
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import ConfigError, LoraConfig, PipelineConfig
from fluxjax.config.lora import components_of
from fluxjax.families import family_of
from fluxjax.models.lora import init_lora, matches, split_scales, with_magnitudes
from fluxjax.models.names import flatten, is_stacked, published_name, unflatten
from fluxjax.models.stacking import scan_by_default
from fluxjax.networks import network_of
from fluxjax.parallel.rules import param_shardings, shardings_by_component, state_shardings
from fluxjax.quantised_kinds import NONE
from fluxjax.train.flow_matching import ControlLearner
from fluxjax.train.learnt_controlnet import initial_controlnet, learnt_mode
from fluxjax.train.lora_start import LoraStart, given_trees, started, with_products
from fluxjax.train.recipe import FinetuneRecipe
from fluxjax.train.step import TrainState, Tree, init_state
from fluxjax.train.wider_input import added_inputs, widen


class TrainedNetworks(NamedTuple):
    """The modules that a step runs. `encoders`: text encoders that learn, by component.

    `trained`: LoRAs by component over `frozen["params"]`, without `frozen["scales"]`, both by
    component too; or all of the network that draws, or of its modules those that learn, where
    `frozen["rest"]` is what does not, by component where encoders learn whole; or all of
    `controlnet`, beside `frozen["base"]`.
    """

    model: nn.Module
    encoders: dict[str, nn.Module]
    frozen: dict[str, Tree]
    trained: Tree
    controlnet: ControlLearner | None = None


def load_networks(
    recipe: FinetuneRecipe,
    base: PipelineConfig,
    config: PipelineConfig,
    mesh: Mesh,
    start: LoraStart,
) -> TrainedNetworks:
    """On the mesh. `base`: what the model is before training, perhaps with fewer inputs."""
    lora, dtype = recipe.method == "lora", recipe.compute_dtype
    name = config.denoiser
    before, after = base.networks[name], config.networks[name]
    stacked = scans(config)
    stored = jnp.dtype("float32") if recipe.method == "full" else dtype
    model, controlnets = family_of(config.class_name).networks(
        config,
        "diffusers",
        dtype=dtype,
        param_dtype=stored,
        scan_layers=stacked,
        remat=recipe.remat,
        attention=recipe.attention,
        precision=recipe.precision,
    )
    network = started(open_component(recipe.model_folder, name, before), start)
    before = network.config  # a file that training goes on from may have widened it
    kind = recipe.quantise if lora else NONE
    template, _ = network.template(stacked=stacked, quantise=kind)
    network.require_codes(template, kind)
    where = param_shardings(before, template, mesh)
    params = network.fill(template, dtype=stored, shardings=where)
    params = widen(params, before, after)
    if controlnets:
        (net,) = config.controlnets
        trained = initial_controlnet(recipe.controlnet, net, params, mesh, stacked=stacked)
        learner = ControlLearner(controlnets[0], learnt_mode(recipe.controlnet, net))
        return TrainedNetworks(model, {}, {"base": params}, trained, learner)
    bases, encoders = {name: params}, dict[str, nn.Module]()
    heard = recipe.lora.components_of(config) if lora else {}
    for component in heard or components_of(recipe.text_encoders, config, "text_encoders"):
        if component == name:
            continue
        of = config.networks[component]
        template = abstract_params(of, stacked=stacked)
        opened = started(open_component(recipe.model_folder, component, of), start)
        bases[component] = opened.fill(
            template, dtype=stored, shardings=param_shardings(of, template, mesh)
        )
        fields = {"dtype": dtype, "param_dtype": stored, "remat": recipe.remat != "none"}
        encoders[component] = network_of(of).build(of, scan_layers=stacked, **fields)
    if not lora:
        trained, rest = apart(params, recipe.modules, network_of(after).unlearnt)
        if encoders:
            trained = {**bases, name: trained}
        return TrainedNetworks(model, encoders, {"rest": rest} if rest else {}, trained)
    added, given = added_inputs(before, after), given_trees(start, config, stacked=stacked)

    def begin(given: dict[str, Tree]) -> tuple[Tree, Tree]:
        trained, scales = initial_loras(
            recipe.lora, config, recipe.seed, stacked=stacked, added=added
        )
        begun = {n: with_products(trained[n], scales[n], given[n]) for n in given}
        return trained | begun, scales

    where = shardings_by_component(config.networks, jax.eval_shape(begin, given), mesh)
    trained, scales = jax.jit(begin, out_shardings=where)(given)
    if recipe.lora.kind == "dora":

        def with_norms(trained: Tree, bases: Tree) -> Tree:
            return {name: with_magnitudes(trained[name], bases[name]) for name in trained}

        trained = jax.jit(with_norms, out_shardings=where[0])(trained, bases)
    return TrainedNetworks(model, encoders, {"params": bases, "scales": scales}, trained)


def scans(config: PipelineConfig) -> bool:
    """Whether the network that draws has its blocks stacked."""
    network = network_of(config.networks[config.denoiser])
    blocks = network.blocks(config.networks[config.denoiser])
    return bool(network.scanned) and scan_by_default(blocks)


def apart(params: Tree, modules: Sequence[str], unlearnt: str = "") -> tuple[Tree, Tree]:
    """(what learns, what does not) of a network's parameters: the modules that are meant by
    `modules`, as LoRA's targets are, with all that is in them; without any, all. What is `unlearnt`
    (see `Network`) never learns.

    Raises ConfigError naming those that mean no module, or some of what is stacked.
    """
    if not modules and not unlearnt:
        return params, {}
    trained, rest, unused = {}, {}, set(modules)
    for path, leaf in flatten(params).items():
        layers = range(leaf.shape[0]) if is_stacked(path) else (None,)
        names = [published_name(path, layer) for layer in layers]
        hits = [{one for one in modules if _within(one, name)} for name in names]
        unused = unused.difference(*hits)
        if re.fullmatch(unlearnt, names[0]):
            rest[path] = leaf
            continue
        if any(hits) and not all(hits):
            raise ConfigError(
                f"modules names some layers of {names[0]}, and layers that are stacked learn "
                "together"
            )
        (trained if all(hits) or not modules else rest)[path] = leaf
    if unused:
        names = ", ".join(map(repr, sorted(unused)))
        raise ConfigError(f"no module of the model is meant by modules = [{names}]")
    return unflatten(trained), unflatten(rest)


def _within(module: str, name: str) -> bool:
    """Whether the parameter `name` lies in a module that is meant."""
    parts = name.split(".")
    return any(matches(module, ".".join(parts[:end])) for end in range(1, len(parts)))


def initial_loras(
    lora: LoraConfig,
    config: PipelineConfig,
    seed: int,
    *,
    stacked: bool,
    added: Mapping[str, int],
) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """What is trained and the scales, by component. `added`: the new inputs of what draws."""
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 2)
    trained, scales = {}, {}
    for component, own in lora.components_of(config).items():
        abstract = abstract_params(config.networks[component], stacked=stacked)
        new = added if component == config.denoiser else {}
        trained[component], scales[component] = split_scales(init_lora(key, abstract, own, new))
    return trained, scales


def initial_state(
    config: PipelineConfig,
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
        learns = config.controlnets or (config.networks[config.denoiser],)
        where = state_shardings(learns[0], shapes, mesh)
    return jax.jit(start, out_shardings=where, donate_argnums=0)(trained)
