"""The FLUX transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fluxjax.config import ConfigError, FluxConfig
from fluxjax.config.latents import PATCH
from fluxjax.networks.network import (
    TRANSFORMER_PREFIXES,
    Arrays,
    Dialect,
    JsonForm,
    Network,
    Role,
    Shapes,
    TokenSplit,
    count,
)
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table("diffusers FLUX transformer", identity=True)
_OTHERS = (
    r"controlnet_blocks\.0\.weight|controlnet_x_embedder\.weight|pos_embed_input\..*",
    r"cond_in\.weight",  # Open-Sora
    r"(x_embedder|img_in)\.proj\.weight",  # HunyuanVideo
)
_SCALE = (("scale", "weight"),)


def _bfl() -> Table:
    rules = [
        Rule("img_in", ("x_embedder",)),
        Rule("txt_in", ("context_embedder",)),
        Rule("final_layer.linear", ("proj_out",)),
        # BFL (shift, scale), diffusers (scale, shift).
        Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    ]
    for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        embedder = f"time_text_embed.{ours}_embedder"
        rules += [
            Rule(f"{theirs}_in.in_layer", (f"{embedder}.linear_1",)),
            Rule(f"{theirs}_in.out_layer", (f"{embedder}.linear_2",)),
        ]
    block, attn = "transformer_blocks.{}", "transformer_blocks.{}.attn"
    for theirs, norm, qkv, out, ff, added in (
        ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", ""),
        (
            "txt",
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out",
            "ff_context",
            "added_",
        ),
    ):
        double = f"double_blocks.{{}}.{theirs}"
        rules += [
            Rule(f"{double}_mod.lin", (f"{block}.{norm}.linear",)),
            Rule(f"{double}_attn.qkv", tuple(f"{attn}.{name}" for name in qkv)),
            Rule(f"{double}_attn.norm.query_norm", (f"{attn}.norm_{added}q",), leaves=_SCALE),
            Rule(f"{double}_attn.norm.key_norm", (f"{attn}.norm_{added}k",), leaves=_SCALE),
            Rule(f"{double}_attn.proj", (f"{attn}.{out}",)),
            Rule(f"{double}_mlp.0", (f"{block}.{ff}.net.0.proj",)),
            Rule(f"{double}_mlp.2", (f"{block}.{ff}.net.2",)),
        ]
    single = "single_transformer_blocks.{}"
    rules += [
        Rule("single_blocks.{}.modulation.lin", (f"{single}.norm.linear",)),
        Rule(
            "single_blocks.{}.linear1",
            (
                f"{single}.attn.to_q",
                f"{single}.attn.to_k",
                f"{single}.attn.to_v",
                f"{single}.proj_mlp",
            ),
        ),
        Rule("single_blocks.{}.linear2", (f"{single}.proj_out",)),
        Rule("single_blocks.{}.norm.query_norm", (f"{single}.attn.norm_q",), leaves=_SCALE),
        Rule("single_blocks.{}.norm.key_norm", (f"{single}.attn.norm_k",), leaves=_SCALE),
    ]
    return Table("BFL FLUX transformer", tuple(rules))


BFL = _bfl()
_DOUBLE, _SINGLE = "transformer_blocks.{}.attn", "single_transformer_blocks.{}"
_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# Adapters of x-flux. A single block's qkv_lora sees the first rows of linear1 only.
_XLABS = (
    Rule("double_blocks.{}.processor.qkv_lora1", tuple(f"{_DOUBLE}.{name}" for name in _QKV)),
    Rule("double_blocks.{}.processor.qkv_lora2", tuple(f"{_DOUBLE}.{name}" for name in _ADDED)),
    Rule("double_blocks.{}.processor.proj_lora1", (f"{_DOUBLE}.to_out.0",)),
    Rule("double_blocks.{}.processor.proj_lora2", (f"{_DOUBLE}.to_add_out",)),
    Rule("single_blocks.{}.processor.qkv_lora", tuple(f"{_SINGLE}.attn.{name}" for name in _QKV)),
    Rule("single_blocks.{}.processor.proj_lora", (f"{_SINGLE}.proj_out",)),
)


def infer_published(shapes: Shapes, family: str) -> FluxConfig:
    """Sizes from the shapes under diffusers' names; KeyError for a tensor that is missing."""
    embed, double, single = "time_text_embed", "transformer_blocks", "single_transformer_blocks"
    return _infer(
        shapes,
        ends=("x_embedder", "context_embedder", f"{embed}.text_embedder.linear_1"),
        last="proj_out",
        blocks=(double, single),
        norms=(f"{double}.0.attn.norm_q.weight", f"{single}.0.attn.norm_q.weight"),
        mlps=(f"{double}.0.ff.net.2.weight", f"{single}.0.proj_out.weight"),
        guidance=f"{embed}.guidance_embedder.linear_1.weight",
        bias=("attn.to_q.bias",),
    )


def infer_bfl(shapes: Shapes, family: str) -> FluxConfig:
    """Likewise under BFL's names."""
    double, single = "double_blocks", "single_blocks"
    return _infer(
        shapes,
        ends=("img_in", "txt_in", "vector_in.in_layer"),
        last="final_layer.linear",
        blocks=(double, single),
        norms=(f"{double}.0.img_attn.norm.query_norm.scale", f"{single}.0.norm.query_norm.scale"),
        mlps=(f"{double}.0.img_mlp.2.weight", f"{single}.0.linear2.weight"),
        guidance="guidance_in.in_layer.weight",
        bias=("qkv.bias", "linear1.bias"),
    )


def _infer(
    shapes: Shapes,
    *,
    ends: tuple[str, ...],
    last: str,
    blocks: tuple[str, str],
    norms: tuple[str, str],
    mlps: tuple[str, str],
    guidance: str,
    bias: tuple[str, ...],
) -> FluxConfig:
    image, text, pooled = (shapes[f"{name}.weight"] for name in ends)
    _refuse_other_widths(shapes, [f"{name}.weight" for name in ends])
    inner = image[0]
    head_dim = next((shapes[name][0] for name in norms if name in shapes), 0)
    if head_dim != 128:
        raise ConfigError(
            f"how heads of {head_dim} are divided among the RoPE axes cannot be told from shapes "
            "(only heads of 128 are published: 16, 56, 56); give the network's config.json"
        )
    # The single blocks' last layer reads [attention, mlp].
    mlp = shapes[mlps[0]][1] if mlps[0] in shapes else shapes[mlps[1]][1] - inner
    return FluxConfig(
        in_channels=image[1],
        # A ControlNet's blocks have no end.
        out_channels=shapes.get(f"{last}.weight", (image[1],))[0],
        num_layers=count(shapes, rf"{blocks[0]}\.(\d+)\."),
        num_single_layers=count(shapes, rf"{blocks[1]}\.(\d+)\."),
        attention_head_dim=head_dim,
        num_attention_heads=inner // head_dim,
        joint_attention_dim=text[1],
        pooled_projection_dim=pooled[1],
        guidance_embeds=guidance in shapes,
        mlp_ratio=mlp / inner,
        qkv_bias=any(name.endswith(bias) for name in shapes),
    )


def _refuse_other_widths(shapes: Shapes, names: list[str]) -> None:
    """Raises ConfigError, naming it, for the one of three first layers that is not as wide as the
    other two, or no matrix."""
    rows = [shapes[name][0] if len(shapes[name]) == 2 else 0 for name in names]
    width = max(rows, key=lambda each: (rows.count(each), each))
    for name, mine in zip(names, rows, strict=True):
        if mine != width or not all(shapes[name]):
            others = " and ".join(other for other in names if other != name)
            raise ConfigError(
                f"{name} is {list(shapes[name])}, and should be [{width or 'width'}, its inputs]: "
                f"as many rows as {others} have"
            )


def from_bfl(params: Mapping[str, Any]) -> FluxConfig:
    """BFL's FluxParams."""
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


def _read(values: dict[str, Any]) -> dict[str, Any]:
    return {"out_channels": values.get("in_channels", 64), **values}


def _write(config: FluxConfig, values: dict[str, Any]) -> dict[str, Any]:
    # diffusers knows one value of these and no such key.
    fixed = {"rope_theta": 10000.0, "mlp_ratio": 4.0, "qkv_bias": True}
    kept = {k: v for k, v in values.items() if k not in fixed or v != fixed[k]}
    return {**kept, "patch_size": 1}


def inputs(config: FluxConfig, rows: int = 6, columns: int = 5) -> Arrays:
    # More image than text tokens, so that a mix-up of the two shows in the shapes.
    random = np.random.default_rng(0)
    text, image = 12, rows * columns
    img_ids = np.zeros((rows, columns, 3), np.float32)
    img_ids[..., 1] = np.arange(rows)[:, None]
    img_ids[..., 2] = np.arange(columns)[None, :]
    found = {
        "hidden_states": random.standard_normal((2, image, config.in_channels)),
        "encoder_hidden_states": random.standard_normal((2, text, config.joint_attention_dim)),
        "pooled_projections": random.standard_normal((2, config.pooled_projection_dim)),
        # Exact in bfloat16 also after the multiplication by 1000: 3.5 would become 3504 there, and
        # float32 be no measure for it.
        "timestep": np.array([0.5, 0.25]),
        "img_ids": img_ids.reshape(image, 3),
        "txt_ids": np.zeros((text, 3)),
    }
    if config.guidance_embeds:
        found["guidance"] = np.array([1.0, 0.5])
    return {name: value.astype(np.float32) for name, value in found.items()}


def _whole(
    run,
    hidden_states,
    encoder_hidden_states,
    pooled_projections,
    timestep,
    img_ids,
    txt_ids,
    guidance=None,
    *guides,
) -> tuple:
    return (
        hidden_states,
        run("embed_text", encoder_hidden_states),
        run("modulations", timestep, pooled_projections, guidance),
        run("rope", txt_ids, img_ids),
        *guides,
    )


def _variant(config: FluxConfig) -> str:
    special = {384: "fill-dev", 128: "control-dev"}
    return special.get(config.in_channels, "dev" if config.guidance_embeds else "schnell")


def _describe(config: FluxConfig) -> str:
    variant = {
        "fill-dev": "Fill",
        "control-dev": "Canny or Depth",
        "dev": "dev (or Kontext, Krea)",
        "schnell": "schnell",
    }[_variant(config)]
    blocks = f"{config.num_layers} + {config.num_single_layers} blocks"
    return f"FLUX.1 {variant} transformer, {blocks} of width {config.inner_dim}"


def _module() -> type:
    from fluxjax.models.flux import FluxTransformer

    return FluxTransformer


def held(config: FluxConfig, latents: int, text_tokens: int) -> int:
    """A single block's: its input, q, k and v, and the MLP's four widths."""
    width = config.num_attention_heads * config.attention_head_dim
    return (latents // PATCH**2 + text_tokens) * width * 8


def flops(config: FluxConfig, image_tokens: int, text_tokens: int) -> float:
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


ROLES: dict[str, Role] = {
    "x_embedder": "whole",
    "context_embedder": "whole",
    "proj_out": "whole",
    "norm/linear": "modulation",
    "norm1/linear": "modulation",
    "norm1_context/linear": "modulation",
    "norm_out/linear": "modulation",
    # The embedders of timestep, guidance and text.
    "timestep_embedder/linear_1": "columns",
    "timestep_embedder/linear_2": "rows",
    "guidance_embedder/linear_1": "columns",
    "guidance_embedder/linear_2": "rows",
    "text_embedder/linear_1": "columns",
    "text_embedder/linear_2": "rows",
    # Attention.
    "attn/to_q": "columns",
    "attn/to_k": "columns",
    "attn/to_v": "columns",
    "attn/add_q_proj": "columns",
    "attn/add_k_proj": "columns",
    "attn/add_v_proj": "columns",
    "attn/to_out_0": "rows",
    "attn/to_add_out": "rows",
    "attn/norm_q": "copied",
    "attn/norm_k": "copied",
    "attn/norm_added_q": "copied",
    "attn/norm_added_k": "copied",
    # MLPs; the single blocks' last layer ends attention and MLP.
    "net_0/proj": "columns",
    "net_2": "rows",
    "proj_mlp": "columns",
    "single_transformer_blocks/proj_out": "rows",
}

FLUX = Network(
    config=FluxConfig,
    component="transformer",
    words="FLUX transformer",
    describe=_describe,
    module=_module,
    inputs=inputs,
    outputs=lambda sample: {"sample": sample},
    json=JsonForm(
        "diffusers",
        ("FluxTransformer2DModel",),
        defaults={"guidance_embeds": False},
        required={"patch_size": 1},
        read=_read,
        write=_write,
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"x_embedder\.weight|single_transformer_blocks\.0\.attn\.to_q\.weight",
                r"time_text_embed\.timestep_embedder\.linear_1\.weight",
            ),
            lambda config: PUBLISHED,
            infer_published,
            unless=_OTHERS,
        ),
        Dialect(
            "bfl",
            (r"(double|single)_blocks\.0\.(img_attn\.qkv|linear1)\.weight",),
            lambda config: BFL,
            infer_bfl,
            "depth_single_blocks",
            from_bfl,
            unless=_OTHERS,
        ),
    ),
    roles=ROLES,
    family="FLUX.1",
    prefixes=("model.diffusion_model.",),
    files="flux1*.safetensors",
    file_name=lambda config: f"flux1-{_variant(config)}.safetensors",
    before_steps=r"time_text_embed\..*|norm_out\.linear\..*|"
    r"(single_)?transformer_blocks\.\d+\.norm(1|1_context)?\.linear\..*",
    gguf_architecture=lambda config: "flux",
    quantised=r"(single_)?transformer_blocks\.\d+\.(attn\.(?!norm)|ff|proj_).*\.weight",
    scanned=("transformer_blocks", "single_transformer_blocks"),
    token_split=TokenSplit(
        "denoise",
        # ControlNets' samples are of the image's tokens.
        (("image", 1), ("text", 1), None, ("joint", 0), {"double": 2, "single": 2}),
        _whole,
        lambda config: config.num_attention_heads,
    ),
    adapter_prefixes=("model.diffusion_model.", "oft_unet_", *TRANSFORMER_PREFIXES),
    adapter_rules=lambda shapes: (*BFL.rules, *_XLABS),
    widened=("x_embedder", "in_channels"),
    last="proj_out",
    blocks=lambda config: config.num_layers + config.num_single_layers,
    held=held,
    flops=flops,
)
