"""A ControlNet that is trained: a copy of the model's first blocks that adds nothing yet.

Source: Zhang et al. 2023; diffusers `FluxControlNetModel.from_transformer`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fluxjax.checkpoint.source import open_network
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import UNION, ConfigError, ControlNetConfig, FluxConfig
from fluxjax.hub import find
from fluxjax.models.names import flatten, is_stacked, unflatten
from fluxjax.parallel.rules import param_shardings
from fluxjax.sample.controls import modes_of
from fluxjax.train.settings import ControlNetSettings
from fluxjax.train.step import Tree


def learnt_controlnet(settings: ControlNetSettings, transformer: FluxConfig) -> ControlNetConfig:
    """What is trained. Raises ConfigError, OSError for a start that will not do."""
    if settings.start:
        net = open_network(find(settings.start, "checkpoint"), "controlnet").config
        net.require_same_model(settings.start, transformer)
        if net.sees_pixels:
            raise ConfigError(f"{settings.start} sees pixels: what is trained sees latents")
        learnt_mode(settings, net)
        return net
    fields = {f.name: getattr(transformer, f.name) for f in dataclasses.fields(transformer)}
    blocks = {"num_layers": settings.layers, "num_single_layers": settings.single_layers}
    for name, wanted in blocks.items():
        if wanted > fields[name]:
            raise ConfigError(f"a ControlNet copies at most {fields[name]} {name}, got {wanted}")
    fields |= {**blocks, "num_mode": UNION.num_mode if settings.mode else 0}
    net = ControlNetConfig(**fields)
    net.require_same_model("controlnet", transformer)
    learnt_mode(settings, net)
    return net


def learnt_mode(settings: ControlNetSettings, net: ControlNetConfig) -> int | None:
    """The number of the one mode that a union learns. Raises ConfigError for a wrong one, and where
    none is named."""
    try:
        (mode,) = modes_of([net], [settings.mode] if settings.mode else None)
    except ConfigError as error:
        raise ConfigError(f"controlnet.mode: {error}") from None
    return mode


def initial_controlnet(
    settings: ControlNetSettings, net: ControlNetConfig, base: Tree, mesh: Mesh, *, stacked: bool
) -> Tree:
    """Weights in float32, on the mesh. `base`: those of the transformer, stacked or not as the
    result. Tokens of modes begin as PyTorch's embeddings do, all else that is new as zeros."""
    template = abstract_params(net, stacked=stacked)
    where = param_shardings(net, template, mesh)
    if settings.start:
        opened = open_network(find(settings.start, "checkpoint"), "controlnet")
        return opened.fill(template, dtype=jnp.dtype("float32"), shardings=where)

    def start(base: Tree) -> Tree:
        theirs = flatten(base)

        def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
            if path[0] == "controlnet_mode_embedder":
                return jax.random.normal(jax.random.key(0), shape)
            if path not in theirs:
                return jnp.zeros(shape)
            found = theirs[path][: shape[0]] if is_stacked(path) else theirs[path]
            return found.astype(jnp.float32)

        each = {path: leaf(path, spec.shape) for path, spec in flatten(template).items()}
        return unflatten(each)

    return jax.jit(start, out_shardings=where)(base)
