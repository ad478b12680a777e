"""One picture through diffusers' FluxPipeline and through ours: embeddings, latents, pixels.

This room looks into `sample`, as it does into every room: what it measures is the shipped sampler.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.diff.live import (
    BFLOAT16_BOUND,
    BFLOAT16_FACTOR,
    FLOAT32_BOUND,
    Arrays,
    Dtype,
    require_torch,
)
from fluxjax.diff.report import Report, Row, compare, relative_l2
from fluxjax.sample.loading import load_pipeline
from fluxjax.sample.override import override
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.programs import defaults
from fluxjax.sample.settings import Settings

SAMPLING_BOUND = 1e-4
# The picture on the screen: how many values may differ by more than 1, and by how much at most.
CLOSE_SHARE, LARGEST_STEP = 0.999, 4

SAMPLED = ("latents", "picture")  # what has gone through all steps


def compare_pipeline(
    folder: Path,
    *,
    prompt: str,
    seed: int,
    steps: int | None = None,
    dtype: Dtype = "float32",
    against: Path | None = None,
    mesh: str | None = None,
) -> Report:
    """Compare every stage of one picture; each side goes on with its own results.

    float32: embeddings and noise within 1e-5, latents and picture within 1e-4, and of the bytes
    99.9 % within 1 and none off by more than 4. bfloat16: PyTorch's float32 is expected, the
    bound the larger of 2e-2 and 1.5 x PyTorch's own bfloat16 error; bytes are not judged.
    """
    settings = override(
        defaults(read_config(folder)), {"prompt": prompt, "seed": seed, "steps": steps}
    )
    theirs = run_theirs(folder, settings, "float32")
    low = run_theirs(folder, settings, "bfloat16") if dtype == "bfloat16" else None
    ours = run_ours(against or folder, settings, dtype, mesh)
    rows: list[Row] = []
    for name, expected in theirs.items():
        bound = SAMPLING_BOUND if name.startswith(SAMPLED) else FLOAT32_BOUND
        own = relative_l2(low[name], expected) if low else None
        if own is not None:
            bound = max(BFLOAT16_BOUND, BFLOAT16_FACTOR * own)
        rows.append(compare(name, ours[name], expected, bound=bound, own_error=own))
    close, largest = _steps_apart(ours["picture (bytes)"], theirs["picture (bytes)"])
    if dtype == "float32":
        # Bytes are judged as bytes: rounding moves a value by one whole step or not at all.
        good = close >= CLOSE_SHARE and largest <= LARGEST_STEP
        remark = "" if good else f"{1 - close:.2%} beyond 1/255, the largest {largest}/255"
        rows[-1] = replace(rows[-1], bound=np.inf, remark=remark)
    note = f"{close:.4%} of the pixel values are within 1/255, the largest difference {largest}/255"
    title = f"pipeline in {dtype}: {prompt!r}, seed {seed}, {settings.steps} steps"
    return Report(title=title, rows=tuple(rows), notes=(note,))


def _steps_apart(ours: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The share of byte values within 1 of each other, and the largest difference."""
    if ours.shape != expected.shape:
        return 0.0, 255
    apart = np.abs(ours.astype(np.int64) - expected.astype(np.int64))
    return float((apart <= 1).mean()), int(apart.max())


def run_theirs(folder: Path, settings: Settings, dtype: Dtype) -> Arrays:
    """The stages of diffusers' pipeline as float32 arrays; the last are the picture's bytes."""
    torch = require_torch()
    from diffusers import FluxPipeline

    pipe: Any = FluxPipeline.from_pretrained(
        str(folder), dtype=getattr(torch, dtype), local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    size = {"height": settings.height, "width": settings.width}
    length = settings.max_sequence_length

    def generator() -> object:
        return torch.Generator("cpu").manual_seed(settings.seed)

    with torch.no_grad():
        prompt_embeds, pooled, _ = pipe.encode_prompt(
            settings.prompt, None, max_sequence_length=length
        )
        channels = pipe.transformer.config.in_channels // 4
        noise, _ = pipe.prepare_latents(
            1, channels, *size.values(), prompt_embeds.dtype, prompt_embeds.device, generator()
        )
        packed = pipe(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=generator(),
            output_type="latent",
            **size,
        ).images
        factor = pipe.vae_scale_factor
        noise, latents = (pipe._unpack_latents(x, *size.values(), factor) for x in (noise, packed))
        config = pipe.vae.config
        decoded = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    stages = {
        "prompt_embeds": prompt_embeds,
        "pooled": pooled,
        "noise": noise,
        "latents": latents,
        "picture": decoded.movedim(1, -1),
    }
    pixels = pipe.image_processor.postprocess(decoded, output_type="pil")
    arrays = {name: value.float().numpy() for name, value in stages.items()}
    return arrays | {"picture (bytes)": np.stack([np.asarray(pixel) for pixel in pixels])}


def run_ours(folder: Path, settings: Settings, dtype: Dtype, mesh: str | None = None) -> Arrays:
    """The same stages through our pipeline."""
    pipe = load_pipeline(folder, dtype=dtype, mesh=mesh)
    conditioning = pipe.encode_prompt(
        settings.prompt, max_sequence_length=settings.max_sequence_length
    )
    noise = pipe.draw_noise(settings, settings.seed)
    latents = pipe.denoise(conditioning, noise, steps=settings.steps, guidance=settings.guidance)
    decoded = pipe.decode(latents)
    stages = {
        "prompt_embeds": conditioning.sequence,
        "pooled": conditioning.vector,
        "noise": noise,
        "latents": latents,
        "picture": decoded,
    }
    arrays = {name: np.asarray(jnp.asarray(v, jnp.float32)) for name, v in stages.items()}
    return arrays | {"picture (bytes)": np.asarray(to_bytes(decoded, "diffusers"))}
