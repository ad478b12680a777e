"""HunyuanVideo's transformer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fluxjax.config import ConfigError, FluxConfig, HunyuanVideoConfig
from fluxjax.networks import flux
from fluxjax.networks.network import (
    Arrays,
    Dialect,
    JsonForm,
    Network,
    Role,
    Shapes,
    TokenSplit,
    count,
)
from fluxjax.networks.open_sora import held
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table("diffusers HunyuanVideo transformer", identity=True)
TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "HunyuanVideo text to video", "HunyuanVideo image to video"


def _tencent() -> Table:
    """The original names, which most of ComfyUI's files have too."""
    rules = [
        Rule("img_in.proj", ("x_embedder.proj",)),
        Rule("final_layer.linear", ("proj_out",)),
        # Tencent (shift, scale), diffusers (scale, shift).
        Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
        *_embedder("vector_in.in_layer", "vector_in.out_layer", "time_text_embed.text_embedder"),
        *_embedder("time_in.mlp.0", "time_in.mlp.2", "time_text_embed.timestep_embedder"),
        *_embedder("guidance_in.mlp.0", "guidance_in.mlp.2", "time_text_embed.guidance_embedder"),
        *_refiner(),
    ]
    block, attn = "transformer_blocks.{}", "transformer_blocks.{}.attn"
    for theirs, norm, qkv, out, ff, added in (
        ("img", "norm1", "to_{}", "to_out.0", "ff", ""),
        ("txt", "norm1_context", "add_{}_proj", "to_add_out", "ff_context", "added_"),
    ):
        double = f"double_blocks.{{}}.{theirs}"
        rules += [
            Rule(f"{double}_mod.linear", (f"{block}.{norm}.linear",)),
            Rule(f"{double}_attn_qkv", tuple(f"{attn}.{qkv.replace('{}', x)}" for x in "qkv")),
            Rule(f"{double}_attn_q_norm", (f"{attn}.norm_{added}q",)),
            Rule(f"{double}_attn_k_norm", (f"{attn}.norm_{added}k",)),
            Rule(f"{double}_attn_proj", (f"{attn}.{out}",)),
            Rule(f"{double}_mlp.fc1", (f"{block}.{ff}.net.0.proj",)),
            Rule(f"{double}_mlp.fc2", (f"{block}.{ff}.net.2",)),
        ]
    single, attn = "single_transformer_blocks.{}", "single_transformer_blocks.{}.attn"
    rules += [
        Rule("single_blocks.{}.modulation.linear", (f"{single}.norm.linear",)),
        Rule(
            "single_blocks.{}.linear1",
            (*(f"{attn}.to_{x}" for x in "qkv"), f"{single}.proj_mlp"),
        ),
        Rule("single_blocks.{}.linear2", (f"{single}.proj_out",)),
        Rule("single_blocks.{}.q_norm", (f"{attn}.norm_q",)),
        Rule("single_blocks.{}.k_norm", (f"{attn}.norm_k",)),
    ]
    return Table("Tencent HunyuanVideo transformer", tuple(rules))


def _embedder(first: str, second: str, ours: str) -> list[Rule]:
    return [Rule(first, (f"{ours}.linear_1",)), Rule(second, (f"{ours}.linear_2",))]


def _refiner() -> list[Rule]:
    embed = "context_embedder.time_text_embed"
    theirs = "txt_in.individual_token_refiner.blocks.{}"
    ours = "context_embedder.token_refiner.refiner_blocks.{}"
    return [
        Rule("txt_in.input_embedder", ("context_embedder.proj_in",)),
        *_embedder(
            "txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2", f"{embed}.timestep_embedder"
        ),
        *_embedder(
            "txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2", f"{embed}.text_embedder"
        ),
        Rule(f"{theirs}.self_attn_qkv", tuple(f"{ours}.attn.to_{x}" for x in "qkv")),
        Rule(f"{theirs}.self_attn_proj", (f"{ours}.attn.to_out.0",)),
        Rule(f"{theirs}.mlp.fc1", (f"{ours}.ff.net.0.proj",)),
        Rule(f"{theirs}.mlp.fc2", (f"{ours}.ff.net.2",)),
        Rule(f"{theirs}.adaLN_modulation.1", (f"{ours}.norm_out.linear",)),
        *(Rule(f"{theirs}.{norm}", (f"{ours}.{norm}",)) for norm in ("norm1", "norm2")),
    ]


TENCENT = _tencent()


_COMFY_MODULES = {
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer",
    "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
    "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
    "attn_qkv": "attn.qkv",
    "attn_proj": "attn.proj",
    "attn_q_norm": "attn.norm.query_norm",
    "attn_k_norm": "attn.norm.key_norm",
    "}.q_norm": "}.norm.query_norm",
    "}.k_norm": "}.norm.key_norm",
}
"""What ComfyUI calls modules, so that they are named as FLUX's."""


def _comfy() -> Table:
    """The names that files which ComfyUI has saved have."""
    rules = []
    for rule in TENCENT.rules:
        for theirs, comfys in _COMFY_MODULES.items():
            rule = dataclasses.replace(rule, theirs=rule.theirs.replace(theirs, comfys))
        if rule.theirs.endswith(("query_norm", "key_norm")):
            rule = dataclasses.replace(rule, leaves=(("scale", "weight"),))
        rules.append(rule)
    return Table("HunyuanVideo transformer in ComfyUI's names", tuple(rules))


COMFY = _comfy()
ADAPTER_RULES = (*TENCENT.rules, *COMFY.rules)


def _infer_published(shapes: Shapes, family: str) -> HunyuanVideoConfig:
    renamed = {
        **shapes,
        "x_embedder.weight": shapes["x_embedder.proj.weight"][:2],
        "context_embedder.weight": shapes["context_embedder.proj_in.weight"],
    }
    blocks = flux.infer_published(renamed, "")
    refiner = r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\."
    return _of_video(blocks, shapes["x_embedder.proj.weight"], count(shapes, refiner), family)


def _infer_tencent(shapes: Shapes, family: str) -> HunyuanVideoConfig:
    double = "double_blocks.0.img"
    renamed = {
        **shapes,
        f"{double}_attn.norm.query_norm.scale": shapes[f"{double}_attn_q_norm.weight"],
        f"{double}_mlp.2.weight": shapes[f"{double}_mlp.fc2.weight"],
    }
    if "guidance_in.mlp.0.weight" in shapes:
        renamed["guidance_in.in_layer.weight"] = shapes["guidance_in.mlp.0.weight"]
    return _infer_comfy(renamed, family)


def _infer_comfy(shapes: Shapes, family: str) -> HunyuanVideoConfig:
    renamed = {
        **shapes,
        "img_in.weight": shapes["img_in.proj.weight"][:2],
        "txt_in.weight": shapes["txt_in.input_embedder.weight"],
    }
    blocks = flux.infer_bfl(renamed, "")
    refiner = r"txt_in\.individual_token_refiner\.blocks\.(\d+)\."
    return _of_video(blocks, shapes["img_in.proj.weight"], count(shapes, refiner), family)


def _of_video(
    blocks: FluxConfig, patches: tuple[int, ...], refiner_layers: int, family: str
) -> HunyuanVideoConfig:
    """`patches`: the shape of the first convolution."""
    _, channels, _, rows, columns = patches
    if rows != columns:
        raise ConfigError(f"patches of {rows} x {columns} latents are not square")
    latents = blocks.out_channels // rows**2
    condition = None
    if channels == 2 * latents + 1:
        condition = "latent_concat"
    elif channels == latents and family == IMAGE_TO_VIDEO:
        condition = "token_replace"
    elif channels == latents and family != TEXT_TO_VIDEO:
        raise ConfigError(
            "HunyuanVideo's transformers for text to video and for image to video by token_replace "
            "have the same names and shapes: give the text encoders that it is drawn with, or say "
            "which it is with --family hunyuan-video or hunyuan-video-i2v, or give the network's "
            "config.json with --config"
        )
    fields = {field.name: getattr(blocks, field.name) for field in dataclasses.fields(blocks)}
    fields |= {"in_channels": channels * rows**2, "rope_theta": 256.0, "qkv_bias": True}
    return HunyuanVideoConfig(
        **fields,
        patch_size=rows,
        num_refiner_layers=refiner_layers,
        image_condition_type=condition,
    )


_RENAMED = {"text_embed_dim": "joint_attention_dim", "rope_axes_dim": "axes_dims_rope"}


def _read(values: dict[str, Any]) -> dict[str, Any]:
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    values.setdefault("out_channels", values["in_channels"])
    patch = values["patch_size"]
    for name in ("in_channels", "out_channels"):  # of a latent there, of a token here
        if type(values[name]) is type(patch) is int:
            values[name] *= patch**2
    return values


def _write(config: HunyuanVideoConfig, values: dict[str, Any]) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _RENAMED.items()}
    values = {names.get(name, name): value for name, value in values.items()}
    for name in ("in_channels", "out_channels"):
        values[name] //= config.patch_size**2
    del values["qkv_bias"]  # no such key
    return {**values, "patch_size_t": 1, "qk_norm": "rms_norm"}


def _inputs(config: HunyuanVideoConfig) -> Arrays:
    """Two clips of three latent frames of 3 x 2 tokens, and text without padding, of which other
    code makes something else that nothing sees."""
    random, patch = np.random.default_rng(0), config.patch_size
    channels, text = config.in_channels // patch**2, 12
    found = {
        "hidden_states": random.standard_normal((2, channels, 3, 3 * patch, 2 * patch)),
        "timestep": np.array([500.0, 250.0]),  # exact in bfloat16
        "encoder_hidden_states": random.standard_normal((2, text, config.joint_attention_dim)),
        "encoder_attention_mask": np.ones((2, text)),
        "pooled_projections": random.standard_normal((2, config.pooled_projection_dim)),
    }
    if config.guidance_embeds:
        found["guidance"] = np.array([1.0, 0.5])
    return {name: value.astype(np.float32) for name, value in found.items()}


def _whole(
    run: Any,
    hidden_states: Any,
    timestep: Any,
    encoder_hidden_states: Any,
    encoder_attention_mask: Any,
    pooled_projections: Any,
    guidance: Any = None,
) -> tuple:
    size = hidden_states.shape[2:]
    lengths = encoder_attention_mask.sum(axis=1).astype(np.int32)
    tokens = run("pack", hidden_states)
    return (
        tokens,
        run("embed_text", encoder_hidden_states, timestep, lengths),
        run("modulations", timestep, pooled_projections, guidance),
        run("positions", *size, encoder_hidden_states.shape[1]),
        tokens.shape[1] + lengths,
        run("replaced", *size),
    )


def _result(run: Any, tokens: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
    return run("unpack", tokens, *hidden_states.shape[3:])


def _describe(config: HunyuanVideoConfig) -> str:
    kind = {
        None: "text to video",
        "latent_concat": "image to video by latent_concat",
        "token_replace": "image to video by token_replace",
    }[config.image_condition_type]
    blocks = f"{config.num_layers} + {config.num_single_layers} blocks"
    return f"HunyuanVideo's transformer, {kind}, {blocks} of width {config.inner_dim}"


def _module() -> type:
    from fluxjax.models.hunyuan_video import HunyuanVideoTransformer

    return HunyuanVideoTransformer


def flops(config: HunyuanVideoConfig, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of the matrix products of one forward of one video; a multiply-add counts two."""
    d = config.inner_dim
    block = text_tokens * 12 * d * d + 2 * text_tokens**2 * d + 2 * d * d
    embedded = 256 * d + config.joint_attention_dim * d + 2 * d * d
    refiner = config.num_refiner_layers * block + embedded
    return flux.flops(config, image_tokens, text_tokens) + 2.0 * refiner


_ROLES: dict[str, Role] = {
    **{
        end: role
        for end, role in flux.ROLES.items()
        if end not in ("x_embedder", "context_embedder")
    },
    "x_embedder/proj": "convolution_3d",
    "context_embedder/proj_in": "whole",
    "norm1": "copied",
    "norm2": "copied",
}

HUNYUAN_VIDEO = Network(
    config=HunyuanVideoConfig,
    component="transformer",
    words="HunyuanVideo transformer",
    describe=_describe,
    module=_module,
    inputs=_inputs,
    outputs=lambda sample: {"sample": sample},
    json=JsonForm(
        "diffusers",
        ("HunyuanVideoTransformer3DModel",),
        defaults={"in_channels": 16, "patch_size": 2},
        required={"patch_size_t": 1, "qk_norm": "rms_norm"},
        read=_read,
        write=_write,
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"x_embedder\.proj\.weight",
                r"context_embedder\.token_refiner\.refiner_blocks\.0\.attn\.to_q\.weight",
            ),
            lambda config: PUBLISHED,
            _infer_published,
        ),
        Dialect(
            "bfl",
            (
                r"img_in\.proj\.weight",
                r"txt_in\.individual_token_refiner\.blocks\.0\.self_attn_qkv\.weight",
            ),
            lambda config: TENCENT,
            _infer_tencent,
        ),
        Dialect(
            "comfy",
            (
                r"img_in\.proj\.weight",
                r"txt_in\.individual_token_refiner\.blocks\.0\.self_attn\.qkv\.weight",
            ),
            lambda config: COMFY,
            _infer_comfy,
        ),
    ),
    roles=_ROLES,
    family="HunyuanVideo",
    prefixes=("model.model.",),
    file_name=lambda config: "hunyuan_video.safetensors",
    before_steps=flux.FLUX.before_steps,
    gguf_architecture=lambda config: "hyvid",
    quantised=flux.FLUX.quantised,
    scanned=flux.FLUX.scanned,
    blocks=flux.FLUX.blocks,
    token_split=TokenSplit(
        "denoise",
        (("image", 1), ("text", 1), None, ("joint", 0), None, ("image", 0)),
        _whole,
        lambda config: config.num_attention_heads,
        result=_result,
        text_last=True,
    ),
    adapter_prefixes=flux.FLUX.adapter_prefixes,
    adapter_rules=lambda shapes: ADAPTER_RULES,
    held=held,
    flops=flops,
)
