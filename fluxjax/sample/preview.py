"""The picture so far: what the latents of a run promise, without the decoder or with it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.atomic_write import write_bytes, write_new
from fluxjax.config import AutoencoderConfig
from fluxjax.picture_sheet import picture_sheet
from fluxjax.sample.pictures import to_bytes
from fluxjax.terminal import say

if TYPE_CHECKING:
    from fluxjax.sample.pipeline import Pipeline
    from fluxjax.sample.settings import Settings


class LinearMap(NamedTuple):
    """Red, green and blue, nominally in [-1, 1], of each normalised latent."""

    factors: Float[np.ndarray, "c 3"]
    bias: Float[np.ndarray, "3"]

    def __call__(self, latents: Float[Any, "n c h w"]) -> Float[np.ndarray, "n h w 3"]:
        values = np.moveaxis(np.asarray(latents, np.float32), 1, -1)
        return values @ self.factors + self.bias


# Published for FLUX.1's autoencoder. Source: ComfyUI, comfy/latent_formats.py, `Flux`.
FLUX = LinearMap(
    np.array(
        [
            [-0.0346, 0.0244, 0.0681],
            [0.0034, 0.0210, 0.0687],
            [0.0275, -0.0668, -0.0433],
            [-0.0174, 0.0160, 0.0617],
            [0.0859, 0.0721, 0.0329],
            [0.0004, 0.0383, 0.0115],
            [0.0405, 0.0861, 0.0915],
            [-0.0236, -0.0185, -0.0259],
            [-0.0245, 0.0250, 0.1180],
            [0.1008, 0.0755, -0.0421],
            [-0.0515, 0.0201, 0.0011],
            [0.0428, -0.0012, -0.0036],
            [0.0817, 0.0765, 0.0749],
            [-0.1264, -0.0522, -0.1103],
            [-0.0280, -0.0881, -0.0499],
            [-0.1262, -0.0982, -0.0778],
        ],
        np.float32,
    ),
    np.array([-0.0329, -0.0718, -0.0851], np.float32),
)


def is_published(config: AutoencoderConfig) -> bool:
    """Is it FLUX.1's autoencoder, as far as a configuration tells?"""
    return (config.latent_channels, config.scaling_factor, config.shift_factor) == (
        16,
        0.3611,
        0.1159,
    )


def linear_map(pipe: Pipeline) -> LinearMap:
    """The published map for FLUX.1's autoencoder; one fitted to any other's encoder.

    The fit is by least squares on the latents of patches of random colours.
    """
    config = pipe.config.vae
    if pipe.config.tiling is None and is_published(config):
        return FLUX
    rng, rows = np.random.default_rng(0), []
    for patch in (6, 3):  # latents on a side
        colours = rng.uniform(-1, 1, (8, 12 // patch, 12 // patch, 3)).astype(np.float32)
        rows.append(colours.repeat(patch, axis=1).repeat(patch, axis=2))
    cell = np.concatenate(rows)
    pictures = cell.repeat(config.scale, axis=1).repeat(config.scale, axis=2)
    latents = np.moveaxis(np.asarray(pipe.encode_pictures(pictures), np.float32), 1, -1)
    latents = latents.reshape(-1, config.latent_channels)
    inputs = np.concatenate([latents, np.ones((len(latents), 1), np.float32)], axis=1)
    solution = np.linalg.lstsq(inputs, cell.reshape(-1, 3), rcond=None)[0].astype(np.float32)
    return LinearMap(solution[:-1], solution[-1])


class Preview:
    """`on_step` of a run (see `Pipeline.__call__`), which gives what its latents promise.

    That is the picture that, with the same noise, is in the latents of this call and of the last
    one; on a flow the end of the way, were it straight. `show(step, pictures)` gets bytes, in the
    pictures' own size. `decoder`: decode them with the autoencoder in place of the linear map.
    """

    def __init__(
        self,
        pipe: Pipeline,
        settings: Settings,
        seeds: int | Sequence[int],
        show: Callable[[int, UInt8[np.ndarray, "n height width 3"]], None],
        *,
        pictures: int = 1,
        decoder: bool = False,
    ) -> None:
        self._pipe, self._show = pipe, show
        self._map = None if decoder else linear_map(pipe)
        self._last = np.asarray(pipe.begin(settings, seeds, pictures), np.float32)
        run = pipe.run_of(settings)
        left = run.levels[run.schedule.first : run.schedule.steps]
        self._left = np.append(left, [[1.0, 0.0]], axis=0).astype(np.float32)
        self._step = 0

    def __call__(self, step: int, latents: Float[Any, "n c *size"]) -> None:
        (signal, level), (signal_then, level_then) = self._left[step], self._left[self._step]
        here = np.asarray(latents, np.float32)
        between = level_then * signal - level * signal_then
        if between == 0:  # an evaluation that ends where it began
            return
        promised = level_then / between * here - level / between * self._last
        self._last, self._step = here, step
        if self._pipe.config.tiling is not None:
            self._show_middle(step, promised)
            return
        if self._map is None:
            self._show(step, to_bytes(np.asarray(self._pipe.decode(promised), np.float32)))
        else:
            self._show(step, enlarged(to_bytes(self._map(promised)), self._pipe.config.vae.scale))

    def _show_middle(self, step: int, promised: Float[np.ndarray, "n c t h w"]) -> None:
        """Of each clip the frame in its middle."""
        if self._map is None:
            frames = np.asarray(self._pipe.decode(promised), np.float32)
            self._show(step, to_bytes(frames[:, frames.shape[1] // 2]))
        else:
            middle = to_bytes(self._map(promised[:, :, promised.shape[2] // 2]))
            self._show(step, enlarged(middle, self._pipe.config.vae.scale))


def enlarged(
    pictures: UInt8[np.ndarray, "n h w 3"], scale: int
) -> UInt8[np.ndarray, "n height width 3"]:
    """Pictures `scale` times as large on each side, bicubic."""
    from PIL import Image

    size = (pictures.shape[2] * scale, pictures.shape[1] * scale)
    larger = [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in pictures]
    return np.stack([np.asarray(one) for one in larger])


@contextmanager
def preview_file(path: Path) -> Iterator[Callable[[int, UInt8[np.ndarray, "n h w 3"]], None]]:
    """`show` for `Preview`: one file, replaced by each preview, removed at the end of the run.

    The file is NAME.preview.png beside the picture NAME, or the first free NAME.preview-2.png ...
    A disk that is full ends no run: it is said once.
    """
    from PIL import Image

    wanted = path.with_name(f"{path.stem}.preview.png")
    there: list[Path] = []
    failed = False

    def show(step: int, pictures: UInt8[np.ndarray, "n h w 3"]) -> None:
        nonlocal failed
        content = io.BytesIO()
        sheet = pictures[0] if len(pictures) == 1 else picture_sheet(list(pictures))
        Image.fromarray(sheet).save(content, format="PNG")
        try:
            if there:
                write_bytes(there[0], content.getvalue())
            else:
                wanted.parent.mkdir(parents=True, exist_ok=True)
                there.append(write_new(wanted, content.getvalue()))
        except OSError as error:
            if not failed:
                say(f"note: no preview is written: {error}")
            failed = True

    try:
        yield show
    finally:
        for file in there:
            with suppress(OSError):
                file.unlink()


@contextmanager
def previewed(
    pipe: Pipeline, settings: Settings, seeds: Sequence[int], path: Path, *, decoder: bool
) -> Iterator[Preview]:
    """`on_step` for the time of a run of pictures, the first of which will be `path`.

    Every process takes part, the first one writes.
    """
    import jax

    with preview_file(path) as show:
        seen = show if jax.process_index() == 0 else (lambda step, pictures: None)
        yield Preview(pipe, settings, seeds, seen, pictures=len(seeds), decoder=decoder)
