"""Teaches a diffusion model what the embedded FLUX model sees in the same noisy latents.

Which noise hides a picture can only be guessed, and a network learns the mean of the guesses from
many examples. A trained flow says that mean for each: the same network in far fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.checkpoint.pipeline_folder import load_params, read_flux
from fluxjax.config import FluxPipelineConfig
from fluxjax.families import FLUX, Conditioning, Extras
from fluxjax.families.family import Family
from fluxjax.families.noise_path import DiffusionPath, Mixture
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids, pack, unpack
from fluxjax.train.embedded.examples import Conditioner
from fluxjax.train.embedded.tiny import make_conditioner
from fluxjax.train.flow_matching import Learner, Rows
from fluxjax.train.objectives import Objective, debiased_weights, learnt_times, squared_error
from fluxjax.train.step import Tree


class Teacher(NamedTuple):
    """A FLUX pipeline that hears captions by itself; its latents are the student's but for their
    shift."""

    config: FluxPipelineConfig
    model: FluxTransformer
    params: Tree
    encode_text: Callable[[list[str]], Conditioning]

    @classmethod
    def open(cls, folder: Path) -> Teacher:
        config = read_flux(folder)
        params = load_params(
            folder, "transformer", config.transformer, stacked=False, dtype=jnp.float32
        )
        model = FluxTransformer(config.transformer, scan_layers=False)
        return cls(config, model, params, make_conditioner(folder, config).encode_text)

    def beside(self, student: Conditioner) -> Conditioner:
        """The student's, whose captions the teacher hears too."""

        def both(texts: list[str]) -> Any:
            return student.encode_text(texts), self.encode_text(texts)

        return Conditioner(student.encode_image, both)

    def sees(
        self, params: Tree, x: Float[Array, "b h w c"], state: Mixture, heard: Conditioning
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """The picture and the noise in `x`, a mixture of unshifted latents and noise."""
        vae, (rows, columns) = self.config.vae, x.shape[1:3]
        signal, level = (part.reshape(-1, 1, 1, 1) for part in state)
        moved = -vae.shift_factor * vae.scaling_factor
        # The same shares of both on the straight line, where they add up to 1.
        t = level / (signal + level)
        straight = x / (signal + level) + (1 - t) * moved
        extras = Extras(image_ids(rows, columns), jnp.ones(x.shape[0]))
        packed: Any = pack(jnp.moveaxis(straight, -1, 1))
        velocity = FLUX.forward(
            self.model, {"params": params}, packed, t.reshape(-1), heard, extras
        )
        v = jnp.moveaxis(jnp.asarray(unpack(velocity, rows, columns)), 1, -1)
        return straight - t * v - moved, straight + (1 - t) * v


def taught_loss(
    family: Family, model: nn.Module, objective: Objective, of: Learner, teacher: Teacher
) -> Any:
    """`loss(params, key, rows, frozen, empty, ids, mu)`: the squared distance from what the
    teacher's picture and noise say, weighed as `debiased_weights` does.

    `frozen`: the teacher's parameters. The conditionings of `rows` and of `empty`, one empty
    caption, are pairs: what the student hears and what the teacher does.
    """
    path = of.path
    assert isinstance(path, DiffusionPath) and not path.learns_variance

    def loss(
        params: Tree, key: Array, rows: Rows, frozen: Tree, empty: Any, ids: None, mu: Array
    ) -> Array:
        latents = jnp.asarray(rows.latents)
        n, keys = latents.shape[0], jax.random.split(key, 3)
        t = learnt_times(objective, path, jax.random.uniform(keys[0], (n,)), 0.0)
        state = path.state(t)
        x = state.of(latents, jax.random.normal(keys[1], latents.shape))
        drop = jax.random.uniform(keys[2], (n,)) < objective.caption_dropout

        def either(dropped: Array, said: Array) -> Array:
            return jnp.where(drop.reshape(-1, *[1] * (said.ndim - 1)), dropped, said)

        ours, theirs = jax.tree.map(either, empty, rows.conditioning)
        wanted = path.target(t).of(*teacher.sees(frozen, x, state, theirs))
        extras = Extras(None, jnp.ones(n))
        predicted = family.forward(model, {"params": params}, x, path.told(t), ours, extras)
        weights = debiased_weights(path, t).reshape(-1, 1, 1, 1)
        return squared_error(predicted, jax.lax.stop_gradient(wanted), weights)

    return loss
