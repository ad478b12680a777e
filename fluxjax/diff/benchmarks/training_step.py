"""A training step beside the same step in PyTorch: full fine-tuning and a LoRA, AdamW, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.diff.benchmarks.bench import Measure, medians

BATCH = 16


def training(folder: Path, rounds: int) -> list[Measure]:
    """Forward, backward, clipping and AdamW on one batch of 96x96 pictures, both ways to train."""
    return [_measure(folder, rounds, lora=False), _measure(folder, rounds, lora=True)]


def _measure(folder: Path, rounds: int, *, lora: bool) -> Measure:
    import jax
    import jax.numpy as jnp
    import torch
    from diffusers import FluxTransformer2DModel

    from fluxjax.checkpoint.pipeline_folder import load_params, read_flux
    from fluxjax.checkpoint.templates import abstract_params
    from fluxjax.config import LoraConfig
    from fluxjax.config.latents import latent_size
    from fluxjax.families import FLUX, Conditioning
    from fluxjax.models.flux import FluxTransformer
    from fluxjax.models.latents import image_ids, text_ids
    from fluxjax.models.lora import init_lora, split_scales
    from fluxjax.train.flow_matching import Rows, finetune_loss
    from fluxjax.train.optimizers import learning_rates, make_optimizer
    from fluxjax.train.settings import Objective, OptimizerSettings
    from fluxjax.train.step import init_state, make_step

    config = read_flux(folder)
    c = config.transformer
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    ids = image_ids(*latent_size(config.width, config.height, config.vae))
    image, text = len(ids), config.max_sequence_length
    arrays = (
        normal(BATCH, image, c.in_channels),
        normal(BATCH, text, c.joint_attention_dim),
        normal(BATCH, c.pooled_projection_dim),
    )
    adapter = LoraConfig()

    # Ours.
    model = FluxTransformer(c)
    params = load_params(folder, "transformer", c, stacked=False, dtype=jnp.float32)
    settings = OptimizerSettings(learning_rate=1e-6)
    optimizer = make_optimizer(settings, learning_rates(settings, 1000, 1e-6))
    frozen: dict[str, Any] = {}
    trained = params
    if lora:
        abstract = abstract_params(c)
        trained, scales = split_scales(init_lora(jax.random.key(0), abstract, adapter))
        trained = {"transformer": trained}
        frozen = {"params": {"transformer": params}, "scales": {"transformer": scales}}
    state = init_state(trained, optimizer, ema=False)
    step = make_step(finetune_loss(FLUX, model, Objective()), optimizer, seed=0, ema_decay=0.0)
    latents, states, pooled = map(jnp.asarray, arrays)
    rows = Rows(latents, Conditioning(states, None, pooled), jnp.arange(BATCH))
    empty = Conditioning(states[:1], None, pooled[:1])
    mu = jnp.float32(config.scheduler.mu(image))

    def run_ours() -> None:
        nonlocal state
        state, metrics = step(state, rows, frozen, empty, ids, mu)
        metrics["loss"].block_until_ready()

    # Theirs.
    theirs = FluxTransformer2DModel.from_pretrained(
        str(folder), subfolder="transformer", torch_dtype=torch.float32
    ).train()
    if lora:
        from peft import LoraConfig as PeftConfig

        theirs.requires_grad_(False)
        theirs.add_adapter(
            PeftConfig(
                r=adapter.rank, lora_alpha=int(adapter.alpha), target_modules=list(adapter.targets)
            )
        )
    learned = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learned, lr=1e-6, weight_decay=0.01, fused=True)
    clean, encoded, vector = map(torch.from_numpy, arrays)
    positions = torch.from_numpy(np.array(ids)), torch.from_numpy(np.array(text_ids(text)))
    shift = float(np.exp(config.scheduler.mu(image)))

    def run_theirs() -> None:
        t = torch.sigmoid(torch.randn(BATCH))
        t = shift * t / (shift * t + 1 - t)
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, t[:, None, None])
        velocity = theirs(
            hidden_states=noisy,
            encoder_hidden_states=encoded,
            pooled_projections=vector,
            timestep=t,
            img_ids=positions[0],
            txt_ids=positions[1],
            guidance=torch.ones(BATCH),
        ).sample
        torch.nn.functional.mse_loss(velocity, noise - clean).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    seconds = medians({"fluxjax": run_ours, "torch": run_theirs}, max(rounds, 15))
    way = f"LoRA of rank {adapter.rank}" if lora else "full"
    return Measure(
        what=f"{folder.name}: training step, {way}, batch {BATCH}, float32",
        ours=seconds["fluxjax"],
        theirs=seconds["torch"],
        beside="diffusers, AdamW",
        wanted="1.2",
    )
