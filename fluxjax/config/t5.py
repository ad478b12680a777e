"""The T5 encoder, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import Activation, positive, require


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The T5 encoder. Defaults are T5 v1.1 XXL, FLUX's second text encoder."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    is_gated_act: bool = True
    dense_act_fn: Activation = "gelu_pytorch_tanh"
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        positive(
            self, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
            "relative_attention_num_buckets", "relative_attention_max_distance",
        )  # fmt: skip
        require(
            self.dense_act_fn in ("relu", "gelu_new", "gelu_pytorch_tanh"),
            f"T5Config.dense_act_fn must be relu, gelu_new or gelu_pytorch_tanh, "
            f"got {self.dense_act_fn!r}",
        )


T5_XXL = T5Config()
T5_SMALL = T5Config(
    d_model=512,
    d_ff=2048,
    num_layers=6,
    num_heads=8,
    is_gated_act=False,
    dense_act_fn="relu",
)
