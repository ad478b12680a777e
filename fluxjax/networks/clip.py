"""CLIP: the text encoder, the vision encoder, and both in one file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fluxjax.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, ConfigError
from fluxjax.config.clip import CLIP_L_FILE
from fluxjax.networks.clip_files import (
    OPENCLIP,
    PUBLISHED,
    TEXT_PUBLISHED,
    VISION_PUBLISHED,
    infer_both,
    infer_text,
    infer_vision,
    openclip_text,
)
from fluxjax.networks.network import (
    Arrays,
    Dialect,
    JsonForm,
    Network,
    PublishedTokenizer,
    Role,
    Shapes,
)


def _fit_text(config: CLIPTextConfig, names: Shapes) -> CLIPTextConfig:
    """Files of a CLIPTextModel may hold the projection all the same, and be called either way."""
    own = "text_projection.weight", "text_projection"
    return replace(config, with_projection=any(name in names for name in own))


def _fit_vision(config: CLIPVisionConfig, names: Shapes) -> CLIPVisionConfig:
    return replace(config, with_projection="visual_projection.weight" in names)


def _projects(values: dict[str, Any]) -> dict[str, Any]:
    name = values.get("architectures") or [""]
    return {**values, "with_projection": str(name[0]).endswith("WithProjection")}


def _without_projects(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != "with_projection"}


def _json_form(name: str, model_type: str, defaults: dict[str, Any]) -> JsonForm:
    """Of one of the two encoders, whose class tells whether it has a projection."""
    with_projection = f"{name}WithProjection"
    return JsonForm(
        "transformers",
        (name, with_projection),
        model_types=(model_type,),
        defaults=defaults,
        read=_projects,
        write=_without_projects,
        written_class=lambda config: with_projection if config.with_projection else name,
    )


def _read_both(values: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for network, key in ((CLIP_TEXT, "text_config"), (CLIP_VISION, "vision_config")):
        part: dict[str, Any] = {}
        for name in (f"{key}_dict", key):  # older files have both
            given = values.get(name) or {}
            if not isinstance(given, dict):
                raise ConfigError(f"{name} must be a JSON object, got {given!r}")
            part |= given
        if "projection_dim" in values:
            part["projection_dim"] = values["projection_dim"]
        parts[key] = {**part, "architectures": [f"{network.json.class_names[0]}WithProjection"]}
    return parts


def _text_inputs(config: CLIPTextConfig) -> Arrays:
    random = np.random.default_rng(0)
    # With the published eos_token_id of 2 the end of text is the highest id; see models/clip.py.
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    lowest = min(3, config.vocab_size - 1)
    highest = max(config.vocab_size - 2, lowest + 1)
    ids = random.integers(lowest, highest, (2, config.max_position_embeddings))
    ids = np.where(ids == end, lowest, ids)
    ids[0, 9:], ids[1, -1] = end, end
    return {"input_ids": ids.astype(np.int32)}


def _vision_inputs(config: CLIPVisionConfig) -> Arrays:
    shape = (2, config.image_size, config.image_size, config.num_channels)
    return {"pixel_values": np.random.default_rng(0).standard_normal(shape, np.float32)}


def _text_module() -> type:
    from fluxjax.models.clip import CLIPTextModel

    return CLIPTextModel


def _vision_module() -> type:
    from fluxjax.models.clip_vision import CLIPVisionModel

    return CLIPVisionModel


def _module() -> type:
    from fluxjax.models.clip_vision import CLIPModel

    return CLIPModel


def _pooled(output: Any) -> dict[str, Any]:
    return {
        "last_hidden_state": output.last_hidden_state,
        "pooler_output": output.pooler_output,
    }


def _size(config: CLIPTextConfig | CLIPVisionConfig) -> str:
    return f"{config.num_hidden_layers} layers of width {config.hidden_size}"


_ROLES: dict[str, Role] = {
    # Small enough that nothing is split over tensor.
    "self_attn/q_proj": "whole",
    "self_attn/k_proj": "whole",
    "self_attn/v_proj": "whole",
    "self_attn/out_proj": "whole",
    "mlp/fc1": "whole",
    "mlp/fc2": "whole",
    "layer_norm1": "copied",
    "layer_norm2": "copied",
    "position_embedding": "copied",
}
_TEXT_ROLES: dict[str, Role] = {
    **_ROLES,
    "token_embedding": "whole",
    "final_layer_norm": "copied",
    "text_projection": "whole",
}
_VISION_ROLES: dict[str, Role] = {
    **_ROLES,
    "patch_embedding": "convolution",
    "class_embedding": "copied",
    "pre_layrnorm": "copied",
    "post_layernorm": "copied",
    "visual_projection": "whole",
}


def _tokenizer(config: CLIPTextConfig) -> PublishedTokenizer | None:
    """OpenCLIP's networks were trained with OpenAI's tokens and another one for padding."""
    if config.vocab_size != CLIPTextConfig.vocab_size:
        return None
    pad = "<|endoftext|>" if config.hidden_act == "quick_gelu" else "!"
    return PublishedTokenizer("openai/clip-vit-large-patch14", pad)


CLIP_TEXT = Network(
    config=CLIPTextConfig,
    component="text_encoder",
    words="CLIP text encoder",
    tokenizer="CLIPTokenizer",
    published_tokenizer=_tokenizer,
    blocks=lambda config: config.num_hidden_layers,
    describe=lambda config: f"CLIP text encoder, {_size(config)}",
    module=_text_module,
    inputs=_text_inputs,
    outputs=_pooled,
    json=_json_form(
        "CLIPTextModel",
        "clip_text_model",
        {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "projection_dim": 512,
            "num_attention_heads": 8,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
    ),
    dialects=(
        Dialect(
            "published",
            (r"(text_model\.)?embeddings\.token_embedding\.weight",),
            lambda config: TEXT_PUBLISHED,
            infer_text,
        ),
        Dialect(
            "openclip",
            (r"token_embedding\.weight", r"transformer\.resblocks\.0\.attn\.in_proj_weight"),
            lambda config: OPENCLIP,
            openclip_text,
        ),
    ),
    roles=_TEXT_ROLES,
    prefixes=("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    files=CLIP_L_FILE,
    file_name=lambda config: "clip_l.safetensors",
    quantised_files=False,
    quantised=r"text_model\.encoder\.layers\.\d+\.(self_attn|mlp)\..*\.weight",
    scanned=("layers",),
    fit=_fit_text,
    adapter_prefixes=(
        "text_encoders.clip_l.transformer.",
        "text_encoders.clip_l.",
        "text_encoders.clip_h.transformer.",
        "text_encoders.clip_h.",
        "text_encoder.",
        "base_model.model.",
        "lora_te1_",
        "lora_te_",
    ),
    further_prefixes=("text_encoders.clip_g.transformer.", "text_encoders.clip_g."),
    adapter_rules=lambda shapes: TEXT_PUBLISHED.rules,
)
CLIP_VISION = Network(
    config=CLIPVisionConfig,
    component="image_encoder",
    words="CLIP vision encoder",
    describe=lambda config: f"CLIP vision encoder, {_size(config)}",
    module=_vision_module,
    inputs=_vision_inputs,
    outputs=_pooled,
    json=_json_form(
        "CLIPVisionModel",
        "clip_vision_model",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "projection_dim": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 32,
        },
    ),
    dialects=(
        Dialect(
            "published",
            (r"(vision_model\.)?embeddings\.class_embedding",),
            lambda config: VISION_PUBLISHED,
            infer_vision,
            unless=(r"multi_modal_projector\..*",),
        ),
    ),
    roles=_VISION_ROLES,
    file_name=lambda config: "clip_vision.safetensors",
    scanned=("layers",),
    fit=_fit_vision,
)
CLIP = Network(
    config=CLIPConfig,
    component="clip",
    words="CLIP",
    describe=lambda config: (
        f"{CLIP_TEXT.describe(config.text_config)}, with its "
        f"{CLIP_VISION.describe(config.vision_config)}"
    ),
    module=_module,
    inputs=lambda c: _text_inputs(c.text_config) | _vision_inputs(c.vision_config),
    outputs=lambda returned: dict(zip(("text_embeds", "image_embeds"), returned, strict=True)),
    json=JsonForm(
        "transformers",
        ("CLIPModel",),
        model_types=("clip",),
        read=_read_both,
        write=lambda config, values: {"projection_dim": config.text_config.projection_dim},
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"text_model\.embeddings\.token_embedding\.weight",
                r"vision_model\.embeddings\.class_embedding",
            ),
            lambda config: PUBLISHED,
            infer_both,
        ),
    ),
    roles={**_TEXT_ROLES, **_VISION_ROLES, "logit_scale": "copied"},
    file_name=lambda config: "clip.safetensors",
    scanned=("layers",),
    parts={"text_encoder": "text_config", "image_encoder": "vision_config"},
)
