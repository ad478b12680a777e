"""What CLIP's files call its parameters, and what their shapes tell of it."""

from __future__ import annotations

import re

from fluxjax.config import (
    CLIP_BIGG_TEXT,
    CLIP_H_TEXT,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConfigError,
)
from fluxjax.config.base import Activation
from fluxjax.config.choices import FAMILY_NAMES
from fluxjax.networks.network import Shapes, count
from fluxjax.networks.tables import Rule, Table

LAYERS = tuple(
    f"encoder.layers.{{}}.{name}"
    for name in (
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
    )
)
TEXT_PUBLISHED = Table(
    "CLIP text encoder",
    # transformers 5 writes a CLIPTextModel without the prefix that published files have.
    rules=tuple(
        Rule(name, (f"text_model.{name}",))
        for name in (
            "embeddings.token_embedding",
            "embeddings.position_embedding",
            "final_layer_norm",
            *LAYERS,
        )
    ),
    identity=True,
    ignored=(r".*position_ids", r"vision_model\..*", r"visual_projection\..*", "logit_scale"),
)
VISION_PUBLISHED = Table(
    "CLIP vision encoder",
    identity=True,
    rules=tuple(
        Rule(name, (f"vision_model.{name}",), leaves=leaves)
        for name, leaves in (
            ("embeddings", (("class_embedding", "class_embedding"),)),
            *(
                (name, (("weight", "weight"), ("bias", "bias")))
                for name in (
                    "embeddings.patch_embedding",
                    "embeddings.position_embedding",
                    "pre_layrnorm",
                    "post_layernorm",
                    *LAYERS,
                )
            ),
        )
    ),
    ignored=(r".*position_ids", r"text_model\..*", r"text_projection\..*", "logit_scale"),
)
PUBLISHED = Table("CLIP", identity=True, ignored=(r".*position_ids",))


def _openclip() -> Table:
    block, ours = "transformer.resblocks.{}", "text_model.encoder.layers.{}"
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    position = (("positional_embedding", "weight"),)
    joint = (("in_proj_weight", "weight"), ("in_proj_bias", "bias"))
    rules = [
        Rule("token_embedding", ("text_model.embeddings.token_embedding",)),
        Rule("", ("text_model.embeddings.position_embedding",), leaves=position),
        Rule("ln_final", ("text_model.final_layer_norm",)),
        Rule("", ("text_projection",), transposed=True, leaves=(("text_projection", "weight"),)),
        *(Rule(f"{block}.{theirs}", (f"{ours}.{mine}",)) for theirs, mine in parts.items()),
        Rule(f"{block}.attn", tuple(f"{ours}.self_attn.{x}_proj" for x in "qkv"), leaves=joint),
    ]
    return Table("OpenCLIP text encoder", tuple(rules), ignored=("logit_scale", "attn_mask"))


OPENCLIP = _openclip()


def _heads(width: int) -> int:
    if width % 64:
        raise ConfigError(
            f"the heads of a CLIP of width {width} cannot be told from shapes (published ones "
            "have heads of 64); give the network's config.json with --config"
        )
    return width // 64


def _ask_for_activation(what: str) -> ConfigError:
    return ConfigError(
        f"the activation of this {what} cannot be told from shapes (OpenAI's CLIPs have "
        "quick_gelu, OpenCLIP's have gelu); give the network's config.json with --config"
    )


_OPENAI = tuple(FAMILY_NAMES[name] for name in ("flux", "hunyuan-video", "hunyuan-video-i2v"))
"""Families whose CLIP of width 768 is OpenAI's."""


def infer_text(shapes: Shapes, family: str) -> CLIPTextConfig:
    """Sizes from shapes. Raises ConfigError where the activation is asked for: unless the family's
    CLIP is OpenAI's."""
    config = openai_text(shapes)
    openclip = config.hidden_size in (CLIP_H_TEXT.hidden_size, CLIP_BIGG_TEXT.hidden_size)
    if family not in _OPENAI or openclip:
        layers, width = config.num_hidden_layers, config.hidden_size
        raise _ask_for_activation(f"CLIP text encoder, {layers} layers of width {width},")
    return config


def openai_text(shapes: Shapes, hidden_act: Activation = "quick_gelu") -> CLIPTextConfig:
    """Of a text encoder in transformers' names whose activation is known."""
    p = "text_model." if "text_model.embeddings.token_embedding.weight" in shapes else ""
    vocabulary, width = shapes[f"{p}embeddings.token_embedding.weight"]
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes[f"{p}encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=shapes.get("text_projection.weight", (width,))[0],
        with_projection="text_projection.weight" in shapes,
        num_hidden_layers=count(shapes, rf"{re.escape(p)}encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(width),
        max_position_embeddings=shapes[f"{p}embeddings.position_embedding.weight"][0],
        hidden_act=hidden_act,
    )


def openclip_text(shapes: Shapes, family: str = "") -> CLIPTextConfig:
    """Of a text encoder in OpenCLIP's names, which have gelu and heads of 64."""
    vocabulary, width = shapes["token_embedding.weight"]
    # Stable Diffusion 2 never projects; its configuration says 512 all the same.
    projected = shapes.get("text_projection", (width, CLIP_H_TEXT.projection_dim))[1]
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        projection_dim=projected,
        with_projection="text_projection" in shapes,
        num_hidden_layers=count(shapes, r"transformer\.resblocks\.(\d+)\."),
        num_attention_heads=_heads(width),
        max_position_embeddings=shapes["positional_embedding"][0],
        hidden_act="gelu",
    )


def infer_vision(shapes: Shapes, family: str) -> CLIPVisionConfig:
    """Raises ConfigError, which asks for the activation that shapes do not tell."""
    p = "vision_model." if "vision_model.embeddings.class_embedding" in shapes else ""
    width = shapes[f"{p}embeddings.patch_embedding.weight"][0]
    layers = count(shapes, rf"{re.escape(p)}encoder\.layers\.(\d+)\.")
    raise _ask_for_activation(f"CLIP vision encoder, {layers} layers of width {width},")


def infer_both(shapes: Shapes, family: str) -> CLIPConfig:
    """Raises ConfigError, likewise."""
    raise _ask_for_activation("CLIP")
