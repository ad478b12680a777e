"""The causal autoencoder of clips. diffusers, Tencent and Open-Sora name its tensors alike, ComfyUI
as those of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fluxjax.config import CausalAutoencoderConfig, ConfigError, from_dict
from fluxjax.networks import autoencoder
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Role, Shapes, count
from fluxjax.networks.tables import Table

PUBLISHED = Table("causal autoencoder of clips", identity=True)


def _comfy(config: CausalAutoencoderConfig) -> Table:
    table = autoencoder.bfl(len(config.block_out_channels), convolution=".conv", axes=3)
    return replace(table, name="causal autoencoder in ComfyUI's names")


def _infer(
    level: str, block: str, halving: str, shapes: Shapes, family: str
) -> CausalAutoencoderConfig:
    """`level`, `block` and `halving`: what each is called."""
    levels = count(shapes, rf"encoder\.{level}\.(\d+)\.")
    changing = [f"encoder.{level}.{i}.{halving}.conv.conv.weight" for i in range(levels)]
    if [name in shapes for name in changing] != [True, True, True, False]:
        raise ConfigError(
            "how often this autoencoder halves frames and how often pixels cannot be told from "
            "shapes (the published one has four resolutions); give its config.json with --config"
        )
    widths = tuple(
        shapes[f"encoder.{level}.{i}.{block}.0.conv1.conv.weight"][0] for i in range(levels)
    )
    groups = CausalAutoencoderConfig.norm_num_groups
    if any(width % groups for width in widths):
        raise ConfigError(
            f"an autoencoder of widths {', '.join(map(str, widths))} does not have the published "
            f"{groups} groups in its norms, and shapes do not tell how many; give its config.json "
            "with --config"
        )
    return CausalAutoencoderConfig(
        in_channels=shapes["encoder.conv_in.conv.weight"][1],
        out_channels=shapes["decoder.conv_out.conv.weight"][0],
        latent_channels=shapes["decoder.conv_in.conv.weight"][1],
        block_out_channels=widths,
        layers_per_block=count(shapes, rf"encoder\.{level}\.0\.{block}\.(\d+)\."),
    )


def _read(values: dict[str, Any]) -> dict[str, Any]:
    """Tencent's and Open-Sora's configurations name two things otherwise."""
    shift = values.get("shift_factor", 0)
    if shift != 0:
        raise ConfigError(f"shift_factor={shift!r} is not supported, only 0")
    names = {
        "scale_factor": "scaling_factor",
        "time_compression_ratio": "temporal_compression_ratio",
    }
    return {names.get(key, key): value for key, value in values.items()}


def _from_original(params: Mapping[str, Any]) -> CausalAutoencoderConfig:
    """Open-Sora's AutoEncoder3DConfig; what it leaves out is as published."""
    return from_dict(CausalAutoencoderConfig, _read(dict(params)))


def _write(config: CausalAutoencoderConfig, values: dict[str, Any]) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return values | {
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "down_block_types": ["HunyuanVideoDownBlock3D"] * levels,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * levels,
    }


def _inputs(config: CausalAutoencoderConfig) -> Arrays:
    random = np.random.default_rng(0)
    t, h, w = 3, 2, 3
    frames = (t - 1) * config.temporal_compression_ratio + 1
    scale = config.spatial_compression_ratio
    clip = random.uniform(-1, 1, (2, frames, h * scale, w * scale, config.in_channels))
    latents = random.standard_normal((2, t, h, w, config.latent_channels))
    return {"clip": clip.astype(np.float32), "latents": latents.astype(np.float32)}


def _both_ways(module: Any, clip: Any, latents: Any) -> tuple[Any, Any, Any]:
    posterior = module.encode(clip)
    return posterior.mean, posterior.logvar, module.decode(latents)


def _describe(config: CausalAutoencoderConfig) -> str:
    ratio = f"{config.temporal_compression_ratio} x {config.spatial_compression_ratio}^2 smaller"
    return f"HunyuanVideo's autoencoder, {config.latent_channels} latent channels, {ratio}"


def _module() -> type:
    from fluxjax.models.causal_autoencoder import CausalAutoencoder

    return CausalAutoencoder


_ROLES: dict[str, Role] = {
    **autoencoder.SMALL_ROLES,
    "conv": "convolution_3d",
    "quant_conv": "convolution_3d",
    "post_quant_conv": "convolution_3d",
}

CAUSAL_AUTOENCODER = Network(
    config=CausalAutoencoderConfig,
    component="vae",
    words="autoencoder of HunyuanVideo and Open-Sora",
    describe=_describe,
    module=_module,
    inputs=_inputs,
    outputs=lambda returned: dict(zip(("mean", "logvar", "decoded"), returned, strict=True)),
    json=JsonForm(
        "diffusers",
        ("AutoencoderKLHunyuanVideo", "AutoencoderKLCausal3D"),
        required={"act_fn": "silu", "mid_block_add_attention": True, "mid_block_causal_attn": True},
        read=_read,
        write=_write,
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"encoder\.down_blocks\.0\.resnets\.0\.norm1\.weight",
                r"encoder\.conv_in\.conv\.weight",
                r"decoder\.conv_in\.conv\.weight",
            ),
            lambda config: PUBLISHED,
            partial(_infer, "down_blocks", "resnets", "downsamplers.0"),
            "sample_tsize",
            _from_original,
        ),
        Dialect(
            "comfy",
            (
                r"encoder\.down\.0\.block\.0\.norm1\.weight",
                r"encoder\.conv_in\.conv\.weight",
                r"decoder\.conv_in\.conv\.weight",
                # Others have norms of norms there.
                r"decoder\.mid\.block_1\.norm1\.weight",
            ),
            _comfy,
            partial(_infer, "down", "block", "downsample"),
        ),
    ),
    roles=_ROLES,
    prefixes=("vae.",),
    file_name=lambda config: "hunyuan_vae.safetensors",
    method=_both_ways,
)
