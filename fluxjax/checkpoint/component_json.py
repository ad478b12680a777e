"""`config.json` files of diffusers and transformers <-> our configuration dataclasses.

A key that a file leaves out has the default of the PyTorch class, which is not always FLUX's.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fluxjax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConfigError,
    FluxConfig,
    SchedulerConfig,
    T5Config,
    from_dict,
)
from fluxjax.json_input import MAX_BYTES, parse_json

_DEFAULTS: dict[type, dict[str, Any]] = {
    FluxConfig: {"guidance_embeds": False},
    AutoencoderConfig: {
        "block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4,
        "scaling_factor": 0.18215, "shift_factor": 0.0, "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    CLIPTextConfig: {
        "hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512,
        "num_attention_heads": 8, "bos_token_id": 49406, "eos_token_id": 49407,
    },
    CLIPVisionConfig: {
        "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512,
        "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32,
    },
    T5Config: {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    SchedulerConfig: {"shift": 1.0, "use_dynamic_shifting": False},
}  # fmt: skip

# What our networks do not have: a file that asks for it would give other pictures.
_REQUIRED: dict[type, dict[str, Any]] = {
    FluxConfig: {"patch_size": 1},
    AutoencoderConfig: {"act_fn": "silu", "mid_block_add_attention": True},
    SchedulerConfig: {
        "shift_terminal": None, "use_karras_sigmas": False, "use_exponential_sigmas": False,
        "use_beta_sigmas": False, "invert_sigmas": False, "stochastic_sampling": False,
        "time_shift_type": "exponential",
    },
}  # fmt: skip

_CLASS_NAMES: dict[type, str] = {
    FluxConfig: "FluxTransformer2DModel",
    AutoencoderConfig: "AutoencoderKL",
    CLIPTextConfig: "CLIPTextModel",
    CLIPVisionConfig: "CLIPVisionModelWithProjection",
    T5Config: "T5EncoderModel",
    SchedulerConfig: "FlowMatchEulerDiscreteScheduler",
}


# Classes of diffusers and transformers, and transformers' model types, that have these weights.
_KNOWN: dict[type, tuple[str, ...]] = {
    FluxConfig: ("FluxTransformer2DModel",),
    AutoencoderConfig: ("AutoencoderKL",),
    CLIPTextConfig: ("CLIPTextModel", "CLIPTextModelWithProjection", "clip_text_model"),
    CLIPVisionConfig: ("CLIPVisionModel", "CLIPVisionModelWithProjection", "clip_vision_model"),
    T5Config: ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model", "t5"),
}


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or ValueError if it is not a JSON object that can be read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than the {MAX_BYTES} bytes that are read as JSON")
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def network_config(values: dict[str, Any], path: Path) -> Any:
    """The configuration in a config.json of any network of ours; of a whole CLIP, the pair.

    Raises ConfigError, naming `path`, if it is of another network.
    """
    name = values.get("_class_name") or (values.get("architectures") or [""])[0]
    kind = values.get("model_type", "")
    if kind == "clip" or name == "CLIPModel":
        parts = []
        for cls, key in ((CLIPTextConfig, "text_config"), (CLIPVisionConfig, "vision_config")):
            part = {**(values.get(f"{key}_dict") or {}), **(values.get(key) or {})}
            if "projection_dim" in values:
                part["projection_dim"] = values["projection_dim"]
            parts.append(parse_config(cls, part, path))
        return tuple(parts)
    for cls, names in _KNOWN.items():
        if name in names or (not name and kind and kind in names):
            return parse_config(cls, values, path)
    known = ", ".join(_CLASS_NAMES[cls] for cls in _KNOWN)
    raise ConfigError(
        f"{path} is of {str(name or kind or 'no named network')[:100]}; known are {known}"
    )


def read_config_json(cls: type, path: Path):
    """The dataclass `cls` of a config.json.

    Raises FileNotFoundError; ConfigError for values that no network of ours has.
    """
    return parse_config(cls, read_json(path), path)


def parse_config(cls: type, values: dict[str, Any], path: Path):
    class_name = values.get("_class_name", _CLASS_NAMES[cls])
    if class_name != _CLASS_NAMES[cls]:
        raise ConfigError(f"{path} is of {str(class_name)[:100]}, expected {_CLASS_NAMES[cls]}")
    for key, wanted in _REQUIRED.get(cls, {}).items():
        if values.get(key, wanted) != wanted:
            raise ConfigError(f"{path}: {key}={values[key]!r} is not supported, only {wanted!r}")
    values = {**_DEFAULTS[cls], **{k: v for k, v in values.items() if v is not None}}
    if cls is FluxConfig:
        values.setdefault("out_channels", values.get("in_channels", 64))
    if cls is T5Config:
        feed_forward = values.get("feed_forward_proj", "relu")
        gated, activation = feed_forward.startswith("gated-"), feed_forward.split("-")[-1]
        # transformers' own exception: "gated-gelu" means the tanh form.
        values.setdefault("is_gated_act", gated)
        values.setdefault("dense_act_fn", "gelu_new" if (gated, activation) == (True, "gelu")
                          else activation)  # fmt: skip
    try:
        return from_dict(cls, values)
    except (ConfigError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def config_json(config: Any, dtype: str | None = None) -> dict[str, Any]:
    """What diffusers or transformers write for this configuration."""
    cls = type(config)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in
              dataclasses.asdict(config).items()}  # fmt: skip
    if cls in (FluxConfig, AutoencoderConfig, SchedulerConfig):
        values |= {"_class_name": _CLASS_NAMES[cls], "_diffusers_version": "0.30.0"}
    else:
        values |= {"architectures": [_CLASS_NAMES[cls]]}
        values |= {"torch_dtype": dtype} if dtype else {}
    if cls is FluxConfig:
        values["patch_size"] = 1
        for key, fixed in (("rope_theta", 10000.0), ("mlp_ratio", 4.0), ("qkv_bias", True)):
            if values[key] == fixed:  # diffusers knows no other value and no such key
                del values[key]
    elif cls is AutoencoderConfig:
        levels = len(config.block_out_channels)
        values |= {
            "act_fn": "silu", "force_upcast": True, "mid_block_add_attention": True,
            "sample_size": 1024, "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }  # fmt: skip
    elif cls is T5Config:
        gated = "gated-" if config.is_gated_act else ""
        activation = "gelu" if config.dense_act_fn.startswith("gelu") else config.dense_act_fn
        values |= {
            "model_type": "t5", "feed_forward_proj": gated + activation, "dropout_rate": 0.1,
            "decoder_start_token_id": 0, "is_encoder_decoder": True, "tie_word_embeddings": False,
        }  # fmt: skip
    elif cls is CLIPTextConfig:
        values["model_type"] = "clip_text_model"
    elif cls is CLIPVisionConfig:
        values["model_type"] = "clip_vision_model"
    return values
