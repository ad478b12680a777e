"""Decoding large pictures tile by tile, with no seams.

Tiles decoded on their own differ at their borders for two reasons: convolutions do not see past the
edge, and every GroupNorm takes its statistics from the tile. Here tiles overlap, and all tiles
share one set of statistics, those of the whole picture, found in a few passes: each pass measures
every layer with the statistics of the pass before, so layer after layer becomes exact. The middle
block, whose attention sees all latents, runs untiled: it works at the size of the latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.config import ConfigError
from fluxjax.models.autoencoder import Autoencoder, GroupNorm

Statistics = dict[str, tuple[Any, Any]]  # layer -> (mean, variance), each (b, groups)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of `tile` begin so that neighbours share at least `overlap`."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _weights(starts: list[int], tile: int, length: int) -> Float[np.ndarray, "tiles tile"]:
    """What each tile contributes along one side; over all tiles it adds up to 1 at every place.

    One tile gives way to the next in the middle quarter of their overlap: the rest of it is what
    the convolutions see past the edge.
    """
    weights = np.ones((len(starts), tile), np.float32)
    for i, (left, right) in enumerate(itertools.pairwise(starts)):
        shared = left + tile - right
        ramp = np.clip((np.arange(shared, dtype=np.float32) + 0.5) / shared * 4 - 1.5, 0, 1)
        weights[i, tile - shared :] *= 1 - ramp
        weights[i + 1, :shared] *= ramp
    return weights


def _moments(x: Array, weight: tuple[Array, Array], groups: int) -> tuple[Array, Array]:
    """Weighted sums over pixels of x and x^2, per group: (b, groups) each."""
    b, h, w, c = x.shape
    # The weights are given per latent; features may be finer.
    rows = jnp.repeat(weight[0], h // weight[0].shape[0])
    columns = jnp.repeat(weight[1], w // weight[1].shape[0])
    area = (rows[:, None] * columns[None, :])[None, :, :, None]
    x = x.astype(jnp.float32)

    def total(values: Array) -> Array:
        return (values * area).sum((1, 2)).reshape(b, groups, c // groups).mean(-1)

    # Scaled to the whole tile's pixels per latent, so that sums over tiles are means.
    return total(x) / (h * w), total(jnp.square(x)) / (h * w)


def _sharing(
    statistics: Statistics | None, weight: tuple[Array, Array], seen: Statistics
) -> Callable[..., Any]:
    """An interceptor for GroupNorm: measures into `seen`, normalises with `statistics`."""

    def intercept(call, args, kwargs, context):
        norm = context.module
        if not isinstance(norm, GroupNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        x, name = args[0], "/".join(norm.path)
        seen[name] = _moments(x, weight, norm.groups)
        if statistics is None:
            return call(*args, **kwargs)
        each = x.shape[-1] // norm.groups
        mean, var = (jnp.repeat(v, each, axis=1)[:, None, None] for v in statistics[name])
        scale, bias = (
            norm.get_variable("params", k).astype(jnp.float32) for k in ("scale", "bias")
        )
        gain = jax.lax.rsqrt(var + 1e-6) * scale[None, None, None]
        shift = bias[None, None, None] - mean * gain
        return (x.astype(jnp.float32) * gain + shift).astype(norm.dtype)

    return intercept


@partial(jax.jit, static_argnames="model")
def _middle(model: Autoencoder, params: Any, latents: Array) -> Any:
    return model.apply({"params": params}, latents, method=model.decode_middle)


@partial(jax.jit, static_argnames="model")
def _tiles(
    model: Autoencoder, params: Any, features: Array, weight: Any, statistics: Statistics | None
) -> tuple[Any, Statistics]:
    """Pictures of several tiles, each with its weights, and the sum of their moments."""

    def one(features, weight):
        seen: Statistics = {}
        with nn.intercept_methods(_sharing(statistics, weight, seen)):
            picture = model.apply({"params": params}, features, method=model.decode_up)
        return picture, seen

    pictures, seen = jax.vmap(one)(features, weight)
    return pictures, jax.tree.map(lambda moment: moment.sum(0), seen)


def decode_tiled(
    model: Autoencoder,
    params: Any,
    latents: Float[Array | np.ndarray, "b h w c"],
    *,
    tile: int = 64,
    passes: int = 4,
    together: int = 1,
    spread: Callable[[Array], Array] = lambda tiles: tiles,
) -> Float[np.ndarray, "b height width 3"]:
    """`Autoencoder.decode` of latents of any size, holding one tile's features at a time.

    `tile` is a tile's side in latents, of which neighbours share at least a quarter,
    `passes` how often the statistics are measured. At tile 32 the embedded model is within
    0.4 / 255 of `decode` after 4 passes and 0.001 / 255 after 9; smaller tiles are less than what
    the convolutions see. Raises ConfigError for a tile below 8.
    """
    if tile < 8:
        raise ConfigError(f"a tile needs at least 8 latents a side, got {tile}")
    b, h, w, _ = latents.shape
    shared = round(tile / 4)
    sides = min(tile, h), min(tile, w)
    tops, lefts = _starts(h, sides[0], shared), _starts(w, sides[1], shared)
    rows, columns = _weights(tops, sides[0], h), _weights(lefts, sides[1], w)
    features = _middle(model, params, latents)
    places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
    groups = [places[i : i + together] for i in range(0, len(places), together)]

    def decode(group: list, statistics: Statistics | None) -> tuple[Array, Statistics]:
        missing = together - len(group)
        full = group + group[-1:] * missing
        cut = jnp.stack(
            [
                features[:, tops[i] : tops[i] + sides[0], lefts[j] : lefts[j] + sides[1]]
                for i, j in full
            ]
        )
        weight = np.stack([rows[i] for i, _ in full]), np.stack([columns[j] for _, j in full])
        weight[0][len(group) :] = 0  # what fills up the last group is not measured
        return _tiles(model, params, spread(cut), weight, statistics)

    statistics: Statistics | None = None
    part = sides[0] * sides[1] / (h * w)  # one tile's area in the picture's
    for _ in range(passes if len(places) > 1 else 0):
        sums: Any = None
        for group in groups:
            seen = jax.device_get(decode(group, statistics)[1])
            sums = seen if sums is None else jax.tree.map(np.add, sums, seen)
        statistics = {
            name: (mean * part, square * part - np.square(mean * part))
            for name, (mean, square) in sums.items()
        }
    scale = model.config.scale
    picture = np.zeros((b, h * scale, w * scale, model.config.out_channels), np.float32)
    for group in groups:
        pieces = np.asarray(decode(group, statistics)[0], np.float32)
        for (i, j), piece in zip(group, pieces, strict=False):
            area = np.outer(np.repeat(rows[i], scale), np.repeat(columns[j], scale))
            top, left = tops[i] * scale, lefts[j] * scale
            height, width = area.shape
            picture[:, top : top + height, left : left + width] += piece * area[None, :, :, None]
    return picture
