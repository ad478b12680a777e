"""SigLIP's vision encoder, which FLUX.1 Redux reads."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from fluxjax.config import ConfigError, SiglipVisionConfig
from fluxjax.networks.clip_files import LAYERS
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Shapes, count
from fluxjax.networks.tables import Rule, Table

_BOTH = (("weight", "weight"), ("bias", "bias"))
_MODULES = (
    *(
        (name, _BOTH)
        for name in (
            "embeddings.patch_embedding",
            "embeddings.position_embedding",
            "post_layernorm",
            *LAYERS,
            "head.attention.out_proj",
            "head.layernorm",
            "head.mlp.fc1",
            "head.mlp.fc2",
        )
    ),
    ("head", (("probe", "probe"),)),
    ("head.attention", (("in_proj_weight", "in_proj_weight"), ("in_proj_bias", "in_proj_bias"))),
)
PUBLISHED = Table(
    "SigLIP vision encoder",
    # transformers 5 writes them without the prefix that published files have.
    rules=tuple(Rule(name, (f"vision_model.{name}",), leaves=leaves) for name, leaves in _MODULES),
    identity=True,
    ignored=(r".*position_ids",),
)


def _infer(shapes: Shapes, family: str) -> SiglipVisionConfig:
    p = "vision_model." if "vision_model.embeddings.patch_embedding.weight" in shapes else ""
    width, channels, patch, _ = shapes[f"{p}embeddings.patch_embedding.weight"]
    tokens = shapes[f"{p}embeddings.position_embedding.weight"][0]
    layers = count(shapes, rf"{re.escape(p)}encoder\.layers\.(\d+)\.")
    published = SiglipVisionConfig()
    if family != "FLUX.1" or (width, patch, tokens) != (
        published.hidden_size,
        published.patch_size,
        published.tokens,
    ):
        raise ConfigError(
            f"the heads and the picture's size of this SigLIP vision encoder, {layers} layers of "
            f"width {width}, cannot be told from shapes; give the network's config.json"
        )
    return SiglipVisionConfig(
        num_channels=channels,
        num_hidden_layers=layers,
        intermediate_size=shapes[f"{p}encoder.layers.0.mlp.fc1.weight"][0],
    )


def _fit(config: SiglipVisionConfig, names: Shapes) -> SiglipVisionConfig:
    """A head may be left out of the weights, since Redux does not read it."""
    return replace(config, vision_use_head=any(name.endswith("head.probe") for name in names))


def _inputs(config: SiglipVisionConfig) -> Arrays:
    shape = (2, config.image_size, config.image_size, config.num_channels)
    pixels = np.random.default_rng(0).standard_normal(shape)
    return {"pixel_values": pixels.astype(np.float32)}


def _outputs(output: Any) -> dict[str, Any]:
    found = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.pooler_output}
    return {name: value for name, value in found.items() if value is not None}


def _module() -> type:
    from fluxjax.models.siglip import SiglipVisionModel

    return SiglipVisionModel


SIGLIP = Network(
    config=SiglipVisionConfig,
    component="siglip",
    words="SigLIP vision encoder",
    describe=lambda config: (
        f"SigLIP vision encoder, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.tokens} tokens"
    ),
    module=_module,
    inputs=_inputs,
    outputs=_outputs,
    json=JsonForm(
        "transformers",
        ("SiglipVisionModel",),
        model_types=("siglip_vision_model",),
        defaults={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
        },
    ),
    dialects=(
        Dialect(
            "published",
            (r"(vision_model\.)?embeddings\.patch_embedding\.bias",),
            lambda config: PUBLISHED,
            _infer,
        ),
    ),
    roles={
        "self_attn/q_proj": "whole",
        "self_attn/k_proj": "whole",
        "self_attn/v_proj": "whole",
        "self_attn/out_proj": "whole",
        "mlp/fc1": "whole",
        "mlp/fc2": "whole",
        "layer_norm1": "copied",
        "layer_norm2": "copied",
        "post_layernorm": "copied",
        "layernorm": "copied",
        "position_embedding": "copied",
        "patch_embedding": "convolution",
        "attention/in_proj_weight": "copied",
        "attention/in_proj_bias": "copied",
        "attention/out_proj": "whole",
        "probe": "copied",
    },
    files="sigclip_vision*.safetensors",
    file_name=lambda config: "sigclip_vision.safetensors",
    scanned=("layers",),
    fit=_fit,
)
