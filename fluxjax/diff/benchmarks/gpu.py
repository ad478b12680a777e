"""FLUX.1-dev at full depth on one GPU: random bfloat16 weights, 1024x1024, 28 steps.

Speed does not depend on the weights' values, so none are downloaded. Beside it diffusers, compiled,
with the fastest of the attention backends that need no further package. Text encoders are left
out: they run once per prompt.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.templates import Config, abstract_params
from fluxjax.config import DEV
from fluxjax.diff.benchmarks.bench import Measure
from fluxjax.families import FLUX, Conditioning, Steps
from fluxjax.models.autoencoder import Autoencoder
from fluxjax.models.flux import FluxTransformer
from fluxjax.sample.denoise_pictures import Drawn, denoise_pictures
from fluxjax.sample.programs import decode_latents
from fluxjax.schedules.flow_euler import sigmas
from fluxjax.schedules.schedule import pad

BACKENDS = ("native", "_native_cudnn", "_native_flash")
STEPS, ROWS, TOKENS, TEXT = DEV.steps, 128, 4096, DEV.max_sequence_length
GIB = 2**30


def full_depth(rounds: int) -> list[Measure]:
    """Seconds per step and per picture, and peak memory, of both sides one after the other.

    Not in turns: the weights of both would share the memory whose peak is measured.
    """
    ours = _ours(rounds)
    jax.clear_caches()
    name, theirs = _theirs(rounds)
    return [
        Measure(
            what=f"FLUX.1-dev, 1024x1024, bfloat16: {what}",
            ours=ours[key],
            theirs=theirs.get(key),
            beside=name,
            unit=unit,
        )
        for key, what, unit in (
            ("step", "one step", "s"),
            ("picture", f"one picture ({STEPS} steps and decoding)", "s"),
            ("memory", "peak memory", "GiB"),
        )
    ]


def _median(run: Callable[[], Any], rounds: int) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _random_params(config: Config, *, stacked: bool) -> Any:
    """Small random bfloat16 weights, drawn on the device leaf by leaf."""
    leaves, tree = jax.tree.flatten(abstract_params(config, stacked=stacked))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
    )
    return tree.unflatten([draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def _ours(rounds: int) -> dict[str, float]:
    types: dict[str, Any] = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    transformer = FluxTransformer(DEV.transformer, **types, scan_layers=True)
    vae = Autoencoder(DEV.vae, **types)
    params = _random_params(DEV.transformer, stacked=True)
    vae_params = _random_params(DEV.vae, stacked=False)
    key = jax.random.key(1)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    noise = normal(1, DEV.vae.latent_channels, ROWS, ROWS)
    conditioning = Conditioning(
        normal(1, TEXT, DEV.text_encoder_2.d_model), None, normal(1, DEV.text_encoder.hidden_size)
    )
    schedule = pad(FLUX.run(DEV, Steps(STEPS), ROWS, ROWS).schedule)
    passes = FLUX.passes(len(schedule.times), None)
    guidance = jnp.full((1,), DEV.guidance, jnp.float32)
    drawn = Drawn(schedule, passes, (conditioning,), guidance)

    def denoise() -> jax.Array:
        (latents,) = denoise_pictures(FLUX, transformer, (), params, (), (noise,), drawn)
        return latents.block_until_ready()

    denoising = _median(denoise, rounds)
    latents = denoise()
    decoding = _median(lambda: decode_latents(vae, vae_params, latents).block_until_ready(), rounds)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", np.nan)
    return {
        "step": denoising / STEPS,
        "picture": denoising + decoding,
        "memory": memory / GIB,
    }


def _theirs(rounds: int) -> tuple[str, dict[str, float]]:
    """The fastest backend's name and measures; nothing without a PyTorch for this GPU."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    if not torch.cuda.is_available():
        return "PyTorch sees no GPU", {}
    dtype = torch.bfloat16
    autoencoder: Any = AutoencoderKL  # annotates its tuples as of length one
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            transformer = FluxTransformer2DModel(guidance_embeds=True).eval()
            vae: Any = autoencoder(
                latent_channels=16,
                block_out_channels=DEV.vae.block_out_channels,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ).eval()
            noise = torch.randn(1, TOKENS, 64)
            side = ROWS // 2
            rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(TOKENS, 3)
            inputs = {
                "encoder_hidden_states": torch.randn(1, TEXT, DEV.text_encoder_2.d_model),
                "pooled_projections": torch.randn(1, DEV.text_encoder.hidden_size),
                "img_ids": ids.to(dtype),
                "txt_ids": torch.zeros(TEXT, 3),
                "guidance": torch.full((1,), DEV.guidance, dtype=torch.float32),
                "return_dict": False,
            }
            latents = torch.randn(1, 16, ROWS, ROWS)
    finally:
        torch.set_default_dtype(before)
    levels = sigmas(STEPS, TOKENS, DEV.scheduler)
    torch.cuda.reset_peak_memory_stats()

    def denoise(model: Any) -> None:
        x = noise
        for level, following in itertools.pairwise(levels):
            timestep = torch.full((1,), float(level), dtype=dtype, device="cuda")
            velocity = model(hidden_states=x, timestep=timestep, **inputs)[0]
            x = (x.float() + float(following - level) * velocity.float()).to(dtype)
        torch.cuda.synchronize()

    def decode() -> None:
        vae.decode(latents)
        torch.cuda.synchronize()

    timed: dict[str, float] = {}
    with torch.no_grad():
        for backend in BACKENDS:
            transformer.set_attention_backend(backend)
            torch._dynamo.reset()
            model = torch.compile(transformer, fullgraph=True)
            timed[backend] = _median(lambda model=model: denoise(model), rounds)
        decoding = _median(decode, rounds)
    best = min(timed, key=lambda backend: timed[backend])
    return f"diffusers compiled, attention {best}", {
        "step": timed[best] / STEPS,
        "picture": timed[best] + decoding,
        "memory": torch.cuda.max_memory_allocated() / GIB,
    }
