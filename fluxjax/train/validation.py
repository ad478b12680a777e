"""What a run is judged by while it goes on: fixed prompts and seeds, fixed timesteps and noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.families.family import Apply, Conditioning
from fluxjax.models.flux import FluxTransformer
from fluxjax.parallel.mesh import batch_sharding
from fluxjax.picture_sheet import picture_sheet
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.pipeline import Pipeline
from fluxjax.sample.settings import override
from fluxjax.train.flow_matching import Rows, fixed_loss
from fluxjax.train.settings import Objective, ValidationSettings
from fluxjax.train.step import Tree


class Validation:
    """Draws and measures; the same again gives the same numbers and pictures."""

    def __init__(
        self,
        pipeline: Pipeline,
        model: FluxTransformer,
        settings: ValidationSettings,
        objective: Objective,
        mesh: Mesh,
        *,
        batches: Sequence[tuple[Rows, Float[Array, "image 3"], Float[Array, ""]]],
        states: Conditioning | None,
        shown: Inputs,
        seed: int,
        apply: Apply = nn.Module.apply,
    ) -> None:
        """`pipeline` draws; `batches` are (rows, image ids, mu); `states` and what is
        `shown` are those of the prompts."""
        self.pipeline, self.model = pipeline, model
        self.settings, self.objective = settings, objective
        self.mesh, self.batches, self.seed = mesh, batches, jnp.int32(seed)
        self._apply = apply
        self._states, self._shown = states, shown

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
            value = fixed_loss(
                self.pipeline.family,
                self.model,
                self.objective,
                variables,
                rows,
                placed,
                self.seed,
                ids,
                mu,
                self._apply,
            )
            values.append(value)
        return float(np.mean(jax.device_get(values)))

    def pictures(self, params: Tree) -> UInt8[np.ndarray, "n height width 3"]:
        """A row per prompt and a column per seed; `params` may carry a LoRA (`lora.adapt`)."""
        assert self._states is not None
        asked, pipeline = self.settings, self.pipeline
        prompts, columns = len(self._states.sequence), len(asked.seeds)
        states, shown = jax.tree.map(
            lambda x: np.repeat(np.asarray(x), columns, axis=0), (self._states, self._shown)
        )
        # In float32 and without the rounding of a sampler, whatever the network computes in.
        chosen = override(
            pipeline.defaults,
            {"width": asked.width, "height": asked.height, "rounding": "none"},
        )
        noise = pipeline.draw_noise(chosen, [*asked.seeds] * prompts, prompts * columns)
        pipeline.use("transformer", params)
        latents = pipeline.denoise(
            states, noise, steps=asked.steps, guidance=asked.guidance, inputs=shown
        )
        return to_bytes(pipeline.decode(latents))

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
