"""What a run is judged by while it goes on: fixed prompts and seeds, fixed timesteps and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.models.autoencoder import Autoencoder
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import PATCH, latent_size
from fluxjax.parallel.mesh import batch_parts, batch_sharding, replicated
from fluxjax.picture_sheet import picture_sheet
from fluxjax.sample import noise, pictures, schedule
from fluxjax.sample.denoise import Guidance
from fluxjax.sample.programs import decode_latents, denoise_pictures
from fluxjax.text.conditioning import Conditioning
from fluxjax.train.flow_matching import Rows, fixed_loss
from fluxjax.train.objectives import Objective
from fluxjax.train.step import Tree


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Pictures of fixed prompts and seeds, and the loss on fixed timesteps and noise."""

    every: int = 500
    """Steps between validations; 0 validates never."""
    prompts: tuple[str, ...] = ()
    """A row of pictures each; without prompts only the loss is measured."""
    references: tuple[str, ...] = ()
    """Training to edit: for each prompt the file of the picture that it edits, cut to the size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A column of pictures each."""
    width: int | None = None
    """Of the pictures, in pixels; by default the model's own, as the next three."""
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    batches: int = 4
    """Batches whose loss is measured."""
    source: str = ""
    """A source like that of the data, of pictures that are not trained on; by default the loss is
    measured on the first batches of the training data."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.batches < 0:
            raise ConfigError(
                f"every and batches must not be negative, got {self.every}, {self.batches}"
            )
        if self.prompts and not self.seeds:
            raise ConfigError("prompts need at least one seed")
        if self.references and len(self.references) != len(self.prompts):
            raise ConfigError(
                f"there are {len(self.prompts)} prompts and {len(self.references)} references: "
                "each prompt edits one"
            )


class Validation:
    """Draws and measures; the same again gives the same numbers and pictures."""

    def __init__(
        self,
        config: PipelineConfig,
        model: FluxTransformer,
        settings: ValidationSettings,
        objective: Objective,
        mesh: Mesh,
        *,
        batches: Sequence[tuple[Rows, Float[Array, "image 3"], Float[Array, ""]]],
        states: Conditioning | None,
        references: Float[np.ndarray, "prompts c rows columns"] | None,
        vae: Tree,
        seed: int,
    ) -> None:
        """`batches` are (rows, image ids, mu); `states` and `references` those of the prompts."""
        self.config, self.model, self.settings, self.objective = config, model, settings, objective
        self.mesh, self.batches, self.vae, self.seed = mesh, batches, vae, jnp.int32(seed)
        width, height = settings.width or config.width, settings.height or config.height
        self.rows, self.columns = latent_size(width, height, config.vae)
        self._states, self._references = states, references
        dtype = jnp.dtype(model.dtype)
        self._decoder = Autoencoder(config.vae, dtype=dtype, param_dtype=jnp.bfloat16)

    def loss(self, variables: Tree) -> float:
        """Mean over the batches; timesteps are the evenly spaced quantiles of the density."""
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
            values.append(
                fixed_loss(
                    self.model, self.objective, variables, rows, placed, self.seed, ids, mu
                )
            )  # fmt: skip
        return float(np.mean(jax.device_get(values)))

    def pictures(self, params: Tree) -> UInt8[np.ndarray, "n height width 3"]:
        """A row per prompt and a column per seed; `params` may carry a LoRA (`lora.adapt`)."""
        assert self._states is not None
        prompts, seeds = self._states.pooled.shape[0], self.settings.seeds
        count = prompts * len(seeds)
        latents = noise.draw(
            [*seeds] * prompts, (count, self.config.vae.latent_channels, self.rows, self.columns)
        )
        each, seen = jax.tree.map(
            lambda x: np.repeat(np.asarray(x), len(seeds), axis=0),
            (self._states, self._references),
        )
        padded = -count % batch_parts(self.mesh)
        fill = lambda x: np.concatenate([x, x[:1].repeat(padded, 0)])  # noqa: E731
        latents, each, seen = jax.tree.map(lambda x: self._place(fill(x)), (latents, each, seen))
        tokens = self.rows * self.columns // PATCH**2
        levels = schedule.pad(
            schedule.sigmas(self.settings.steps or self.config.steps, tokens, self.config.scheduler)
        )
        strength = self.settings.guidance
        strength = self.config.guidance if strength is None else strength
        embedded = None
        if self.config.transformer.guidance_embeds:
            embedded = self._place(np.full(count + padded, strength, np.float32))
        drawn = denoise_pictures(
            self.model, params, latents, jnp.asarray(levels), each, Guidance(embedded), seen
        )
        decoded = decode_latents(self._decoder, self.vae, drawn)
        whole = jax.jit(lambda x: x, out_shardings=replicated(self.mesh))(decoded)
        return pictures.to_bytes(np.asarray(whole, np.float32)[:count])

    def _place(self, x: np.ndarray) -> Array:
        where = batch_sharding(self.mesh)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    def save(self, params: Tree, path: Path) -> None:
        """The pictures on one sheet, which replaces the file; process 0 writes it."""
        from PIL import Image

        drawn = self.pictures(params)
        if jax.process_index() == 0:
            sheet = picture_sheet(drawn, columns=len(self.settings.seeds))
            with whole_or_nothing(path) as part:
                Image.fromarray(sheet).save(part, format="PNG")


def _stride(total: int) -> int:
    """A number near the golden section of `total` that shares no factor with it."""
    step = max(1, round(total * 0.618))
    while np.gcd(step, total) != 1:
        step += 1
    return step
