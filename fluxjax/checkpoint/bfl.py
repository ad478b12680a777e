"""The original (Black Forest Labs) form of the two FLUX networks: configurations and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxjax.checkpoint import tables
from fluxjax.checkpoint.placement import load_tree
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import as_tensor
from fluxjax.config import AutoencoderConfig, FluxConfig


def config_from_bfl(params: Mapping[str, Any]) -> FluxConfig | AutoencoderConfig:
    """BFL's FluxParams or AutoEncoderParams (as dictionaries) -> ours."""
    if "ch_mult" in params:
        return AutoencoderConfig(
            in_channels=params["in_channels"],
            out_channels=params["out_ch"],
            latent_channels=params["z_channels"],
            block_out_channels=tuple(params["ch"] * mult for mult in params["ch_mult"]),
            layers_per_block=params["num_res_blocks"],
            scaling_factor=params["scale_factor"],
            shift_factor=params["shift_factor"],
        )
    return FluxConfig(
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        num_layers=params["depth"],
        num_single_layers=params["depth_single_blocks"],
        attention_head_dim=params["hidden_size"] // params["num_heads"],
        num_attention_heads=params["num_heads"],
        joint_attention_dim=params["context_in_dim"],
        pooled_projection_dim=params["vec_in_dim"],
        guidance_embeds=params["guidance_embed"],
        axes_dims_rope=tuple(params["axes_dim"]),
        rope_theta=float(params["theta"]),
        mlp_ratio=params["mlp_ratio"],
        qkv_bias=params["qkv_bias"],
    )


def from_bfl_params(
    weights: Mapping[str, Any],
    config: FluxConfig | AutoencoderConfig,
    *,
    stacked: bool = False,
    dtype: Any = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """Arrays (or lazy tensors) under BFL's names -> our parameters as JAX arrays.

    Raises engine.MappingError listing every tensor that does not fit `config`.
    """
    lazy = {name: as_tensor(value) for name, value in weights.items()}
    template = abstract_params(config, stacked=stacked)
    if isinstance(config, FluxConfig):
        table = tables.BFL_FLUX
    else:
        table = tables.bfl_autoencoder(len(config.block_out_channels))
    return load_tree(lazy, table, template, dtype=dtype, shardings=shardings)
