"""A training step beside the same step in PyTorch: full fine-tuning and a LoRA, AdamW, float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fluxjax.config import FluxPipelineConfig, LoraConfig
from fluxjax.diff.benchmarks.bench import Measure, medians

BATCH = 16
LEARNING_RATE = 1e-6


class Batch(NamedTuple):
    """What both steps read."""

    latents: Float[np.ndarray, "b image d"]
    text: Float[np.ndarray, "b text width"]
    vector: Float[np.ndarray, "b p"]
    positions: Float[np.ndarray, "image axes"]
    mu: float
    """The logarithm by which timesteps are moved towards noise."""


def training(folder: Path, rounds: int) -> list[Measure]:
    """Forward, backward, clipping and AdamW on one batch of 96x96 pictures, both ways to train."""
    return [_measure(folder, rounds, lora=None), _measure(folder, rounds, lora=LoraConfig())]


def _measure(folder: Path, rounds: int, *, lora: LoraConfig | None) -> Measure:
    from fluxjax.checkpoint.pipeline_folder import read_flux

    config = read_flux(folder)
    batch = _random_batch(config)
    steps = {
        "fluxjax": _our_step(folder, config, batch, lora),
        "torch": _their_step(folder, batch, lora),
    }
    seconds = medians(steps, max(rounds, 15))
    way = f"LoRA of rank {lora.rank}" if lora else "full"
    return Measure(
        what=f"{folder.name}: training step, {way}, batch {BATCH}, float32",
        ours=seconds["fluxjax"],
        theirs=seconds["torch"],
        beside="diffusers, AdamW",
        wanted="1.2",
    )


def _random_batch(config: FluxPipelineConfig) -> Batch:
    from fluxjax.config.latents import latent_size
    from fluxjax.models.latents import image_ids

    c = config.transformer
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal((BATCH, *shape), np.float32)

    positions = np.array(image_ids(*latent_size(config.width, config.height, config.vae)))
    image = len(positions)
    return Batch(
        normal(image, c.in_channels),
        normal(config.max_sequence_length, c.joint_attention_dim),
        normal(c.pooled_projection_dim),
        positions,
        config.scheduler.mu(image),
    )


def _our_step(
    folder: Path, config: FluxPipelineConfig, batch: Batch, lora: LoraConfig | None
) -> Callable[[], None]:
    import jax.numpy as jnp

    from fluxjax.checkpoint.pipeline_folder import load_params
    from fluxjax.families import FLUX, Conditioning
    from fluxjax.train.flow_matching import Learner, Rows

    c = config.transformer
    params = load_params(folder, "transformer", c, stacked=False, dtype=jnp.float32)
    latents, text, vector, ids = map(jnp.asarray, batch[:4])
    rows = Rows(latents, Conditioning(text, None, vector), jnp.arange(BATCH))
    return our_step(FLUX, c, params, rows, Learner(), lora, ids=ids, mu=batch.mu)


def our_step(
    family: Any,
    network: Any,
    params: Any,
    rows: Any,
    learner: Any,
    lora: LoraConfig | None,
    *,
    ids: Any = None,
    mu: float = 0.0,
) -> Callable[[], None]:
    """One update of all of a `network` (its configuration), or of a LoRA on it, by each call."""
    import jax
    import jax.numpy as jnp

    from fluxjax.checkpoint.templates import abstract_params
    from fluxjax.models.lora import init_lora, split_scales
    from fluxjax.networks import network_of
    from fluxjax.train.flow_matching import finetune_loss
    from fluxjax.train.optimizers import learning_rates, make_optimizer
    from fluxjax.train.settings import Objective, OptimizerSettings
    from fluxjax.train.step import init_state, make_step

    trained, frozen = params, {}
    if lora:
        made = init_lora(jax.random.key(0), abstract_params(network), lora)
        adapters, scales = split_scales(made)
        trained = {learner.component: adapters}
        frozen = {"params": {learner.component: params}, "scales": {learner.component: scales}}
    settings = OptimizerSettings(learning_rate=LEARNING_RATE)
    optimizer = make_optimizer(settings, learning_rates(settings, 1000, LEARNING_RATE))
    state = init_state(trained, optimizer, ema=False)
    loss = finetune_loss(family, network_of(network).build(network), Objective(), of=learner)
    step = make_step(loss, optimizer, seed=0, ema_decay=0.0)
    empty = jax.tree.map(lambda leaf: leaf[:1], rows.conditioning)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, rows, frozen, empty, ids, jnp.float32(mu))
        metrics["loss"].block_until_ready()

    return run


def _their_step(folder: Path, batch: Batch, lora: LoraConfig | None) -> Callable[[], None]:
    import torch
    from diffusers import FluxTransformer2DModel

    from fluxjax.models.latents import text_ids

    model = FluxTransformer2DModel.from_pretrained(
        str(folder), subfolder="transformer", torch_dtype=torch.float32
    )
    clean, text, vector, positions = map(torch.from_numpy, batch[:4])
    text_positions = torch.from_numpy(np.array(text_ids(text.shape[1])))
    shift = float(np.exp(batch.mu))

    def loss() -> Any:
        t = torch.sigmoid(torch.randn(BATCH))
        t = shift * t / (shift * t + 1 - t)
        noise = torch.randn_like(clean)
        velocity = model(
            hidden_states=torch.lerp(clean, noise, t[:, None, None]),
            encoder_hidden_states=text,
            pooled_projections=vector,
            timestep=t,
            img_ids=positions,
            txt_ids=text_positions,
            guidance=torch.ones(BATCH),
        ).sample
        return torch.nn.functional.mse_loss(velocity, noise - clean)

    return their_step(model, loss, lora)


def their_step(model: Any, loss: Callable[[], Any], lora: LoraConfig | None) -> Callable[[], None]:
    """One update of all of `model`, or of a LoRA on it, by each call: clipping and fused AdamW."""
    import torch

    model.train()
    if lora:
        from peft import LoraConfig as PeftConfig

        model.requires_grad_(False)
        model.add_adapter(
            PeftConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.targets))
        )
    learned = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def run() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return run
