"""Low-rank adapters (LoRA): trees beside the parameter tree, read by `fluxjax.models.dense.Dense`
and `fluxjax.models.convolution.Convolution`.

A LoRA tree has the form (stacked or per block) of the parameters it adapts; where those have a
`kernel` (in, out) it may have `a` (in, rank), `b` (rank, out) and a scalar `scale`, all with the
leading layer axis of a stacked kernel; `a` of a convolution is one to `rank` channels: (height,
width, in, rank). Layers that are not adapted have scale 0. A scale may also
be (pictures, rank), of a batch whose pictures have adapters of their own. DoRA has `magnitude`
(out,) too. LoKr has `w1` and, by `w2` or by `a` and `b`, a second matrix: the kernel of their
Kronecker product is added.

    model.apply({"params": params, "lora": lora}, ...)

Source: Hu et al. 2021, LoRA; names, defaults and initial values are PEFT's, of LoKr LyCORIS'.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fluxjax.config import ConfigError, LoraConfig
from fluxjax.models.dense import COLLECTION
from fluxjax.models.names import flatten, is_stacked, module_name, unflatten
from fluxjax.models.quantised import Quantised, decode
from fluxjax.shapes import Params


class Site(NamedTuple):
    """A kernel: where it is, the published name of each of its layers, (in, out), and (height,
    width) of a convolution's."""

    module: tuple[str, ...]
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, int]
    window: tuple[int, ...] = ()


def adapter_sites(params: Params) -> Iterator[Site]:
    """Every kernel of a tree of arrays or ShapeDtypeStructs that low-rank adapters may be beside:
    of dense layers, and of convolutions of pictures."""
    for path, leaf in flatten(params).items():
        if path[-1] != "kernel":
            continue
        stacked = is_stacked(path)
        *window, fan_in, out = leaf.shape[stacked:]
        if len(window) not in (0, 2):
            continue
        layers = range(leaf.shape[0]) if stacked else (None,)
        names = tuple(module_name(path[:-1], layer) for layer in layers)
        yield Site(path[:-1], names, stacked, (fan_in, out), tuple(window))


def dense_sites(params: Params) -> Iterator[Site]:
    """Those of dense layers."""
    return (site for site in adapter_sites(params) if not site.window)


def matches(target: str, name: str) -> bool:
    """Whether a module is meant by one of `LoraConfig.targets`, as PEFT matches them."""
    return re.fullmatch(rf"(?:.*\.)?(?:{target})", name) is not None


def init_lora(
    key: jax.Array, params: Params, config: LoraConfig, added: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """A float32 LoRA that changes nothing yet: `a` is Kaiming-uniform as in PEFT, `b` is zero.

    Only the shapes of `params` are read. Each module's values depend on the key and its name alone.
    A DoRA's magnitudes are 1 until `with_magnitudes`.
    `added`: modules that have got so many inputs behind those they had, by published name. Their
    adapters have that rank, and begin with `a` reading the new inputs alone, each for itself.
    Raises ConfigError naming the targets that are no modules of `params`.
    """
    flat: dict[tuple[str, ...], Any] = {}
    unused = set(config.targets)
    for site in dense_sites(params):
        hits = [{t for t in config.targets if matches(t, name)} for name in site.names]
        unused = unused.difference(*hits)
        if new := (added or {}).get(site.names[0]):
            flat |= _of_new_inputs(site, new)
            continue
        if not any(hits):
            continue
        fan_in, features = site.shape
        keys = jnp.stack(
            [jax.random.fold_in(key, zlib.crc32(name.encode())) for name in site.names]
        )
        scale, leaves = config.alpha / config.rank, {}
        if config.kind == "lokr":
            leaves = _lokr_leaves(keys, site.shape, config)
            scale = 1.0 if "w2" in leaves else scale
        else:
            leaves["a"] = _uniform(keys, (fan_in, config.rank))
            leaves["b"] = jnp.zeros((len(hits), config.rank, features))
        if config.kind == "dora":
            leaves["magnitude"] = jnp.ones((len(hits), features))
        leaves["scale"] = jnp.asarray([scale if hit else 0.0 for hit in hits])
        for name, leaf in leaves.items():
            flat[*site.module, name] = leaf if site.stacked else leaf[0]
    if unused:
        names = ", ".join(map(repr, sorted(unused)))
        raise ConfigError(f"no dense layer of the model is meant by the LoRA's target(s) {names}")
    return unflatten(flat)


def _of_new_inputs(site: Site, new: int) -> dict[tuple[str, ...], jax.Array]:
    fan_in, features = site.shape
    leaves = {
        "a": jnp.eye(fan_in, new, k=new - fan_in),
        "b": jnp.zeros((new, features)),
        "scale": jnp.ones(()),
    }
    return {(*site.module, name): leaf for name, leaf in leaves.items()}


def _lokr_leaves(
    keys: jax.Array, shape: tuple[int, int], config: LoraConfig
) -> dict[str, jax.Array]:
    (i1, i2), (o1, o2) = (factors(size, config.factor) for size in shape)
    leaves = {"w1": _uniform(keys, (i1, o1))}
    if 2 * config.rank > max(i2, o2):
        return leaves | {"w2": jnp.zeros((len(keys), i2, o2))}
    inner = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    zero = jnp.zeros((len(keys), config.rank, o2))
    return leaves | {"a": _uniform(inner, (i2, config.rank)), "b": zero}


def factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers with that product, the smaller first: `factor` and the rest where that divides
    it, else as near to each other as `factor` lets them be; -1 is any. As LyCORIS chooses them."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    largest = size if factor < 0 else factor
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= largest)
    return small, size // small


def with_magnitudes(lora: Params, params: Params) -> dict[str, Any]:
    """A DoRA whose magnitudes are the norms of the weights, so that it changes nothing yet."""
    flat, kernels = flatten(lora), flatten(params)
    for path in flat:
        if path[-1] == "magnitude":
            kernel = kernels[*path[:-1], "kernel"]
            kernel = decode(kernel).swapaxes(-1, -2) if isinstance(kernel, Quantised) else kernel
            norms = jnp.linalg.norm(kernel.astype(flat[path].dtype), axis=-2)
            flat = {**flat, path: norms}
    return unflatten(flat)


def _uniform(keys: jax.Array, shape: tuple[int, int]) -> jax.Array:
    bound = 1 / math.sqrt(shape[0])
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound))(keys)


def combine_loras(loras: Sequence[tuple[Params, float]]) -> dict[str, Any]:
    """One LoRA with the effect of several, each times its factor: their ranks are concatenated.

    They may adapt different modules; all have the form (stacked or per block) of one model.
    """
    if len(loras) == 1:
        tree, factor = loras[0]
        flat = flatten(tree)
        return unflatten({p: v * factor if p[-1] == "scale" else v for p, v in flat.items()})
    parts: dict[tuple[str, ...], list[tuple[Mapping[str, Any], float]]] = {}
    for tree, factor in loras:
        flat = flatten(tree)
        for module in dict.fromkeys(path[:-1] for path in flat):
            leaves = {name: flat[*module, name] for name in ("a", "b", "scale")}
            parts.setdefault(module, []).append((leaves, factor))
    joined: dict[tuple[str, ...], Any] = {}
    for module, members in parts.items():
        scaled = [m["b"] * jnp.asarray(m["scale"] * f)[..., None, None] for m, f in members]
        joined[*module, "a"] = jnp.concatenate([m["a"] for m, _ in members], axis=-1)
        joined[*module, "b"] = jnp.concatenate(scaled, axis=-2)
        joined[*module, "scale"] = jnp.ones_like(jnp.asarray(members[0][0]["scale"]))
    return unflatten(joined)


def split_scales(lora: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained, and the scales, which no optimiser should see."""
    flat = flatten(lora)
    trained = {path: leaf for path, leaf in flat.items() if path[-1] != "scale"}
    scales = {path: leaf for path, leaf in flat.items() if path[-1] == "scale"}
    return unflatten(trained), unflatten(scales)


def join_scales(trained: Params, scales: Params) -> dict[str, Any]:
    """The inverse of `split_scales`."""
    return unflatten(flatten(trained) | flatten(scales))


def adapt(params: Params, lora: Params | None) -> Params:
    """Parameters together with a LoRA, for functions that pass them on to `variables`."""
    return params if lora is None else {"params": params, COLLECTION: lora}


def variables(params: Params) -> Params:
    """What `Module.apply` takes, of parameters with or without a LoRA (see `adapt`)."""
    return params if COLLECTION in params else {"params": params}


def stack_passes(params: Params, passes: int) -> Params:
    """With scales that are of pictures (see `adapt`) for so many passes, stacked in the batch."""
    return _of_pictures(params, lambda scale: jnp.concatenate([scale] * passes, axis=-2))


def first_pass(params: Params, passes: int = 2) -> Params:
    """Of what `stack_passes` gives, the part of the first pass."""
    return _of_pictures(params, lambda scale: scale[..., : scale.shape[-2] // passes, :])


def _of_pictures(params: Params, change: Callable[[Any], Any]) -> Params:
    """With scales changed that are of pictures."""
    if COLLECTION not in params:
        return params
    flat = {
        path: change(leaf) if path[-1] == "scale" and leaf.ndim >= 2 else leaf
        for path, leaf in flatten(params[COLLECTION]).items()
    }
    return {**params, COLLECTION: unflatten(flat)}
