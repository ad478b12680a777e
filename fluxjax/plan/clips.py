"""The programs of a plan for clips, from the descriptions of their networks, and published runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from fluxjax.config.choices import SequenceAttention
from fluxjax.config.video_pipeline import VideoPipelineConfig
from fluxjax.models.attention import auto_attention
from fluxjax.models.compilation import IN_LOOPS
from fluxjax.models.video_tiles import decode_cuts
from fluxjax.networks import network_of
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.compiled_program import Structure, measure
from fluxjax.parallel.mesh import replicated
from fluxjax.plan.attention import flash_like
from fluxjax.schedules.open_sora import VideoGuidance, open_sora_passes


class Run(NamedTuple):
    """A published run of a preset: all of its seconds, and GB on each device where they are told.

    Open-Sora 2.0's are those of its README, HunyuanVideo's those of Tencent's (one and eight GPUs).
    """

    devices: str
    seconds: float
    gigabytes: float | None = None

    def __str__(self) -> str:
        held = "" if self.gigabytes is None else f", {self.gigabytes:g} GB on each"
        return f"published, on {self.devices}: {self.seconds:g} s{held}"


PUBLISHED: dict[str, tuple[Run, ...]] = {
    "opensora-256": (Run("one H100", 60, 52.5),),
    "opensora-768": (Run("one H100", 1656, 60.3), Run("eight H100", 276, 44.3)),
    "hunyuan-720": (Run("one GPU", 1904, 60), Run("eight GPUs", 338)),
}
FLOAT_CONVOLUTIONS = (
    "16-bit convolutions are held in float32 here, as CPUs do them: decoding takes less"
)


def _of_open_sora(config: Any) -> int:
    """Two passes a step, the prompt's and the negative prompt's, and one at steps that rest."""
    guidance = VideoGuidance(text=config.guidance)
    weights = open_sora_passes(config.steps, 1, guidance, pictures=False)[:, 0]
    return int(np.where(weights == 1, 1, 2).sum())


_FORWARDS: dict[str, Callable[[Any], int]] = {"OpenSoraPipeline": _of_open_sora}


def run_forwards(config: VideoPipelineConfig) -> int:
    """Forwards of a run from text, as few as give the same."""
    return _FORWARDS.get(config.class_name, lambda config: config.steps)(config)


def forwards(
    config: Any,
    params: Any,
    mesh: Mesh,
    latents: tuple[int, ...],
    text: int,
    *,
    dtype: Any = jnp.bfloat16,
    clips: int = 1,
    steps: int = 1,
    sequence: SequenceAttention = "auto",
) -> Structure:
    """Of the network of clips with that `config`: one forward after the other of all clips.

    `params`: shapes with their places on `mesh`; `latents`: frames, rows and columns.
    """
    network = network_of(config)
    assert network.clip_shapes is not None
    module = network.build(config, scan_layers=True, dtype=dtype, param_dtype=dtype)
    apply = partial(apply_on, mesh if mesh.size > 1 else None, module, sequence=sequence)

    def shape(size: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=replicated(mesh))

    inputs = {k: shape(v) for k, v in network.clip_shapes(config, clips, latents, text).items()}

    @jax.jit
    def run(params: Any, inputs: Any, times: Any) -> Any:
        def forward(timestep: Any) -> Any:
            return apply({"params": params}, **inputs | {"timestep": timestep})

        def step(moved: Any, timestep: Any) -> tuple[Any, None]:
            return moved + forward(timestep), None

        first = jax.eval_shape(forward, inputs["timestep"])
        return jax.lax.scan(step, jnp.zeros(first.shape, first.dtype), times)[0]

    with auto_attention(flash_like):  # as accelerators have it
        lowered = run.lower(params, inputs, shape((steps, clips)))
    return measure(lowered.compile(compiler_options={**IN_LOOPS}))


def tiles(
    config: VideoPipelineConfig, latents: tuple[int, ...], params: Any, devices: int, clips: int
) -> tuple[Structure, int]:
    """What one of so many devices does of the decoding, and how many tiles: its share, each counted
    as large as the largest. `params`: shapes; every device has all of them."""
    here = SingleDeviceSharding(jax.devices()[0])
    weights = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), params
    )
    dtype = jax.tree.leaves(params)[0].dtype
    vae = network_of(config.vae).build(config.vae, dtype=dtype, param_dtype=dtype)
    cuts = [axis.tiles for axis in decode_cuts(config.vae, latents, config.tiling)]
    share = -(-clips * math.prod(map(len, cuts)) // devices)
    sizes = (tuple(cut.stop - cut.start for cut in place) for place in product(*cuts))
    shape = (share, 1, *max(sizes, key=math.prod), config.vae.latent_channels)
    latent = jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    @jax.jit
    def run(params: Any, latents: Any) -> Any:
        def decode(total: Any, tile: Any) -> Any:
            # Tiles leave the device one by one; only one is held.
            out: Any = vae.apply({"params": params}, tile, method="decode")
            return total + out, None

        first = jax.eval_shape(lambda z: decode(0.0, z)[0], latents[0])
        return jax.lax.scan(decode, jnp.zeros(first.shape, first.dtype), latents)[0]

    with auto_attention(flash_like):
        lowered = run.lower(weights, latent)
    return measure(lowered.compile(compiler_options={**IN_LOOPS})), share
