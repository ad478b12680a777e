"""Long and large clips through an autoencoder, one tile after the other.

Tiles overlap and are coded on their own, as PyTorch's codes do it. Along each axis a tile fades in
over what it shares with the one before: rows first, then columns, then frames, each neighbour as it
is after its own blending. Memory holds the features of one tile on each device, the pixels of one
tile's frames, and nothing that grows with the number of frames.

An autoencoder here has a configuration with `spatial_compression_ratio`,
`temporal_compression_ratio` and `first_frame`, and methods `encode_tile` and `decode`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from fluxjax.config import ConfigError
from fluxjax.config.tiling import Tiles, Tiling


class OneDevice(NamedTuple):
    """Where tiles are coded; `parallel.tiles.EachDevice` is the same for many."""

    def __call__(self, tiles: np.ndarray) -> Any:
        """Several tiles, one after the other along the batch, put there."""
        return tiles

    def code(self, function: Callable[[Any, Any], Any], params: Any, tiles: Any) -> Any:
        """`function(params, tiles)`, in a compiled program."""
        return function(params, tiles)


ONE_DEVICE = OneDevice()


class Cut(NamedTuple):
    """One tile along one axis. `start`, `stop`: of what goes in. Of what comes out, the first
    `dropped` are the tile before's, and the next `kept` (None: all) stay."""

    start: int
    stop: int
    dropped: int = 0
    kept: int | None = None

    @property
    def taken(self) -> slice:
        return slice(self.start, self.stop)


class Cuts(NamedTuple):
    """All tiles along one axis, and how much of what comes out two of them share."""

    tiles: list[Cut]
    shared: int = 0


@partial(jax.jit, static_argnames=("model", "method", "spread"))
def _run(model: Any, method: str, spread: Any, params: Any, tiles: Array) -> Array:
    def code(params: Any, tiles: Array) -> Array:
        return model.apply({"params": params}, tiles, method=method)

    return spread.code(code, params, tiles)


def decode_groups(
    model: Any,
    params: Any,
    latents: Float[Array | np.ndarray, "b t h w c"],
    tiling: Tiling,
    *,
    together: int = 1,
    spread: Any = ONE_DEVICE,
) -> Iterator[Float[np.ndarray, "b frames height width 3"]]:
    """`model.decode`, tile by tile: groups of the clip's frames in their order, in float32.

    `latents` are those of `model.decode`. `together`: tiles that run at once where `spread` puts
    them, see `parallel.tiles.tiles_on`. Raises ConfigError for tiles that are no whole latents.
    """
    _, t, h, w, _ = latents.shape
    axes = decode_cuts(model.config, (t, h, w), tiling)
    run = partial(_run, model, "decode", spread, params)
    yield from _groups(run, np.asarray(latents), axes, together, spread)


def decode_cuts(config: Any, latents: tuple[int, ...], tiling: Tiling) -> tuple[Cuts, Cuts, Cuts]:
    """How an autoencoder of that configuration decodes so many frames, rows and columns."""
    t, h, w = latents
    space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
    frames = _cuts("frames", t, tiling.frames, time, 1, config.first_frame)
    return frames, *_space_cuts(h, w, tiling, space, 1)


def decode_tiled(
    model: Any,
    params: Any,
    latents: Float[Array | np.ndarray, "b t h w c"],
    tiling: Tiling,
    **options: Any,
) -> Float[np.ndarray, "b frames height width 3"]:
    """All of `decode_groups`, whose options these are."""
    return np.concatenate(list(decode_groups(model, params, latents, tiling, **options)), axis=1)


def encode_tiled(
    model: Any,
    params: Any,
    clip: Float[Array | np.ndarray, "b frames height width 3"],
    tiling: Tiling,
    *,
    together: int = 1,
    spread: Any = ONE_DEVICE,
) -> Float[np.ndarray, "b t h w code"]:
    """`model.encode_tile` of a clip of any size, the tiles' results blended, in float32.

    Options and errors are those of `decode_groups`.
    """
    config = model.config
    space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
    _, t, h, w, _ = clip.shape
    frames = _cuts("frames", t, tiling.frames, 1, time, config.first_frame)
    rows, columns = _space_cuts(h, w, tiling, 1, space)
    run = partial(_run, model, "encode_tile", spread, params)
    groups = _groups(run, np.asarray(clip), (frames, rows, columns), together, spread)
    return np.concatenate(list(groups), axis=1)


def _space_cuts(
    height: int, width: int, tiling: Tiling, taken: int, given: int
) -> tuple[Cuts, Cuts]:
    """Rows and columns are both cut where either is longer than its tiles."""
    axes = ("rows", height, tiling.rows), ("columns", width, tiling.columns)
    if not any(tiles and length > tiles.size // taken for _, length, tiles in axes):
        return Cuts([Cut(0, height)]), Cuts([Cut(0, width)])
    rows, columns = (_cuts(*axis, taken, given, cut=True) for axis in axes)
    return rows, columns


def _cuts(
    name: str,
    length: int,
    tiles: Tiles | None,
    taken: int,
    given: int,
    first: int = 0,
    cut: bool = False,
) -> Cuts:
    """`taken`, `given`: pixels (or frames) of one place of what goes in and of what comes out.
    `first`: places that the first tile has beyond those, and the others share with the one before.
    `cut`: also if one tile would do."""
    if tiles is None or (length <= tiles.size // taken and not cut):
        return Cuts([Cut(0, length)])
    unit = max(taken, given)
    if tiles.size % unit or tiles.stride % unit:
        raise ConfigError(
            f"tiles of {tiles.size} {name} that begin every {tiles.stride} must both be multiples "
            f"of {unit}, what one latent stands for"
        )
    size, stride, kept = tiles.size // taken + first, tiles.stride // taken, tiles.stride // given
    cuts = [
        Cut(start, min(start + size, length), first if start else 0, kept + (0 if start else first))
        for start in range(0, length, stride)
    ]
    # A last tile of nothing but what is dropped adds nothing.
    return Cuts([one for one in cuts if one.stop - one.start > one.dropped], tiles.overlap // given)


def _groups(
    run: Callable[[Any], Any],
    clip: np.ndarray,
    axes: tuple[Cuts, Cuts, Cuts],
    together: int,
    spread: Any,
) -> Iterator[np.ndarray]:
    """What comes out for each tile of frames, blended and cut to what is kept of it."""
    frames, rows, columns = axes
    area = [(row, column) for row in rows.tiles for column in columns.tiles]
    # As many tiles of frames at once as give every device something to do.
    batches = _in_parts(frames.tiles, max(1, together // len(area)))
    before: np.ndarray | None = None
    for batch in batches:
        places = [(frame, *place) for frame in batch for place in area]
        outputs = _outputs(run, clip, places, together, spread)
        for i, frame in enumerate(batch):
            merged = _merged(outputs[i * len(area) : (i + 1) * len(area)], rows, columns)
            merged = merged[:, frame.dropped :]
            if before is not None:
                _blend(before, merged, frames.shared, axis=1)
            before = merged[:, max(0, merged.shape[1] - frames.shared) :].copy()
            yield merged[:, : frame.kept]


def _outputs(
    run: Callable[[Any], Any],
    clip: np.ndarray,
    places: list[tuple[Cut, Cut, Cut]],
    together: int,
    spread: Any,
) -> list[np.ndarray]:
    """Of each place; tiles of one shape run together, one after the other along the batch."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, place in enumerate(places):
        by_shape.setdefault(tuple(cut.stop - cut.start for cut in place), []).append(index)
    found: dict[int, np.ndarray] = {}
    for indices in by_shape.values():
        for some in _in_parts(indices, together):
            tiles = [clip[:, t.taken, h.taken, w.taken] for t, h, w in (places[i] for i in some)]
            tiles += tiles[-1:] * (together - len(some))
            out = np.array(run(spread(np.concatenate(tiles))), np.float32)
            found |= zip(some, np.split(out, together), strict=False)
    return [found[index] for index in range(len(places))]


def _merged(tiles: list[np.ndarray], rows: Cuts, columns: Cuts) -> np.ndarray:
    """Tiles of the same frames as one clip."""
    lines: list[np.ndarray] = []
    above: list[np.ndarray] = []
    for row, line in zip(rows.tiles, _in_parts(tiles, len(columns.tiles)), strict=True):
        for upper, tile in zip(above, line, strict=False):
            _blend(upper, tile, rows.shared, axis=2)
        for left, tile in itertools.pairwise(line):
            _blend(left, tile, columns.shared, axis=3)
        above = line
        kept = [
            tile[:, :, : row.kept, : column.kept]
            for column, tile in zip(columns.tiles, line, strict=True)
        ]
        lines.append(np.concatenate(kept, axis=3))
    return np.concatenate(lines, axis=2)


def _in_parts(items: list[Any], size: int) -> list[list[Any]]:
    """`size` of them at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _blend(before: np.ndarray, after: np.ndarray, shared: int, axis: int) -> None:
    """The start of `after` becomes a ramp from the end of `before` into itself, in place."""
    length = min(before.shape[axis], after.shape[axis], shared)
    ramp = np.arange(length, dtype=np.float32) / np.float32(max(length, 1))
    ramp = ramp.reshape(-1, *(1,) * (after.ndim - 1 - axis))
    start = after[(slice(None),) * axis + (slice(length),)]
    end = before[(slice(None),) * axis + (slice(before.shape[axis] - length, None),)]
    start[...] = end * (1 - ramp) + start * ramp
