"""LLaVA: CLIP's vision encoder, two layers and a language model in one file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fluxjax.config import ConfigError, LlavaConfig
from fluxjax.config.llava import CLIP_L_336
from fluxjax.networks import clip, clip_files, llama
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Role, Shapes
from fluxjax.networks.tables import Rule, Table


def _table(config: LlavaConfig) -> Table:
    """What transformers 5 calls otherwise than published files: everything is under `model.`, and
    CLIP's encoder has no name of its own."""
    text = [llama.table(config.text_config, p) for p in ("language_model.model.", _INNER)]
    rules = [
        Rule(rule.theirs, tuple(f"language_model.model.{name}" for name in rule.ours))
        for rule in text[1].rules
    ]
    for rule in clip_files.VISION_PUBLISHED.rules:
        ours = tuple(f"vision_tower.{name}" for name in rule.ours)
        others = (f"vision_tower.{rule.theirs}", f"model.vision_tower.{rule.theirs}")
        for theirs in (*others, f"model.{ours[0]}"):
            rules.append(Rule(theirs, ours, leaves=rule.leaves))
    for name in ("linear_1", "linear_2"):
        projector = f"multi_modal_projector.{name}"
        rules.append(Rule(f"model.{projector}", (projector,)))
    ignored = dict.fromkeys(pattern for table in text for pattern in table.ignored)
    return Table("LLaVA", tuple(rules), identity=True, ignored=(*ignored, r".*position_ids"))


def _comfy_table(config: LlavaConfig) -> Table:
    return _of_two_files(llama.table(config.text_config, "model."))


def _gguf_table(config: LlavaConfig) -> Table:
    return _of_two_files(llama.gguf_table(config.text_config))


def _of_two_files(text: Table) -> Table:
    """A language model by itself, and CLIP's encoder with the projector, as ComfyUI has them."""
    rules = [
        replace(rule, ours=tuple(f"language_model.model.{name}" for name in rule.ours))
        for rule in text.rules
    ]
    rules += [
        Rule(name, (f"vision_tower.{name}",), leaves=rule.leaves)
        for rule in clip_files.VISION_PUBLISHED.rules
        for name in rule.ours
    ]
    projector = (f"multi_modal_projector.linear_{i}" for i in (1, 2))
    rules += [Rule(name, (name,)) for name in projector]
    ignored = (*text.ignored, *clip_files.VISION_PUBLISHED.ignored, r"visual_projection\..*")
    return Table("LLaVA", tuple(rules), ignored=ignored)


def _infer_of_two_files(dialect: str, shapes: Shapes, family: str) -> LlavaConfig:
    """Only the published one's sizes tell the rest."""
    text = llama.LLAMA.dialect(dialect).infer(shapes, family)
    vision = CLIP_L_336
    grid = vision.image_size // vision.patch_size
    embeddings = "vision_model.embeddings"
    known = {
        f"{embeddings}.position_embedding.weight": (grid**2 + 1, vision.hidden_size),
        f"{embeddings}.patch_embedding.weight": (
            vision.hidden_size,
            vision.num_channels,
            vision.patch_size,
            vision.patch_size,
        ),
    }
    if any(tuple(shapes[name]) != shape for name, shape in known.items()):
        return _infer(shapes, family)
    return LlavaConfig(text_config=text, vision_config=vision)


def _infer(shapes: Shapes, family: str) -> LlavaConfig:
    raise ConfigError(
        "the heads and activations of a LLaVA cannot be told from shapes; give the network's "
        "config.json with --config"
    )


def _inputs(config: LlavaConfig) -> Arrays:
    vision = config.vision_config
    shape = (2, vision.image_size, vision.image_size, vision.num_channels)
    return {
        **llama.LLAMA.inputs(config.text_config),
        "pixel_values": np.random.default_rng(1).standard_normal(shape, np.float32),
    }


def _read(values: dict[str, Any]) -> dict[str, Any]:
    for name in ("text_config", "vision_config"):
        if not isinstance(given := values.get(name, {}), dict):
            raise ConfigError(f"{name} must be a JSON object, got {given!r}")
    return values


def _write(config: LlavaConfig, values: dict[str, Any]) -> dict[str, Any]:
    left = {k: v for k, v in values.items() if k != "heard_stride"}
    return {**left, **_REQUIRED, "image_seq_length": config.picture_tokens}


def _module() -> type:
    from fluxjax.models.llava import LlavaModel

    return LlavaModel


_INNER = "model.language_model."
_REQUIRED = {
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}
_VISION: dict[str, Role] = {
    end: role for end, role in clip.CLIP_VISION.roles.items() if end != "visual_projection"
}
_ROLES: dict[str, Role] = {
    **_VISION,
    # Only Qwen3 norms queries and keys.
    **{end: role for end, role in llama.LLAMA.roles.items() if end not in ("q_norm", "k_norm")},
    # Whose names some of CLIP's layers have too.
    **{f"encoder/layers/{end}": _VISION[end] for end in _VISION if end in llama.LLAMA.roles},
    "multi_modal_projector/linear_1": "columns",
    "multi_modal_projector/linear_2": "rows",
}

LLAVA = Network(
    config=LlavaConfig,
    component="text_encoder",
    words="LLaVA",
    describe=lambda config: (
        f"LLaVA: {llama.LLAMA.describe(config.text_config)}, with its "
        f"{clip.CLIP_VISION.describe(config.vision_config)}"
    ),
    module=_module,
    inputs=_inputs,
    outputs=lambda hidden: {"last_hidden_state": hidden},
    json=JsonForm(
        "transformers",
        ("LlavaForConditionalGeneration",),
        model_types=("llava",),
        defaults={"image_token_index": 32000},
        required=_REQUIRED,
        read=_read,
        write=_write,
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"(language_model\.model|model\.language_model)\.layers\.0\.self_attn\.q_proj\.weight",
                r"(model\.)?multi_modal_projector\.linear_1\.weight",
                r"(model\.)?vision_tower\.(vision_model\.)?embeddings\.class_embedding",
            ),
            _table,
            _infer,
        ),
        Dialect(
            "comfy",
            (
                r"model\.layers\.0\.self_attn\.q_proj\.weight",
                r"multi_modal_projector\.linear_1\.weight",
                r"vision_model\.embeddings\.class_embedding",
            ),
            _comfy_table,
            partial(_infer_of_two_files, "causal"),
            files=2,
        ),
        Dialect(
            "gguf",
            (
                r"blk\.0\.attn_q\.weight",
                r"multi_modal_projector\.linear_1\.weight",
                r"vision_model\.embeddings\.class_embedding",
            ),
            _gguf_table,
            partial(_infer_of_two_files, "gguf"),
            files=2,
        ),
    ),
    roles=_ROLES,
    file_name=lambda config: "llava.safetensors",
    quantised_files=False,
    quantised=r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\..*_proj\.weight",
    scanned=("layers",),
    blocks=lambda config: config.text_config.kept_layers,
    tokenizer=llama.LLAMA.tokenizer,
    published_tokenizer=llama.published_tokenizer,
)
