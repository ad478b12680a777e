"""Trains a small transformer of the Open-Sora kind on drawn scenes that move, and with it copies of
the embedded text encoders, to which words of motion are new.

Open-Sora's objective: sigmoid times shifted by the clip's size, a condition drawn for each sample,
T5 and CLIP dropped by themselves. Source: hpcaitech/Open-Sora `scripts/diffusion/train.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fluxjax.config import ConfigError, OpenSoraPipelineConfig
from fluxjax.config.choices import Products
from fluxjax.families import OPEN_SORA
from fluxjax.families.family import AnyArray, Extras
from fluxjax.families.flux import PromptIds
from fluxjax.families.noise_path import OPEN_SORA_FLOW
from fluxjax.models.latents import text_ids, video_ids
from fluxjax.models.open_sora import OpenSoraTransformer
from fluxjax.models.products import PRECISIONS
from fluxjax.schedules.open_sora import shift_of
from fluxjax.text.video_prompt import video_prompt
from fluxjax.train.data.cache_file import compact, read_arrays, write_arrays
from fluxjax.train.embedded.moving_captions import moving_captions
from fluxjax.train.embedded.moving_scenes import MovingScene, render_clips, sample_moving_scenes
from fluxjax.train.embedded.paraphrase import Encoders
from fluxjax.train.given_clips import conditions, draw_kind
from fluxjax.train.loop import Run, RunSettings
from fluxjax.train.objectives import sample_times, squared_error
from fluxjax.train.optimizers import make_optimizer
from fluxjax.train.settings import ConditionKinds, OptimizerSettings
from fluxjax.train.step import Tree, init_state, make_step

_CHUNK, _AT_ONCE = 64, 16  # examples in a file; clips that are encoded together


@dataclass(frozen=True, kw_only=True)
class ClipTransformerStage:
    """`patch`: rows and columns of latents in a token. `kinds`: of those without and with a first
    frame; no other frame is encoded.

    Clips are drawn and encoded in chunks of 64, which are kept: `first_chunks` before the first
    step, then one every `chunk_every` steps, `chunks` in all. `encoder_rate`: the text encoders'
    learning rate, as a share of the transformer's. `products` rounds the operands of matrix
    products, see `models/products.py`.
    """

    layers: int = 1
    single_layers: int = 5
    heads: int = 4
    patch: int = 2
    steps: int = 20000
    batch: int = 16
    learning_rate: float = 3e-3
    encoder_rate: float = 0.1
    weight_decay: float = 0.01
    decay_steps: int = 5000
    dropout: float = 0.316
    """Of T5's states and of CLIP's, each by itself: both are the empty prompt's in a tenth."""
    ema_decay: float = 0.999
    kinds: ConditionKinds = field(
        default_factory=lambda: ConditionKinds(i2v_head=1.0, i2v_loop=0.0, i2v_tail=0.0)
    )
    first_chunks: int = 16
    chunk_every: int = 40
    chunks: int = 256
    products: Products = "float32"
    seed: int = 3

    def __post_init__(self) -> None:
        others = set(name for name, weight in self.kinds.weights.items() if weight)
        if others := others - {"t2v", "i2v_head"}:
            raise ConfigError(
                f"kinds: t2v and i2v_head are learnt from drawn scenes, got {', '.join(others)}"
            )


class Chunk(NamedTuple):
    """`heads`: the latents of each first frame by itself, drawn from their posterior as sampling
    draws them: where it is wide, means would teach to trust what is only noise there."""

    scenes: MovingScene
    latents: Float[np.ndarray, "n c frames h w"]
    heads: Float[np.ndarray, "n c 1 h w"]


class ClipRows(NamedTuple):
    """A batch as the step takes it; `empty` are the ids of the empty prompt."""

    latents: Float[AnyArray, "b c frames h w"]
    condition: Float[AnyArray, "b c_and_mask frames h w"]
    ids: PromptIds
    empty: PromptIds


class ClipExamples:
    """Batches: `self(step)` depends on the stage, the autoencoder and the step alone."""

    def __init__(
        self,
        config: OpenSoraPipelineConfig,
        stage: ClipTransformerStage,
        encode: Callable[[Array, Array | None], Array],
        encoders: Encoders,
        folder: Path,
        made_by: str,
    ):
        """`encode` makes scaled latents (n, c, frames, h, w) of clips, with a key drawn from their
        posterior; `made_by` is a hash of what does; chunks are kept in `folder`."""
        self.config, self.stage, self.encode, self.encoders = config, stage, encode, encoders
        self.folder, self.made_by = folder, made_by
        self.empty = encoders.ids([""])
        self._chunks: list[Chunk] = []

    def _chunk(self, index: int) -> Chunk:
        scenes = sample_moving_scenes((self.stage.seed, index), _CHUNK)
        path = self.folder / f"{index:05d}.safetensors"
        made_of = f"{self.made_by} {self.stage.seed} {index}"
        try:
            kept = read_arrays(path, made_of)
        except ValueError:  # of another autoencoder, or damaged: made anew
            kept = None
        if kept is None:
            clips = render_clips(scenes, frames=self.config.frames, side=self.config.width)
            parts = [clips[i : i + _AT_ONCE] for i in range(0, _CHUNK, _AT_ONCE)]
            key = jax.random.fold_in(jax.random.key(self.stage.seed), index)
            keys = jax.random.split(key, len(parts))
            latents = np.concatenate([np.asarray(self.encode(part, None)) for part in parts])
            heads = np.concatenate(
                [
                    np.asarray(self.encode(part[:, :1], own))
                    for part, own in zip(parts, keys, strict=True)
                ]
            )
            made = {"latents": latents, "heads": heads}
            # As a run that goes on reads them back.
            kept = {name: compact(value).astype(np.float32) for name, value in made.items()}
            write_arrays(path, kept, made_of)
        return Chunk(scenes, kept["latents"], kept["heads"])

    def __call__(self, step: int) -> ClipRows:
        stage = self.stage
        due = min(stage.chunks, stage.first_chunks + step // stage.chunk_every)
        while len(self._chunks) < due:
            self._chunks.append(self._chunk(len(self._chunks)))
        rng = np.random.default_rng((stage.seed, step))
        of, rows = rng.integers(due, size=stage.batch), rng.integers(_CHUNK, size=stage.batch)
        chosen = [(self._chunks[i], row) for i, row in zip(of, rows, strict=True)]
        scenes = MovingScene(
            *(
                np.stack([getattr(chunk.scenes, name)[row] for chunk, row in chosen])
                for name in MovingScene._fields
            )
        )
        latents = np.stack([chunk.latents[row] for chunk, row in chosen])
        heads = [chunk.heads[row] for chunk, row in chosen]
        frames = latents.shape[2]
        kinds = [draw_kind(stage.kinds, rng, frames) for _ in chosen]
        given = conditions(kinds, latents.shape[1:], heads, [None] * stage.batch)
        captions = moving_captions(scenes, (stage.seed, step))
        texts = [told(caption, self.config) for caption in captions]
        return ClipRows(latents, given, self.encoders.ids(texts), self.empty)


def told(prompt: str, config: OpenSoraPipelineConfig) -> str:
    """What the text encoders read of a prompt."""
    return video_prompt(prompt, config.fps, str(config.motion) if config.motion else None)


def clip_loss(model: OpenSoraTransformer, encoders: Encoders, dropout: float):
    """`loss(params, key, rows, shift)`: Open-Sora's objective, a mean over rows.

    `params` hold transformer, clip and t5; `shift` moves the times towards noise
    (`schedules.open_sora.shift_of`).
    """

    def loss(params: Tree, key: jax.Array, rows: ClipRows, shift: Array) -> Array:
        keys, latents = jax.random.split(key, 4), jnp.asarray(rows.latents)
        n = len(latents)
        t = sample_times(keys[0], n, jnp.log(shift))
        noise = jax.random.normal(keys[1], latents.shape)

        def heard(key: jax.Array, said: Array, empty: Array) -> Array:
            dropped = jax.random.uniform(key, (n, 1)) < dropout
            return jnp.where(dropped, empty, said)

        ids = PromptIds(
            heard(keys[2], jnp.asarray(rows.ids.clip), jnp.asarray(rows.empty.clip)),
            heard(keys[3], jnp.asarray(rows.ids.t5), jnp.asarray(rows.empty.t5)),
        )
        networks, texts = (encoders.clip, encoders.t5), (params["clip"], params["t5"])
        conditioning = OPEN_SORA.encode(networks, texts, ids)
        x = OPEN_SORA.pack(OPEN_SORA_FLOW.state(t).of(latents, noise))
        extras = Extras(x.positions, channels=OPEN_SORA.pack(rows.condition).values)
        learnt = {"params": params["transformer"]}
        predicted = OPEN_SORA.forward(model, learnt, x.values, t, conditioning, extras)
        target = OPEN_SORA.pack(OPEN_SORA_FLOW.target(t).of(latents, noise)).values
        return squared_error(predicted, jnp.asarray(target))

    return loss


def init_clip_transformer(
    config: OpenSoraPipelineConfig, seed: int
) -> tuple[OpenSoraTransformer, Tree]:
    """Random weights, one subtree per block (on CPUs a scan would copy what each block saves)."""
    c = config.transformer
    model = OpenSoraTransformer(c, scan_layers=False)
    params = jax.jit(model.init)(
        jax.random.key(seed),
        jnp.zeros((1, 4, c.in_channels)),
        jnp.zeros((1, 4, c.cond_channels)),
        jnp.zeros((1, 2, c.joint_attention_dim)),
        jnp.zeros((1, c.pooled_projection_dim)),
        jnp.zeros(1),
        video_ids(1, 2 * c.patch_size, 2 * c.patch_size, c.patch_size),
        text_ids(2),
    )["params"]
    return model, params


def train_clip_transformer(
    config: OpenSoraPipelineConfig,
    stage: ClipTransformerStage,
    encoders: Encoders,
    examples: ClipExamples,
    folder: Path,
    first: Tree | None = None,
) -> Mapping[str, Tree]:
    """Transformer and text encoders together; returns their averaged (EMA) parameters as
    transformer, clip and t5. Checkpoints and metrics lie in `folder`. `first`: the transformer's
    parameters to begin with; by default they are random."""
    model, params = init_clip_transformer(config, stage.seed)
    params = params if first is None else first
    precision = PRECISIONS[stage.products]
    model = model.clone(precision=precision)
    warm = optax.linear_schedule(0.0, stage.learning_rate, 100)
    decay = optax.linear_schedule(1.0, 0.0, stage.decay_steps, stage.steps - stage.decay_steps)
    settings = OptimizerSettings(name="muon", b2=0.99, weight_decay=stage.weight_decay)
    shares = dict.fromkeys(encoders.params, stage.encoder_rate)
    optimizer = make_optimizer(settings, lambda step: warm(step) * decay(step), shares)
    step = make_step(
        clip_loss(model, encoders, stage.dropout),
        optimizer,
        seed=stage.seed,
        ema_decay=stage.ema_decay,
        precision=precision,
    )
    _, frames, rows, columns = clip_shape(config)
    tokens = rows * columns // config.patch**2
    shift = jnp.float32(shift_of(tokens, frames))

    def advance(state, index: int):
        return step(state, examples(index), shift)

    state = init_state({**encoders.params, "transformer": params}, optimizer)
    return Run(RunSettings(steps=stage.steps, folder=folder), advance).to_end(state).ema


def clip_shape(config: OpenSoraPipelineConfig) -> tuple[int, int, int, int]:
    """(channels, frames, rows, columns) of the latents of a clip of the model's own size."""
    sides = (config.height // config.vae.scale, config.width // config.vae.scale)
    return config.vae.latent_channels, config.latent_frames(config.frames), *sides
