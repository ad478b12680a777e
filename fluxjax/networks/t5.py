"""The T5 encoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxjax.config import ConfigError, T5Config
from fluxjax.config.t5 import T5_FILE
from fluxjax.networks.network import (
    Arrays,
    Dialect,
    JsonForm,
    Network,
    PublishedTokenizer,
    Shapes,
    count,
)
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table(
    "T5 encoder",
    rules=(Rule("encoder.embed_tokens", ("shared",)),),
    identity=True,
    ignored=(r"decoder\..*", r"lm_head\..*", "logit_scale"),
)


def _gguf() -> Table:
    """llama.cpp's names; they say nothing of the kind of position buckets, which are T5's."""
    block = "encoder.block.{}.layer"
    parts = {f"attn_{x}": f"0.SelfAttention.{x}" for x in "qkvo"}
    parts |= {"attn_rel_b": "0.SelfAttention.relative_attention_bias", "attn_norm": "0.layer_norm"}
    parts |= {
        "ffn_gate": "1.DenseReluDense.wi_0",
        "ffn_up": "1.DenseReluDense.wi_1",
        "ffn_down": "1.DenseReluDense.wo",
        "ffn_norm": "1.layer_norm",
    }
    rules = [
        Rule("token_embd", ("shared",)),
        Rule("enc.output_norm", ("encoder.final_layer_norm",)),
    ]
    rules += [
        Rule(f"enc.blk.{{}}.{theirs}", (f"{block}.{ours}",)) for theirs, ours in parts.items()
    ]
    return Table("T5 encoder of GGUF", tuple(rules), ignored=(r"dec\..*", r"output\.weight"))


GGUF = _gguf()


def _infer(shapes: Shapes, family: str) -> T5Config:
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
        num_layers=count(shapes, r"encoder\.block\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        is_gated_act=gated,
        dense_act_fn="gelu_pytorch_tanh" if gated else "relu",
    )


def _infer_gguf(shapes: Shapes, family: str) -> T5Config:
    buckets, heads = shapes["enc.blk.0.attn_rel_b.weight"]
    inner, width = shapes["enc.blk.0.attn_q.weight"]
    gated = "enc.blk.0.ffn_gate.weight" in shapes
    if not gated:
        raise ConfigError("only the gated T5 (version 1.1) is read from GGUF")
    return T5Config(
        vocab_size=shapes["token_embd.weight"][0],
        d_model=width,
        d_kv=inner // heads,
        d_ff=shapes["enc.blk.0.ffn_down.weight"][1],
        num_layers=count(shapes, r"enc\.blk\.(\d+)\."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        is_gated_act=True,
        dense_act_fn="gelu_pytorch_tanh",
    )


def _read(values: dict[str, Any]) -> dict[str, Any]:
    feed_forward = str(values.get("feed_forward_proj", "relu"))
    gated, activation = feed_forward.startswith("gated-"), feed_forward.split("-")[-1]
    # transformers' own exception: "gated-gelu" means the tanh form.
    activation = "gelu_new" if (gated, activation) == (True, "gelu") else activation
    return {"is_gated_act": gated, "dense_act_fn": activation, **values}


def _write(config: T5Config, values: dict[str, Any]) -> dict[str, Any]:
    gated = "gated-" if config.is_gated_act else ""
    activation = "gelu" if config.dense_act_fn.startswith("gelu") else config.dense_act_fn
    return values | {
        "feed_forward_proj": gated + activation,
        "dropout_rate": 0.1,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
    }


def _inputs(config: T5Config) -> Arrays:
    # Long enough that the farthest tokens share the last bucket.
    length = 2 * config.relative_attention_max_distance
    ids = np.random.default_rng(0).integers(
        min(2, config.vocab_size - 1), config.vocab_size, (2, length)
    )
    ids[0, 9:] = config.pad_token_id
    return {"input_ids": ids.astype(np.int32)}


def _describe(config: T5Config) -> str:
    version = "1.1" if config.is_gated_act else "1.0"
    return f"T5 v{version} encoder, {config.num_layers} blocks of width {config.d_model}"


def _module() -> type:
    from fluxjax.models.t5 import T5Encoder

    return T5Encoder


def _tokenizer(config: T5Config) -> PublishedTokenizer | None:
    published = config.vocab_size == T5Config.vocab_size
    return PublishedTokenizer("google/t5-v1_1-xxl", "<pad>") if published else None


T5 = Network(
    config=T5Config,
    component="text_encoder_2",
    tokenizer="T5TokenizerFast",
    published_tokenizer=_tokenizer,
    blocks=lambda config: config.num_layers,
    words="T5 encoder",
    describe=_describe,
    module=_module,
    inputs=_inputs,
    outputs=lambda hidden: {"last_hidden_state": hidden},
    json=JsonForm(
        "transformers",
        ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"),
        model_types=("t5",),
        defaults={"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
        read=_read,
        write=_write,
    ),
    dialects=(
        Dialect(
            "published",
            (r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",),
            lambda config: PUBLISHED,
            _infer,
        ),
        Dialect("gguf", (r"enc\.blk\.0\.attn_q\.weight",), lambda config: GGUF, _infer_gguf),
    ),
    roles={
        "shared": "whole",
        "relative_attention_bias": "columns",
        "layer_norm": "copied",
        "final_layer_norm": "copied",
        "SelfAttention/q": "columns",
        "SelfAttention/k": "columns",
        "SelfAttention/v": "columns",
        "SelfAttention/o": "rows",
        "DenseReluDense/wi": "columns",
        "DenseReluDense/wi_0": "columns",
        "DenseReluDense/wi_1": "columns",
        "DenseReluDense/wo": "rows",
    },
    prefixes=("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
    files=T5_FILE,
    file_name=lambda config: "t5xxl.safetensors",
    gguf_architecture=lambda config: "t5encoder",
    quantised=r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\..*)\.weight",
    scanned=("block",),
    # OneTrainer counts FLUX's text encoders from 1, kohya also those that FLUX has not.
    adapter_prefixes=(
        "text_encoders.t5xxl.transformer.",
        "text_encoders.t5xxl.",
        "text_encoder_2.",
        "base_model.model.",
        "lora_te2_",
        "lora_te3_",
    ),
    further_prefixes=("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
)
