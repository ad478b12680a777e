"""Teaches a diffusion model what the embedded FLUX model sees in the same noisy latents.

Which noise hides a picture can only be guessed, and a network learns the mean of the guesses from
many examples. A trained flow says that mean for each: the same network in far fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fluxjax.checkpoint.pipeline_folder import load_params, read_flux
from fluxjax.config import FluxPipelineConfig
from fluxjax.families import FLUX, Conditioning, Extras
from fluxjax.families.family import Family
from fluxjax.families.noise_path import AnyArray, DiffusionPath, Mixture
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids, pack, unpack
from fluxjax.train.embedded.examples import Conditioner, Teaching
from fluxjax.train.embedded.tiny import make_conditioner
from fluxjax.train.flow_matching import Rows
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
        self,
        params: Tree,
        x: Float[Array, "b h w c"],
        state: Mixture,
        heard: Conditioning,
        guidance: Float[Array, " b"],
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """The picture and the noise in `x`, a mixture of unshifted latents and noise."""
        vae, (rows, columns) = self.config.vae, x.shape[1:3]
        signal, level = (part.reshape(-1, 1, 1, 1) for part in state)
        moved = -vae.shift_factor * vae.scaling_factor
        # The same shares of both on the straight line, where they add up to 1.
        t = level / (signal + level)
        straight = x / (signal + level) + (1 - t) * moved
        extras = Extras(image_ids(rows, columns), guidance)
        packed: Any = pack(jnp.moveaxis(straight, -1, 1))
        velocity = FLUX.forward(
            self.model, {"params": params}, packed, t.reshape(-1), heard, extras
        )
        v = jnp.moveaxis(jnp.asarray(unpack(velocity, rows, columns)), 1, -1)
        return straight - t * v - moved, straight + (1 - t) * v


class Lesson(NamedTuple):
    """Noisy latents, their time on the student's path, and what is to be predicted of them."""

    x: Float[AnyArray, "b h w c"]
    time: Float[AnyArray, " b"]
    wanted: Float[AnyArray, "b h w c"]


def lessons(
    objective: Objective,
    path: DiffusionPath,
    teacher: Teacher,
    student: Conditioner,
    guidance: float,
    *,
    told_otherwise: float = 0.0,
    unlearnt: tuple[str, ...] = (),
) -> Conditioner:
    """The student's, whose examples are lessons: noise is drawn and the teacher, told `guidance`,
    is asked once for each. Of dropped captions both hear nothing, and the teacher is told 1.

    Noisy latents of a picture still show most of it, and who predicts them need not listen. Of
    captions that say something else (`told_otherwise` of them) the teacher says what it hears.
    Of objects in `unlearnt` colours, which it does not know, the noise itself is learnt."""
    assert not path.learns_variance
    both = teacher.beside(student)
    empty = jax.tree.map(jnp.asarray, both.encode_text([""]))

    @jax.jit
    def teach(
        key: Array, latents: Array, heard: Any, known: Array, params: Tree
    ) -> tuple[Lesson, Conditioning]:
        n, keys = latents.shape[0], jax.random.split(key, 3)
        t = learnt_times(objective, path, jax.random.uniform(keys[0], (n,)), 0.0)
        state = path.state(t)
        noise = jax.random.normal(keys[1], latents.shape)
        x = state.of(latents, noise)
        drop = jax.random.uniform(keys[2], (n,)) < objective.caption_dropout

        def either(dropped: Array, said: Array) -> Array:
            return jnp.where(drop.reshape(-1, *[1] * (said.ndim - 1)), dropped, said)

        ours, theirs = jax.tree.map(either, empty, heard)
        seen = teacher.sees(params, x, state, theirs, jnp.where(drop, 1.0, guidance))
        target = path.target(t)
        said = jnp.where(known.reshape(-1, 1, 1, 1), target.of(*seen), target.of(latents, noise))
        return Lesson(x, t, said), ours

    def taught(key: Array, latents: Array, heard: Any, known: Any) -> tuple[Lesson, Conditioning]:
        heard, known = jax.tree.map(jnp.asarray, (heard, known))
        return teach(key, latents, heard, known, teacher.params)

    teaching = Teaching(taught, told_otherwise, unlearnt)
    return Conditioner(student.encode_image, both.encode_text, teaching)


def taught_loss(family: Family, model: nn.Module, path: DiffusionPath) -> Any:
    """`loss(params, key, rows, frozen, empty, ids, mu)`: the squared distance from what the teacher
    says, weighed as `debiased_weights` does. The latents of `rows` are a `Lesson`."""

    def loss(
        params: Tree, key: Array, rows: Rows, frozen: Tree, empty: Any, ids: None, mu: Array
    ) -> Array:
        x, t, wanted = map(jnp.asarray, cast(Lesson, rows.latents))
        extras = Extras(None, jnp.ones(t.shape[0]))
        told = path.told(t)
        predicted = family.forward(model, {"params": params}, x, told, rows.conditioning, extras)
        weights = debiased_weights(path, t).reshape(-1, 1, 1, 1)
        return squared_error(predicted, wanted, weights)

    return loss
