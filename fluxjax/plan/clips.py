"""Of a plan for clips the tiles that are decoded, and published runs."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from fluxjax.config.video_pipeline import VideoPipelineConfig
from fluxjax.models.attention import auto_attention
from fluxjax.models.compilation import IN_LOOPS
from fluxjax.models.video_tiles import decode_cuts
from fluxjax.networks import network_of
from fluxjax.parallel.compiled_program import Structure, measure
from fluxjax.plan.attention import flash_like


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


def tiles(
    config: VideoPipelineConfig, latents: tuple[int, ...], params: Any, devices: int, clips: int
) -> tuple[Structure, int]:
    """What one of so many devices does of the decoding, and how many tiles: its share. Memory is
    the largest tile's, and work as much less in smaller ones as they give fewer pixels. `params`:
    shapes; every device has all of them."""
    here = SingleDeviceSharding(jax.devices()[0])
    weights = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), params
    )
    dtype = jax.tree.leaves(params)[0].dtype
    vae = network_of(config.vae).build(config.vae, dtype=dtype, param_dtype=dtype)
    cuts = [axis.tiles for axis in decode_cuts(config.vae, latents, config.tiling)]
    sizes = [tuple(cut.stop - cut.start for cut in place) for place in product(*cuts)]
    pixels = [_decoded_frames(config, t) * rows * columns for t, rows, columns in sizes]
    share = -(-clips * len(sizes) // devices)
    shape = (share, 1, *sizes[int(np.argmax(pixels))], config.vae.latent_channels)
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
    found = measure(lowered.compile(compiler_options={**IN_LOOPS}))
    return found.part(sum(pixels) / len(pixels) / max(pixels)), share


def _decoded_frames(config: VideoPipelineConfig, latents: int) -> int:
    first = config.vae.first_frame
    return (latents - first) * config.vae.temporal_compression_ratio + first
