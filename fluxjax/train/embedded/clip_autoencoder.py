"""Trains a causal KL autoencoder on drawn scenes that move, beginning as one of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from fluxjax.config import TINY, CausalAutoencoderConfig
from fluxjax.models.causal_autoencoder import CausalAutoencoder
from fluxjax.train.embedded.autoencoder import psnr, reconstruct
from fluxjax.train.embedded.moving_reader import read_clip, score_clip
from fluxjax.train.embedded.moving_scenes import render_clips, sample_moving_scenes
from fluxjax.train.loop import Hooks, Run, RunSettings
from fluxjax.train.objectives import autoencoder_loss
from fluxjax.train.optimizers import muon_optimizer
from fluxjax.train.step import Tree, init_state, make_step

_HELD_OUT = 32  # clips that are measured
_AT_ONCE = 16
_DECODES = ("decoder", "post_quant_conv")
_ALONE = 4  # every so many steps first frames by themselves, as a clip's first frame is given


@dataclass(frozen=True, kw_only=True)
class ClipAutoencoderStage:
    """`widths` are the channels of the four resolutions, the finest first; `frames_per_latent` 1, 2
    or 4; `inflated`: it begins as the autoencoder of pictures, which has the same widths, and sees
    each frame by itself."""

    widths: tuple[int, ...] = TINY.vae.block_out_channels
    frames_per_latent: int = 1
    inflated: bool = True
    steps: int = 1000
    decay_steps: int = 600
    batch: int = 4
    learning_rate: float = 1e-3
    kl_weight: float = 1e-4
    ema_decay: float = 0.998
    seed: int = 1

    @property
    def config(self) -> CausalAutoencoderConfig:
        """Of the network, with latents that are not scaled yet."""
        return CausalAutoencoderConfig(
            block_out_channels=self.widths,
            layers_per_block=TINY.vae.layers_per_block,
            norm_num_groups=TINY.vae.norm_num_groups,
            temporal_compression_ratio=self.frames_per_latent,
            scaling_factor=1.0,
        )


@dataclass(frozen=True, kw_only=True)
class ClipDecoderStage:
    """The decoder alone, after both: latents stay what they are, so that a transformer may have
    learnt them before. 0 steps leave it as it is."""

    steps: int = 800
    decay_steps: int = 600
    batch: int = 4
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    seed: int = 2


def drawn_clips(
    seed: int | tuple[int, ...], n: int, frames: int, side: int, *, held_out: bool = False
) -> Float[Array, "n frames side side 3"]:
    """`n` clips of scenes that move; a pure function of its arguments."""
    scenes = sample_moving_scenes(seed, n, held_out=held_out)
    return render_clips(scenes, frames=frames, side=side)


def clip_latents_scale(model: CausalAutoencoder, params: Tree, clips: Array) -> float:
    """What latents are multiplied by to have a mean square of 1."""

    @jax.jit
    def mean_square(clips: Array) -> Array:
        posterior: Any = model.apply({"params": params}, clips, method=model.encode)
        return jnp.square(posterior.mean).mean()

    each = [mean_square(clips[i : i + _AT_ONCE]) for i in range(0, len(clips), _AT_ONCE)]
    return float(1.0 / np.sqrt(np.mean(jax.device_get(each))))


def inflate(pictures: Tree, clips: Tree) -> Tree:
    """The parameters `pictures` of an autoencoder of pictures in the places of `clips`, those of
    one of clips with the same widths: it then treats each frame alike, by itself.

    Kernels have their weights at the frame itself and zeros at those before. An autoencoder of
    pictures halves sides with what lies right of and below a place, one of clips with what lies
    around it: there the last column and row are added to the ones before. What pictures have no
    kernel for is the identity.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(pictures)
    theirs = {tuple(part for part in path if part != "conv"): leaf for path, leaf in flat.items()}
    leaves: dict[tuple[str, ...], Any] = flatten_dict(clips)
    filled: dict[tuple[str, ...], Any] = {}
    for path, leaf in leaves.items():
        of: Any = theirs.get(tuple(part for part in path if part != "conv"))
        if of is None:
            of = jnp.eye(leaf.shape[-1])[None, None] if path[-1] == "kernel" else jnp.zeros(1)
        if "downsamplers_0" in path and path[-1] == "kernel":
            for axis in (0, 1):
                first, second, third = jnp.split(of, 3, axis)
                of = jnp.concatenate([jnp.zeros_like(first), first, second + third], axis)
        if leaf.ndim == 5:
            of = jnp.zeros(leaf.shape).at[-1].set(of)
        filled[path] = jnp.broadcast_to(of, leaf.shape).astype(leaf.dtype)
    return unflatten_dict(filled)


def train_clip_autoencoder(
    stage: ClipAutoencoderStage,
    frames: int,
    side: int,
    folder: Path,
    pictures: Tree | None = None,
) -> Tree:
    """Encoder and decoder together, on clips of `frames` x `side` x `side`; returns the averaged
    (EMA) parameters. Begins as the autoencoder of `pictures` where its parameters are given.
    Checkpoints and metrics lie in `folder`."""
    model = CausalAutoencoder(stage.config)
    blank = jnp.zeros((1, frames, side, side, 3))
    params = jax.jit(model.init)(jax.random.key(stage.seed), blank)["params"]
    if pictures is not None:
        params = inflate(pictures, params)
    decay = optax.linear_schedule(1.0, 0.0, stage.decay_steps, stage.steps - stage.decay_steps)
    warm = optax.linear_schedule(0.0, stage.learning_rate, 100)
    optimizer = muon_optimizer(lambda step: warm(step) * decay(step))

    def loss(params: Tree, key: jax.Array, clips: Array) -> jax.Array:
        def forward(model: CausalAutoencoder, clips: Array):
            posterior = model.encode(clips)
            return model.decode(posterior.sample(key)), posterior

        both: Any = model.apply({"params": params}, clips, method=forward)
        reconstruction, posterior = both
        return autoencoder_loss(reconstruction, clips, posterior, kl_weight=stage.kl_weight)

    step = make_step(loss, optimizer, seed=stage.seed, ema_decay=stage.ema_decay)
    probe = _probe(model, frames, side)

    def advance(state, index: int):
        alone = index % _ALONE == _ALONE - 1
        n, shown = (_ALONE * stage.batch, 1) if alone else (stage.batch, frames)
        return step(state, drawn_clips((stage.seed, index), n, shown, side))

    settings = RunSettings(steps=stage.steps, folder=folder, probe_every=250)
    hooks = Hooks(probe=lambda state: probe(state.ema))
    return Run(settings, advance, hooks).to_end(init_state(params, optimizer)).ema


def train_clip_decoder(
    stage: ClipDecoderStage,
    model: CausalAutoencoder,
    params: Tree,
    frames: int,
    side: int,
    folder: Path,
) -> Tree:
    """The autoencoder's parameters with another decoder, averaged (EMA), for the same latents."""
    learns = {name: tree for name, tree in params.items() if name in _DECODES}
    fixed = {name: tree for name, tree in params.items() if name not in _DECODES}
    decay = optax.linear_schedule(1.0, 0.0, stage.decay_steps, stage.steps - stage.decay_steps)
    warm = optax.linear_schedule(0.0, stage.learning_rate, 50)
    optimizer = muon_optimizer(lambda step: warm(step) * decay(step))

    def loss(params: Tree, key: jax.Array, clips: Array, fixed: Tree) -> jax.Array:
        def forward(model: CausalAutoencoder, clips: Array):
            posterior = jax.lax.stop_gradient(model.encode(clips))
            return model.decode(posterior.sample(key)), posterior

        both: Any = model.apply({"params": {**fixed, **params}}, clips, method=forward)
        return autoencoder_loss(both[0], clips, both[1], kl_weight=0.0)

    step = make_step(loss, optimizer, seed=stage.seed, ema_decay=stage.ema_decay)
    probe = _probe(model, frames, side)

    def advance(state, index: int):
        return step(state, drawn_clips((stage.seed, index), stage.batch, frames, side), fixed)

    settings = RunSettings(steps=stage.steps, folder=folder, probe_every=250)
    hooks = Hooks(probe=lambda state: probe({**fixed, **state.ema}))
    state = Run(settings, advance, hooks).to_end(init_state(learns, optimizer))
    return {**fixed, **state.ema}


def _probe(model: CausalAutoencoder, frames: int, side: int) -> Callable[[Tree], dict[str, float]]:
    """Of parameters: how near held-out clips come back, and the share of them that is read as it
    was drawn."""
    scenes = sample_moving_scenes(2**31 - 1, _HELD_OUT, held_out=True)
    held_out = render_clips(scenes, frames=frames, side=side)
    rebuild = jax.jit(lambda params, clips: reconstruct(model, params, clips))

    def probe(params: Tree) -> dict[str, float]:
        parts = [held_out[i : i + _AT_ONCE] for i in range(0, _HELD_OUT, _AT_ONCE)]
        rebuilt = np.concatenate([rebuild(params, part) for part in parts])
        right = [
            score_clip(scenes, i, read_clip(clip))["all"].right for i, clip in enumerate(rebuilt)
        ]
        found = float(psnr(jnp.asarray(rebuilt), held_out))
        return {"psnr": found, "read": float(np.mean(right))}

    return probe
