"""Open-Sora 2.0's transformer.

Published names are FLUX's, with `cond_in`: diffusers has no class for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fluxjax.config import ConfigError, HunyuanVideoConfig, OpenSoraConfig
from fluxjax.config.latents import PATCH
from fluxjax.networks import flux
from fluxjax.networks.network import (
    Arrays,
    Dialect,
    JsonForm,
    Network,
    Role,
    Shapes,
    TokenSplit,
)
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table("Open-Sora transformer", identity=True)
_CONDITION = Rule("cond_in", ("cond_in",))
# With q, k and v in one they rotate neighbours, as FLUX does.
_FUSED = Table("Open-Sora transformer of fused q, k and v", (*flux.BFL.rules, _CONDITION))


def _original(config: OpenSoraConfig) -> Table:
    """Open-Sora's own names: q, k and v apart. Their rotary embeddings pair channels i and i + half
    of a head, ours 2 i and 2 i + 1: rows of q and k and the scales of their norms change places."""
    rules = [rule for rule in flux.BFL.rules if not _fused_or_norm(rule)]
    size, scale = config.attention_head_dim, (("scale", "weight"),)
    attn = "transformer_blocks.{}.attn"
    for theirs, ours, norm in (("img", "to_{}", ""), ("txt", "add_{}_proj", "added_")):
        double = f"double_blocks.{{}}.{theirs}_attn"
        for part in "qkv":
            name, halved = f"{attn}.{ours.replace('{}', part)}", 0 if part == "v" else size
            rules.append(Rule(f"{double}.{part}_proj", (name,), halved_heads=halved))
        rules += _norms(f"{double}.norm", f"{attn}.norm_{norm}", size, scale)
    single, attn = "single_transformer_blocks.{}", "single_transformer_blocks.{}.attn"
    rules += [
        Rule("single_blocks.{}.q_proj", (f"{attn}.to_q",), halved_heads=size),
        Rule("single_blocks.{}.k_proj", (f"{attn}.to_k",), halved_heads=size),
        Rule("single_blocks.{}.v_mlp", (f"{attn}.to_v", f"{single}.proj_mlp")),
        *_norms("single_blocks.{}.norm", f"{attn}.norm_", size, scale),
        _CONDITION,
    ]
    return Table("Open-Sora transformer", tuple(rules))


def _fused_or_norm(rule: Rule) -> bool:
    return rule.theirs.endswith((".qkv", ".linear1", "_norm"))


def _norms(theirs: str, ours: str, size: int, leaves: tuple[tuple[str, str], ...]) -> list[Rule]:
    return [
        Rule(f"{theirs}.{name}_norm", (f"{ours}{name[0]}",), halved_heads=size, leaves=leaves)
        for name in ("query", "key")
    ]


def _infer_published(shapes: Shapes, family: str) -> OpenSoraConfig:
    return _conditioned(flux.infer_published(shapes, ""), shapes)


def _infer_original(shapes: Shapes, family: str) -> OpenSoraConfig:
    return _conditioned(flux.infer_bfl(shapes, ""), shapes)


def _conditioned(blocks: Any, shapes: Shapes) -> OpenSoraConfig:
    extra = shapes["cond_in.weight"][1] - blocks.in_channels
    patch = round(max(extra, 0) ** 0.5)
    if patch < 1 or patch**2 != extra:
        raise ConfigError(
            f"cond_in has {shapes['cond_in.weight'][1]} inputs, which must be the {extra} = "
            f"patch x patch values of a mask more than the {blocks.in_channels} of img_in"
        )
    fields = {field.name: getattr(blocks, field.name) for field in dataclasses.fields(blocks)}
    # Of Open-Sora's names infer_bfl knows those of fused q, k and v.
    bias = any(name.endswith(("q_proj.bias", "qkv.bias", "to_q.bias")) for name in shapes)
    return OpenSoraConfig(**{**fields, "qkv_bias": bias}, patch_size=patch)


def _from_original(params: Mapping[str, Any]) -> OpenSoraConfig:
    """Open-Sora's MMDiTConfig. What it fuses does not matter here, the names tell."""
    if not params["cond_embed"]:
        raise ConfigError("an Open-Sora transformer without a condition (cond_embed) is not read")
    blocks = flux.from_bfl({**params, "out_channels": params["in_channels"]})
    fields = {field.name: getattr(blocks, field.name) for field in dataclasses.fields(blocks)}
    return OpenSoraConfig(**fields, patch_size=params["patch_size"])


def _inputs(config: OpenSoraConfig) -> Arrays:
    """A clip of three latent frames of 3 x 2 tokens."""
    random, frames, rows, columns = np.random.default_rng(1), 3, 3, 2
    inputs = flux.inputs(config, rows, columns)
    frame = np.repeat(np.arange(frames, dtype=np.float32), rows * columns)[:, None]
    inputs["img_ids"] = np.tile(inputs["img_ids"], (frames, 1)) + frame * np.array(
        [1, 0, 0], np.float32
    )
    tokens = frames * rows * columns
    for name, channels in (
        ("hidden_states", config.in_channels),
        ("condition", config.cond_channels),
    ):
        inputs[name] = random.standard_normal((2, tokens, channels)).astype(np.float32)
    return inputs


def _whole(
    run: Any,
    hidden_states: Any,
    condition: Any,
    encoder_hidden_states: Any,
    pooled_projections: Any,
    timestep: Any,
    img_ids: Any,
    txt_ids: Any,
) -> tuple:
    return (
        hidden_states,
        run("embed_condition", condition),
        run("embed_text", encoder_hidden_states),
        run("modulations", timestep, pooled_projections),
        run("rope", txt_ids, img_ids),
    )


def _describe(config: OpenSoraConfig) -> str:
    blocks = f"{config.num_layers} + {config.num_single_layers} blocks"
    return f"Open-Sora 2.0's transformer, {blocks} of width {config.inner_dim}"


def _module() -> type:
    from fluxjax.models.open_sora import OpenSoraTransformer

    return OpenSoraTransformer


def held(config: OpenSoraConfig | HunyuanVideoConfig, latents: int, text_tokens: int) -> int:
    """FLUX's, of tokens of another size."""
    return flux.held(config, latents * PATCH**2 // config.patch_size**2, text_tokens)


def _flops(config: OpenSoraConfig, image_tokens: int, text_tokens: int) -> float:
    """Without the condition's embedding, which a run computes once."""
    return flux.flops(config, image_tokens, text_tokens)


_ROLES: dict[str, Role] = {
    **{end: role for end, role in flux.ROLES.items() if not end.startswith("guidance")},
    "cond_in": "whole",
}

OPEN_SORA = Network(
    config=OpenSoraConfig,
    component="transformer",
    words="Open-Sora transformer",
    describe=_describe,
    module=_module,
    inputs=_inputs,
    outputs=lambda sample: {"sample": sample},
    json=JsonForm("diffusers", ("MMDiTModel",)),
    dialects=(
        Dialect(
            "published",
            (
                r"cond_in\.weight",
                r"time_text_embed\.timestep_embedder\.linear_1\.weight",
            ),
            lambda config: PUBLISHED,
            _infer_published,
        ),
        Dialect(
            "bfl",
            (
                r"cond_in\.weight",
                r"double_blocks\.0\.img_attn\.q_proj\.weight|single_blocks\.0\.q_proj\.weight",
            ),
            _original,
            _infer_original,
            "cond_embed",
            _from_original,
        ),
        Dialect(
            "fused",
            (
                r"cond_in\.weight",
                r"double_blocks\.0\.img_attn\.qkv\.weight|single_blocks\.0\.linear1\.weight",
            ),
            lambda config: _FUSED,
            _infer_original,
        ),
    ),
    roles=_ROLES,
    family="Open-Sora 2.0",
    file_name=lambda config: "Open_Sora_v2.safetensors",
    before_steps=flux.FLUX.before_steps,
    quantised=flux.FLUX.quantised,
    scanned=flux.FLUX.scanned,
    blocks=flux.FLUX.blocks,
    token_split=TokenSplit(
        "denoise",
        (("image", 1), ("image", 1), ("text", 1), None, ("joint", 0)),
        _whole,
        lambda config: config.num_attention_heads,
    ),
    adapter_prefixes=flux.FLUX.adapter_prefixes,
    # In its own names rows of queries and keys are in another order.
    adapter_dialect=lambda config, naming: "published",
    held=held,
    flops=_flops,
)
