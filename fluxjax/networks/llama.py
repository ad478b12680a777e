"""Decoder-only language models as text encoders: Llama and Qwen3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fluxjax.config import LLAMA3_8B, ConfigError, LlamaConfig
from fluxjax.networks.network import (
    Arrays,
    Dialect,
    JsonForm,
    Network,
    PublishedTokenizer,
    Role,
    Shapes,
    count,
)
from fluxjax.networks.tables import Rule, Table

_FIRST = r"layers\.0\.self_attn\.q_proj\.weight"
_PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)


def table(config: LlamaConfig, prefix: str, others: tuple[str, ...] = ()) -> Table:
    """`prefix`: before the published names; `others`: what else lies in such a file. Of what is
    never computed nothing is read."""
    start = prefix.replace(".", r"\.")
    ignored = [r".*rotary_emb\.inv_freq", r"(language_model\.)?lm_head\..*", *others]
    ignored += _never_computed(config, rf"{start}layers", rf"{start}norm")
    rules: list[Rule] = []
    if prefix:
        rules += [Rule(f"{prefix}{name}", (name,)) for name in ("embed_tokens", "norm")]
        rules += [
            Rule(f"{prefix}layers.{{}}.{name}", (f"layers.{{}}.{name}",))
            for name in (*_PROJECTIONS, *_NORMS)
        ]
    return Table("language model", tuple(rules), identity=not prefix, ignored=tuple(ignored))


def _never_computed(config: LlamaConfig, layers: str, norm: str) -> list[str]:
    if config.stops_after is None:
        return []
    late = range(config.stops_after, config.num_hidden_layers)
    return [rf"{layers}\.({'|'.join(map(str, late)) or 'none'})\..*", rf"{norm}\.weight"]


def gguf_table(config: LlamaConfig) -> Table:
    """llama.cpp's: neighbouring channels of a head are rotated together. Source: its
    `conversion`, `LlamaModel.permute`."""
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
        **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }
    rules = [Rule("token_embd", ("embed_tokens",)), Rule("output_norm", ("norm",))]
    rules += [
        Rule(
            f"blk.{{}}.{theirs}",
            (f"layers.{{}}.{ours}",),
            paired_heads=config.head_dim if theirs in ("attn_q", "attn_k") else 0,
        )
        for theirs, ours in parts.items()
    ]
    ignored = (r"output\.weight", r"rope_freqs\.weight")
    late = _never_computed(config, "blk", "output_norm")
    return Table("language model of GGUF", tuple(rules), ignored=(*ignored, *late))


def _infer(prefix: str, shapes: Shapes, family: str) -> LlamaConfig:
    number = count(shapes, rf"{prefix.replace('.', '[.]')}layers\.(\d+)\.")
    return _known(shapes[f"{prefix}embed_tokens.weight"], number)


def _infer_gguf(shapes: Shapes, family: str) -> LlamaConfig:
    return _known(shapes["token_embd.weight"], count(shapes, r"blk\.(\d+)\."))


def _known(embedding: tuple[int, ...], number: int) -> LlamaConfig:
    vocabulary, width = embedding
    known = LLAMA3_8B.vocab_size, LLAMA3_8B.hidden_size
    if (vocabulary, width) != known or number not in (30, 32):
        raise ConfigError(
            f"the heads and rotations of a language model, {number} layers of width {width}, "
            "cannot be told from shapes; give the network's config.json with --config"
        )
    # What is not read is converted all the same.
    return LLAMA3_8B if number == LLAMA3_8B.stops_after else replace(LLAMA3_8B, stops_after=None)


def _dialect(name: str, prefix: str, others: tuple[str, ...] = ()) -> Dialect:
    return Dialect(
        name,
        (f"{prefix.replace('.', '[.]')}{_FIRST}",),
        lambda config: table(config, prefix, others),
        lambda shapes, family: _infer(prefix, shapes, family),
        unless=(r"multi_modal_projector\..*",) if prefix == "model." else (),
    )


def _read(values: dict[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters must be a JSON object, got {rope!r}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ConfigError(f"rope_type={kind!r} is not supported, only 'default'")
    if "rope_theta" in rope:
        values = {**values, "rope_theta": rope["rope_theta"]}
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if type(heads) is type(width) is int and heads > 0:
        values = {"head_dim": width // heads, **values}
    qwen = values.get("model_type") == "qwen3"
    return {"num_key_value_heads": heads, **values, "qk_norm": qwen}


def _write(config: LlamaConfig, values: dict[str, Any]) -> dict[str, Any]:
    # transformers tells Qwen3 by its class and knows no layer to stop after.
    left = {k: v for k, v in values.items() if k != "qk_norm"}
    if config.stops_after is None:
        del left["stops_after"]
    kind = "qwen3" if config.qk_norm else "llama"
    return {**left, "model_type": kind, "tie_word_embeddings": False}


def _inputs(config: LlamaConfig) -> Arrays:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12))
    mask = np.ones((2, 12), np.int32)
    mask[0, 9:] = 0
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask}


def _describe(config: LlamaConfig) -> str:
    name = "Qwen3" if config.qk_norm else "Llama"
    read = "" if config.stops_after is None else f", of which {config.stops_after} are read"
    return f"{name}, {config.num_hidden_layers} layers of width {config.hidden_size}{read}"


def _module() -> type:
    from fluxjax.models.llama import LlamaModel

    return LlamaModel


def flops(config: LlamaConfig, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of the matrix products of one prompt of `text_tokens`; a multiply-add counts two."""
    c = config
    heads = c.num_attention_heads * c.head_dim
    shared = c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * heads + 2 * shared + 3 * c.intermediate_size)
    attention = 2 * text_tokens * heads
    return 2.0 * text_tokens * c.kept_layers * (layer + attention)


_ROLES: dict[str, Role] = {
    "embed_tokens": "whole",
    "self_attn/q_proj": "columns",
    "self_attn/k_proj": "columns",
    "self_attn/v_proj": "columns",
    "self_attn/o_proj": "rows",
    "mlp/gate_proj": "columns",
    "mlp/up_proj": "columns",
    "mlp/down_proj": "rows",
    "input_layernorm": "copied",
    "post_attention_layernorm": "copied",
    "q_norm": "copied",
    "k_norm": "copied",
    "norm": "copied",
}


def published_tokenizer(config: Any) -> PublishedTokenizer | None:
    """HunyuanVideo's language model was taken from this LLaVA."""
    if config.vocab_size != LlamaConfig.vocab_size:
        return None
    return PublishedTokenizer("xtuner/llava-llama-3-8b-v1_1-transformers")


LLAMA = Network(
    config=LlamaConfig,
    component="text_encoder",
    words="language model",
    describe=_describe,
    module=_module,
    inputs=_inputs,
    outputs=lambda hidden: {"last_hidden_state": hidden},
    json=JsonForm(
        "transformers",
        ("LlamaModel", "LlamaForCausalLM", "Qwen3Model", "Qwen3ForCausalLM"),
        model_types=("llama", "qwen3"),
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
        },
        required={"mlp_bias": False, "use_sliding_window": False},
        read=_read,
        write=_write,
        written_class=lambda config: "Qwen3Model" if config.qk_norm else "LlamaModel",
    ),
    dialects=(
        _dialect("published", ""),
        _dialect("causal", "model."),
        _dialect(
            "llava", "language_model.model.", (r"vision_tower\..*", r"multi_modal_projector\..*")
        ),
        Dialect(
            "gguf",
            (r"blk\.0\.attn_output\.weight", r"token_embd\.weight"),
            gguf_table,
            _infer_gguf,
            unless=(r"multi_modal_projector\..*",),
        ),
    ),
    roles=_ROLES,
    prefixes=("text_encoders.llama.transformer.", "llama.transformer."),
    file_name=lambda config: "language_model.safetensors",
    quantised_files=False,
    quantised=r"layers\.\d+\.(self_attn|mlp)\..*_proj\.weight",
    scanned=("layers",),
    blocks=lambda config: config.kept_layers,
    tokenizer="LlamaTokenizerFast",
    published_tokenizer=published_tokenizer,
    flops=flops,
)
