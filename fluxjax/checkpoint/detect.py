"""Which network a checkpoint holds, in whose names, and its configuration: from keys and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

from fluxjax.checkpoint.templates import Config
from fluxjax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConfigError,
    FluxConfig,
    T5Config,
)

Dialect = Literal["reference", "bfl"]
Shapes = Mapping[str, tuple[int, ...]]

# ComfyUI keeps several networks in one file, each under its prefix.
PREFIXES = (
    ("model.diffusion_model.", "transformer"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_2"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
)
_SIGNATURES: tuple[tuple[str, Dialect, str], ...] = (
    ("transformer", "bfl", r"(double|single)_blocks\.0\.(img_attn\.qkv|linear1)\.weight"),
    ("transformer", "reference", r"time_text_embed\.timestep_embedder\.linear_1\.weight"),
    ("vae", "bfl", r"encoder\.down\.0\.block\.0\.norm1\.weight"),
    ("vae", "reference", r"encoder\.down_blocks\.0\.resnets\.0\.norm1\.weight"),
    ("text_encoder_2", "reference", r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"),
    ("text_encoder", "reference", r"(text_model\.)?embeddings\.token_embedding\.weight"),
    ("image_encoder", "reference", r"(vision_model\.)?embeddings\.class_embedding"),
)
_FOREIGN = (
    (r".*lora_(A|B|down|up).*", "a LoRA, which only changes a model and is none itself"),
    (r"double_blocks\.0\.img_attn\.q_proj\.weight|cond_in\..*", "Open-Sora 2.0"),
    (r"(model\.diffusion_model\.)?joint_blocks\..*|pos_embed\.proj\.weight", "Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?input_blocks\..*|down_blocks\.0\..*", "a Stable Diffusion UNet"),
    (r"controlnet_.*", "a ControlNet"),
)


def split_prefixes(names: Collection[str]) -> dict[str, dict[str, str]]:
    """component -> {name without prefix: name}; the component is "" for names without prefix."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        for prefix, component in PREFIXES:
            if name.startswith(prefix):
                groups.setdefault(component, {})[name[len(prefix) :]] = name
                break
        else:
            groups.setdefault("", {})[name] = name
    return groups


def refuse_foreign(names: Collection[str]) -> None:
    """Raises ConfigError for checkpoints of other families, which share some names with ours."""
    for pattern, what in _FOREIGN:
        if any(re.fullmatch(pattern, name) for name in names):
            raise ConfigError(f"these are the tensors of {what}; FLUX, T5 and CLIP are converted")


def detect_network(names: Collection[str]) -> tuple[str, Dialect]:
    """The component ("clip" for text and vision in one) and whose names these are.

    Raises ConfigError saying what it looks like instead.
    """
    refuse_foreign(names)
    found: dict[str, Dialect] = {}
    for component, dialect, signature in _SIGNATURES:
        if any(re.fullmatch(signature, name) for name in names):
            found.setdefault(component, dialect)
    if found.keys() == {"text_encoder", "image_encoder"}:
        return "clip", "reference"
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        raise ConfigError(f"the names fit several networks: {', '.join(found)}")
    some = ", ".join(repr(name) for name in sorted(names)[:3])
    raise ConfigError(
        f"no FLUX transformer, FLUX autoencoder, T5 encoder or CLIP is known by names like {some}"
    )


def _count(shapes: Shapes, pattern: str) -> int:
    numbers = [int(m[1]) for m in map(re.compile(pattern).match, shapes) if m]
    return max(numbers) + 1 if numbers else 0


def infer_config(
    component: str, dialect: Dialect, shapes: Shapes
) -> Config | tuple[CLIPTextConfig, CLIPVisionConfig]:
    """Every number of the configuration that shapes tell; the rest as published.

    Raises ConfigError for what shapes cannot tell, and for a file without a needed tensor.
    """
    try:
        if component == "transformer":
            return _flux(dialect, shapes)
        if component == "vae":
            return _autoencoder(dialect, shapes)
        if component == "text_encoder_2":
            return _t5(shapes)
        if component == "text_encoder":
            return _clip_text(shapes)
        if component == "image_encoder":
            return _clip_vision(shapes)
        return _clip_text(shapes), _clip_vision(shapes)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the {component} lacks {error}, from which its size is read") from None


def _flux(dialect: Dialect, shapes: Shapes) -> FluxConfig:
    if dialect == "bfl":
        double, single, scale = "double_blocks", "single_blocks", "scale"
        names = ["img_in", "txt_in", "vector_in.in_layer", "final_layer.linear"]
        norms = [f"{double}.0.img_attn.norm.query_norm", f"{single}.0.norm.query_norm"]
        mlps = [f"{double}.0.img_mlp.2.weight", f"{single}.0.linear2.weight"]
        bias, guidance = "qkv.bias", "guidance_in.in_layer.weight"
    else:
        double, single, scale = "transformer_blocks", "single_transformer_blocks", "weight"
        embed = "time_text_embed"
        names = ["x_embedder", "context_embedder", f"{embed}.text_embedder.linear_1", "proj_out"]
        norms = [f"{double}.0.attn.norm_q", f"{single}.0.attn.norm_q"]
        mlps = [f"{double}.0.ff.net.2.weight", f"{single}.0.proj_out.weight"]
        bias, guidance = "attn.to_q.bias", f"{embed}.guidance_embedder.linear_1.weight"
    image, text, pooled, out = (shapes[f"{name}.weight"] for name in names)
    inner = image[0]
    head_dim = next(shapes[f"{n}.{scale}"][0] for n in norms if f"{n}.{scale}" in shapes)
    # The single blocks' last layer reads [attention, mlp].
    mlp = shapes[mlps[0]][1] if mlps[0] in shapes else shapes[mlps[1]][1] - inner
    if head_dim != 128:
        raise ConfigError(
            f"how heads of {head_dim} are divided among the RoPE axes cannot be told from shapes "
            "(only heads of 128 are published: 16, 56, 56); give the network's config.json"
        )
    return FluxConfig(
        in_channels=image[1],
        out_channels=out[0],
        num_layers=_count(shapes, rf"{double}\.(\d+)\."),
        num_single_layers=_count(shapes, rf"{single}\.(\d+)\."),
        attention_head_dim=head_dim,
        num_attention_heads=inner // head_dim,
        joint_attention_dim=text[1],
        pooled_projection_dim=pooled[1],
        guidance_embeds=guidance in shapes,
        mlp_ratio=mlp / inner,
        qkv_bias=any(name.endswith((bias, "linear1.bias")) for name in shapes),
    )


def _autoencoder(dialect: Dialect, shapes: Shapes) -> AutoencoderConfig:
    level, block = ("down", "block") if dialect == "bfl" else ("down_blocks", "resnets")
    levels = _count(shapes, rf"encoder\.{level}\.(\d+)\.")
    latent, pixels = shapes["decoder.conv_in.weight"][1], shapes["encoder.conv_in.weight"][1]
    if latent != 16:
        raise ConfigError(
            f"the scale of {latent} latent channels cannot be told from shapes (FLUX has 16); "
            "give the network's config.json"
        )
    return AutoencoderConfig(
        in_channels=pixels,
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=latent,
        block_out_channels=tuple(
            shapes[f"encoder.{level}.{i}.{block}.0.conv1.weight"][0] for i in range(levels)
        ),
        layers_per_block=_count(shapes, rf"encoder\.{level}\.0\.{block}\.(\d+)\."),
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )


def _t5(shapes: Shapes) -> T5Config:
    layer = "encoder.block.0.layer"
    buckets, heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"]
    inner, width = shapes[f"{layer}.0.SelfAttention.q.weight"]
    gated = f"{layer}.1.DenseReluDense.wi_0.weight" in shapes
    shared = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    return T5Config(
        vocab_size=shapes[shared][0],
        d_model=width,
        d_kv=inner // heads,
        d_ff=shapes[f"{layer}.1.DenseReluDense.wo.weight"][1],
        num_layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        is_gated_act=gated,
        dense_act_fn="gelu_pytorch_tanh" if gated else "relu",
    )


def _clip_text(shapes: Shapes) -> CLIPTextConfig:
    p = "text_model." if "text_model.embeddings.token_embedding.weight" in shapes else ""
    vocabulary, width = shapes[f"{p}embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight", (width,))
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes[f"{p}encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=projection[0],
        num_hidden_layers=_count(shapes, rf"{re.escape(p)}encoder\.layers\.(\d+)\."),
        num_attention_heads=_clip_heads(width),
        max_position_embeddings=shapes[f"{p}embeddings.position_embedding.weight"][0],
    )


def _clip_vision(shapes: Shapes) -> CLIPVisionConfig:
    p = "vision_model." if "vision_model.embeddings.class_embedding" in shapes else ""
    width, channels, patch, _ = shapes[f"{p}embeddings.patch_embedding.weight"]
    positions = shapes[f"{p}embeddings.position_embedding.weight"][0] - 1
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{p}encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=_count(shapes, rf"{re.escape(p)}encoder\.layers\.(\d+)\."),
        num_attention_heads=_clip_heads(width),
        num_channels=channels,
        image_size=math.isqrt(positions) * patch,
        patch_size=patch,
    )
    projection = shapes.get("visual_projection.weight")
    return replace(config, projection_dim=projection[0]) if projection else config


def _clip_heads(width: int) -> int:
    if width % 64:
        raise ConfigError(
            f"the heads of a CLIP of width {width} cannot be told from shapes (published ones "
            "have heads of 64); give the network's config.json"
        )
    return width // 64


def describe(config: Config | tuple) -> str:
    """In words: the family, and the variant as far as keys tell it."""
    if isinstance(config, FluxConfig):
        variant = {384: "Fill", 128: "Canny or Depth"}.get(config.in_channels)
        if variant is None:
            variant = "dev (or Kontext, Krea)" if config.guidance_embeds else "schnell"
        blocks = f"{config.num_layers} + {config.num_single_layers} blocks"
        return f"FLUX.1 {variant} transformer, {blocks} of width {config.inner_dim}"
    if isinstance(config, AutoencoderConfig):
        return f"FLUX autoencoder, {config.latent_channels} latent channels"
    if isinstance(config, T5Config):
        version = "1.1" if config.is_gated_act else "1.0"
        return f"T5 v{version} encoder, {config.num_layers} blocks of width {config.d_model}"
    if isinstance(config, tuple):
        return f"{describe(config[0])}, with its {describe(config[1])}"
    kind = "text" if isinstance(config, CLIPTextConfig) else "vision"
    return f"CLIP {kind} encoder, {config.num_hidden_layers} layers of width {config.hidden_size}"
