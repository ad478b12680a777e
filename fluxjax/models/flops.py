"""Multiplications that a network needs, counted from its configuration."""

from __future__ import annotations

from fluxjax.config import FluxConfig


def flux_flops(config: FluxConfig, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of the matrix products of one forward of one picture; a multiply-add counts two."""
    d, mlp = config.inner_dim, config.mlp_dim
    joint = image_tokens + text_tokens
    double = joint * (4 * d * d + 2 * d * mlp) + 2 * d * 6 * d
    single = joint * (4 * d * d + 2 * d * mlp) + d * 3 * d
    attention = 2 * joint * joint * d
    embedded = (2 if config.guidance_embeds else 1) * (256 * d + d * d)
    embedded += config.pooled_projection_dim * d + d * d
    ends = image_tokens * (config.in_channels + config.out_channels) * d + 2 * d * d
    ends += text_tokens * config.joint_attention_dim * d
    blocks = config.num_layers * (double + attention)
    blocks += config.num_single_layers * (single + attention)
    return 2.0 * (blocks + embedded + ends)
