"""The transformer of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.config.sd3 import SD3Config
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
    held_by_blocks,
)
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table("diffusers SD3 transformer", identity=True)
_CONTROLNET = (r"controlnet_blocks\.0\.weight|pos_embed_input\..*",)


def stability(config: SD3Config) -> Table:
    """Stability's names."""
    table = Rule("", ("pos_embed",), leaves=(("pos_embed", "pos_embed"),))
    return Table("Stability SD3 transformer", (table, *_module_rules(config.num_layers)))


def _module_rules(blocks: int) -> tuple[Rule, ...]:
    """Their last norms have (shift, scale), diffusers' (scale, shift)."""
    last = blocks - 1
    rules = [
        Rule("x_embedder.proj", ("pos_embed.proj",)),
        Rule("context_embedder", ("context_embedder",)),
        Rule("final_layer.linear", ("proj_out",)),
        Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
        Rule(
            f"joint_blocks.{last}.context_block.adaLN_modulation.1",
            (f"transformer_blocks.{last}.norm1_context.linear",),
            swap_halves=True,
        ),
    ]
    for theirs, ours in (("t", "timestep"), ("y", "text")):
        embedder = f"time_text_embed.{ours}_embedder"
        rules += [
            Rule(f"{theirs}_embedder.mlp.0", (f"{embedder}.linear_1",)),
            Rule(f"{theirs}_embedder.mlp.2", (f"{embedder}.linear_2",)),
        ]
    ours = "transformer_blocks.{}"

    def attention(theirs: str, qkv: tuple[str, ...], out: str, norms: tuple[str, str]) -> None:
        rules.append(Rule(f"{theirs}.qkv", tuple(f"{ours}.{name}" for name in qkv)))
        rules.append(Rule(f"{theirs}.proj", (f"{ours}.{out}",)))
        for which, norm in zip(("ln_q", "ln_k"), norms, strict=True):
            rules.append(Rule(f"{theirs}.{which}", (f"{ours}.{norm}",)))

    def stream(theirs: str, norm: str, mlp: str) -> None:
        rules.append(Rule(f"{theirs}.adaLN_modulation.1", (f"{ours}.{norm}.linear",)))
        rules.append(Rule(f"{theirs}.mlp.fc1", (f"{ours}.{mlp}.net.0.proj",)))
        rules.append(Rule(f"{theirs}.mlp.fc2", (f"{ours}.{mlp}.net.2",)))

    image, text = "joint_blocks.{}.x_block", "joint_blocks.{}.context_block"
    for attn in ("attn", "attn2"):
        qkv = tuple(f"{attn}.to_{name}" for name in "qkv")
        norms = f"{attn}.norm_q", f"{attn}.norm_k"
        attention(f"{image}.{attn}", qkv, f"{attn}.to_out.0", norms)
    added = tuple(f"attn.add_{name}_proj" for name in "qkv")
    attention(f"{text}.attn", added, "attn.to_add_out", ("attn.norm_added_q", "attn.norm_added_k"))
    stream(image, "norm1", "ff")
    stream(text, "norm1_context", "ff_context")
    return tuple(rules)


def _adapter_rules(shapes: Shapes) -> tuple[Rule, ...]:
    """Adapters may have Stability's names too."""
    return _module_rules(count(shapes, r"transformer_blocks\.(\d+)\."))


def _infer_published(shapes: Shapes, family: str) -> SD3Config:
    block = "transformer_blocks.{}"
    return _infer(
        shapes,
        ends=("pos_embed.proj", "context_embedder", "proj_out"),
        pooled="time_text_embed.text_embedder.linear_1",
        table="pos_embed.pos_embed",
        block=block,
        dual=f"{block}.attn2.to_q.weight",
        norm="transformer_blocks.0.attn.norm_q.weight",
    )


def _infer_stability(shapes: Shapes, family: str) -> SD3Config:
    block = "joint_blocks.{}"
    return _infer(
        shapes,
        ends=("x_embedder.proj", "context_embedder", "final_layer.linear"),
        pooled="y_embedder.mlp.0",
        table="pos_embed",
        block=block,
        dual=f"{block}.x_block.attn2.qkv.weight",
        norm="joint_blocks.0.x_block.attn.ln_q.weight",
    )


def _infer(
    shapes: Shapes,
    *,
    ends: tuple[str, str, str],
    pooled: str,
    table: str,
    block: str,
    dual: str,
    norm: str,
) -> SD3Config:
    image, text, out = (shapes[f"{name}.weight"] for name in ends)
    width, channels, patch = image[0], image[1], image[2]
    # All published models have heads of 64, of which norms tell, where there are any.
    head_dim = shapes.get(norm, (64,))[0]
    if width % head_dim:
        raise ConfigError(
            f"how many heads a width of {width} is divided among cannot be told from shapes (all "
            "published ones have 64 channels); give the network's config.json"
        )
    number = count(shapes, block.replace(".", r"\.").format(r"(\d+)") + r"\.")
    return SD3Config(
        patch_size=patch,
        in_channels=channels,
        out_channels=out[0] // patch**2,
        num_layers=number,
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=text[1],
        pooled_projection_dim=shapes[f"{pooled}.weight"][1],
        pos_embed_max_size=round(shapes[table][1] ** 0.5),
        dual_attention_layers=tuple(i for i in range(number) if dual.format(i) in shapes),
        qk_norm="rms_norm" if norm in shapes else None,
    )


def _read(values: dict[str, Any]) -> dict[str, Any]:
    values = {"out_channels": values.get("in_channels"), **values}
    heads, each = (values.get(name) for name in ("num_attention_heads", "attention_head_dim"))
    text = values.get("caption_projection_dim")
    if isinstance(heads, int) and isinstance(each, int) and text != heads * each:
        raise ConfigError(
            f"caption_projection_dim={text!r} is not supported, only the transformer's own width, "
            f"num_attention_heads={heads} x attention_head_dim={each}"
        )
    return values


def _inputs(config: SD3Config) -> Arrays:
    # Not square, and more image than text tokens, so that a mix-up shows in the shapes.
    random, patch = np.random.default_rng(0), config.patch_size
    side = min(config.pos_embed_max_size, 6)
    latents = (2, side * patch, (side - 1 or 1) * patch, config.in_channels)
    inputs = {
        "hidden_states": random.standard_normal(latents),
        "encoder_hidden_states": random.standard_normal((2, 12, config.joint_attention_dim)),
        "pooled_projections": random.standard_normal((2, config.pooled_projection_dim)),
        # Exact in bfloat16.
        "timestep": np.array([500.0, 250.0]),
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def _whole(
    run: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    pooled_projections: Any,
    timestep: Any,
    left_out: Any = None,
) -> tuple:
    return (
        run("patchify", hidden_states),
        run("positions", *hidden_states.shape[1:3]),
        run("embed_text", encoder_hidden_states),
        run("modulations", timestep, pooled_projections),
        left_out,
    )


def _result(run: Any, patches: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
    return run("unpatchify", patches, *hidden_states.shape[1:3])


def model_name(config: SD3Config) -> str:
    """Which Stable Diffusion it is of."""
    if config.qk_norm is None:
        return "Stable Diffusion 3 medium"
    return f"Stable Diffusion 3.5 {'medium' if config.dual_attention_layers else 'large'}"


def _module() -> type:
    from fluxjax.models.sd3 import SD3Transformer

    return SD3Transformer


def flops(config: SD3Config, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of the matrix products of one forward of one picture; a multiply-add counts two."""
    d, mlp = config.inner_dim, config.mlp_dim
    joint = image_tokens + text_tokens
    blocks = config.num_layers * (
        joint * (4 * d * d + 2 * d * mlp) + 2 * joint * joint * d + 2 * d * 6 * d
    )
    # The last block's text ends at attention, and is modulated by 2 vectors.
    blocks -= text_tokens * (d * d + 2 * d * mlp) + 4 * d * d
    dual = image_tokens * 4 * d * d + 2 * image_tokens**2 * d + 3 * d * d
    blocks += len(config.dual_attention_layers) * dual
    embedded = 256 * d + config.pooled_projection_dim * d + 2 * d * d
    pixels = config.patch_size**2 * (config.in_channels + config.out_channels)
    ends = image_tokens * pixels * d + text_tokens * config.joint_attention_dim * d + 2 * d * d
    return 2.0 * (blocks + embedded + ends)


_ROLES: dict[str, Role] = {
    "pos_embed/proj": "convolution",
    # The table of positions.
    "pos_embed/pos_embed": "copied",
    "context_embedder": "whole",
    "proj_out": "whole",
    "norm1/linear": "modulation",
    "norm1_context/linear": "modulation",
    "norm_out/linear": "modulation",
    "timestep_embedder/linear_1": "columns",
    "timestep_embedder/linear_2": "rows",
    "text_embedder/linear_1": "columns",
    "text_embedder/linear_2": "rows",
    **{f"{attn}/to_{name}": "columns" for attn in ("attn", "attn2") for name in "qkv"},
    **{f"attn/add_{name}_proj": "columns" for name in "qkv"},
    "to_out_0": "rows",
    "to_add_out": "rows",
    "norm_q": "copied",
    "norm_k": "copied",
    "norm_added_q": "copied",
    "norm_added_k": "copied",
    "net_0/proj": "columns",
    "net_2": "rows",
}

SD3 = Network(
    config=SD3Config,
    component="transformer",
    words="Stable Diffusion 3 transformer",
    describe=lambda config: (
        f"{model_name(config)}'s transformer, {config.num_layers} blocks of width "
        f"{config.inner_dim}"
    ),
    module=_module,
    inputs=_inputs,
    outputs=lambda sample: {"sample": sample},
    json=JsonForm(
        "diffusers",
        ("SD3Transformer2DModel",),
        defaults={
            "num_layers": 18,
            "num_attention_heads": 18,
            "attention_head_dim": 64,
            "caption_projection_dim": 1152,
            "pos_embed_max_size": 96,
            "in_channels": 16,
        },
        read=_read,
        write=lambda config, values: {**values, "caption_projection_dim": config.inner_dim},
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"pos_embed\.proj\.weight",
                r"context_embedder\.weight",
                r"transformer_blocks\.0\.attn\.add_k_proj\.weight",
            ),
            lambda config: PUBLISHED,
            _infer_published,
            unless=_CONTROLNET,
        ),
        Dialect(
            "bfl",
            (r"joint_blocks\.0\.x_block\.attn\.qkv\.weight",),
            stability,
            _infer_stability,
            unless=_CONTROLNET,
        ),
    ),
    roles=_ROLES,
    family="Stable Diffusion 3",
    prefixes=("model.diffusion_model.",),
    file_name=lambda config: "sd3_transformer.safetensors",
    gguf_architecture=lambda config: "sd3",
    quantised=r"transformer_blocks\.\d+\.(attn2?\.(?!norm)|ff).*\.weight",
    unlearnt=r"pos_embed\.pos_embed",
    scanned=("transformer_blocks",),
    token_split=TokenSplit(
        "denoise",
        (("image", 1), ("image", 0), ("text", 1), None, None),
        _whole,
        lambda config: config.num_attention_heads,
        result=_result,
        image_attention=True,
    ),
    adapter_prefixes=("model.diffusion_model.", *TRANSFORMER_PREFIXES),
    adapter_rules=_adapter_rules,
    held=held_by_blocks,
    flops=flops,
)
