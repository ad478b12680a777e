"""What a run is judged by while it goes on: fixed prompts and seeds, fixed timesteps and noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.families.family import AnyArray, Apply, Conditioning, Told
from fluxjax.models.lora import variables
from fluxjax.parallel.mesh import batch_sharding, gathered
from fluxjax.picture_sheet import picture_sheet
from fluxjax.sample.clip_files import still_pixels, usual_suffix, write_clip
from fluxjax.sample.controls import ControlInput
from fluxjax.sample.decoding import without_first
from fluxjax.sample.override import override
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.pipeline import Pipeline
from fluxjax.sample.settings import Settings
from fluxjax.train.flow_matching import CONTROLNET, Rows, fixed_loss
from fluxjax.train.given_clips import with_first_frames
from fluxjax.train.settings import Objective, ValidationSettings
from fluxjax.train.step import Tree
from fluxjax.train.trained_networks import TrainedNetworks


class Prompts(NamedTuple):
    """What encoders that do not learn say of prompts, and what those that learn read of them."""

    conditioning: Conditioning
    ids: Any
    """None where no text encoder learns."""


class Validation:
    """Draws and measures; the same again gives the same numbers and pictures."""

    def __init__(
        self,
        pipeline: Pipeline,
        nets: TrainedNetworks,
        settings: ValidationSettings,
        objective: Objective,
        mesh: Mesh,
        *,
        batches: Sequence[tuple[Rows, Float[Array, "*image axes"] | None, Float[Array, ""]]],
        prompts: Prompts | None,
        empty: Prompts,
        shown: Inputs,
        seed: int,
        apply: Apply = nn.Module.apply,
    ) -> None:
        """`pipeline` draws; `batches` are (rows, positions, mu); what is `shown` is that of the
        prompts, and `empty` what a model of two passes is guided away from."""
        self.pipeline, self.model = pipeline, nets.model
        self.settings, self.objective = settings, objective
        self.mesh, self.batches, self.seed = mesh, batches, jnp.int32(seed)
        self._apply, self._encoders = apply, nets.encoders
        self._controlnet = nets.controlnet
        self._prompts, self._shown, self._empty = prompts, shown, empty
        if nets.encoders:
            anew = pipeline.family.encode_anew
            assert anew is not None
            self._heard = jax.jit(partial(anew, nets.encoders, apply=apply))

    def _conditioning(self, params: Tree, prompts: Prompts) -> Conditioning:
        """What text encoders say now."""
        if not self._encoders:
            return prompts.conditioning
        mine = {name: params[name] for name in self._encoders}
        return self._heard(mine, prompts.ids, prompts.conditioning)

    def _nothing(self, params: Tree) -> Conditioning:
        """What is heard where there is no prompt."""
        if self.pipeline.config.force_zeros_for_empty_prompt:
            return self._empty.conditioning
        return _on_hosts(self._conditioning(params, self._empty))

    def loss(self, params: Tree) -> float:
        """Mean over the batches; timesteps are the evenly spaced quantiles of the density. `params`
        as of `flow_matching.assemble`."""
        values = []
        total = sum(rows.index.shape[0] for rows, _, _ in self.batches)
        first = 0
        for rows, ids, mu in self.batches:
            count = rows.index.shape[0]
            # A stride through the quantiles, so that each batch has small and large ones.
            order = (np.arange(first, first + count) * _stride(total)) % total
            quantiles = ((order + 0.5) / total).astype(np.float32)
            first += count
            placed = self._place(quantiles)
            conditioning = self._conditioning(params, Prompts(rows.conditioning, rows.ids))
            value = fixed_loss(
                self.pipeline.family,
                self.pipeline.family.path(self.pipeline.config),
                self.model,
                self.objective,
                variables(params[self.pipeline.config.denoiser]),
                rows._replace(conditioning=conditioning, ids=None),
                placed,
                self.seed,
                ids,
                mu,
                self._apply,
                self._controlnet,
                params.get(CONTROLNET),
            )
            values.append(value)
        return float(np.mean(jax.device_get(values)))

    @property
    def _chosen(self) -> Settings:
        """In float32 and without the rounding of a sampler, whatever the network computes in."""
        asked = self.settings
        size = {name: getattr(asked, name) for name in ("width", "height", "frames", "guidance")}
        changed = {**size, "size_bins": False, "rounding": "none"}
        return override(self.pipeline.defaults, changed)

    def latents(self, params: Tree) -> Float[AnyArray, "n c *size"]:
        """Of a row per prompt and a column per seed; `params` as of `loss`."""
        assert self._prompts is not None
        asked, pipeline = self.settings, self.pipeline
        heard = _on_hosts(self._conditioning(params, self._prompts))
        prompts, columns = len(heard.sequence), len(asked.seeds)
        states, shown = jax.tree.map(
            lambda x: np.repeat(np.asarray(x), columns, axis=0), (heard, self._shown)
        )
        chosen = self._chosen
        noise = pipeline.draw_noise(chosen, [*asked.seeds] * prompts, prompts * columns)
        denoiser, family = pipeline.config.denoiser, pipeline.family
        pipeline.use(denoiser, params[denoiser])
        if CONTROLNET in params:
            pipeline.use("controlnets", (params[CONTROLNET],))
            assert shown.channels is not None, "validation.controls are one for each prompt"
            mode = self._controlnet and self._controlnet.mode
            seen = ControlInput(shown.channels.astype(pipeline.dtype), mode)
            shown = shown._replace(channels=None, controls=(seen,))
        given = frozenset() if shown.channels is None else frozenset({"reference"})
        guided = chosen.asked_guidance._replace(pictures=given)
        scale = family.scale(pipeline.config, guided)
        negative = None if scale is None else _repeated(self._nothing(params), prompts * columns)
        sizes = family.sizes(pipeline.config, Told((chosen.width, chosen.height)))
        if sizes is not None:
            sizes = np.tile(sizes, (prompts * columns, 1))
            states = states._replace(sizes=sizes)
            negative = negative and negative._replace(sizes=sizes)
        latents = pipeline.denoise(
            states,
            noise,
            steps=asked.steps,
            guidance=chosen.guidance,
            negative=negative,
            true_cfg=scale or 1.0,
            inputs=shown,
        )
        put_back = pipeline.config.tiling is not None and not pipeline.config.dropped_frames
        if put_back and shown.channels is not None:
            return with_first_frames(latents, shown.channels)
        return latents

    def _place(self, x: np.ndarray) -> Array:
        where = batch_sharding(self.mesh)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    def save(self, params: Tree, path: Path) -> None:
        """The pictures, or the middle frames of clips, on one sheet, which replaces the file; clips
        beside it. Process 0 writes."""
        from PIL import Image

        latents = self.latents(params)
        if self._chosen.frames > 1:
            drawn = self._save_clips(latents, path)
        else:
            pictures = to_bytes(self.pipeline.decode(latents))
            drawn = pictures if pictures.ndim == 4 else pictures[:, 0]
        if jax.process_index() == 0:
            sheet = picture_sheet(drawn, columns=len(self.settings.seeds))
            with whole_or_nothing(path) as part:
                Image.fromarray(sheet).save(part, format="PNG")

    def _save_clips(self, latents: Any, path: Path) -> list[UInt8[np.ndarray, "height width 3"]]:
        """Each as `sample` writes it; returns the middle frames."""
        decode, chosen = self.pipeline.clip_decoder(), self._chosen
        dropped = self.pipeline.config.dropped_frames
        middle = []
        for number in range(len(latents) if jax.process_index() == 0 else 0):
            prompt, column = divmod(number, len(self.settings.seeds))
            stem = f"{path.stem}-{prompt + 1}-seed{self.settings.seeds[column]}"
            for old in [*path.parent.glob(f"{stem}.*"), *path.parent.glob(f"{stem}-*.png")]:
                old.unlink()
            groups = without_first(dropped, decode(latents[number : number + 1]))
            size: Any = {"fps": chosen.fps, "frames": chosen.frames - dropped}
            file = path.with_name(stem + usual_suffix())
            middle.append(still_pixels(write_clip(file, map(_one_clip, groups), **size)[2]))
        return middle


def _one_clip(
    group: Float[np.ndarray, "1 t height width 3"],
) -> UInt8[np.ndarray, "t height width 3"]:
    return to_bytes(group)[0]


def _on_hosts(heard: Conditioning) -> Conditioning:
    return jax.tree.map(lambda x: gathered(x) if isinstance(x, jax.Array) else x, heard)


def _repeated(one: Conditioning, count: int) -> Conditioning:
    return jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), count, axis=0), one)


def _stride(total: int) -> int:
    """A number near the golden section of `total` that shares no factor with it."""
    step = max(1, round(total * 0.618))
    while np.gcd(step, total) != 1:
        step += 1
    return step
