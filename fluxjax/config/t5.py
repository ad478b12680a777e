"""The T5 encoder, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import Activation, check_types, in_range, layers, positive, require

T5_FILE = "t5*xxl*.safetensors"
"""What a file of T5 XXL is called, as a pattern."""


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The T5 encoder. Defaults are T5 v1.1 XXL, FLUX's second text encoder."""

    vocab_size: int = 32128
    """Rows of the embedding; the tokenizer may know fewer tokens."""
    d_model: int = 4096
    """Width of the residual stream."""
    d_kv: int = 64
    """Width of a head; heads x d_kv need not be d_model."""
    d_ff: int = 10240
    """Width inside the MLPs."""
    num_layers: int = 24
    """Transformer blocks."""
    num_heads: int = 64
    """Heads."""
    relative_attention_num_buckets: int = 32
    """Distances between tokens that have a bias of their own: half for each direction."""
    relative_attention_max_distance: int = 128
    """Tokens from which on all distances share the last bucket."""
    layer_norm_epsilon: float = 1e-6
    """Added to the mean square in every norm."""
    is_gated_act: bool = True
    """Whether the MLPs are gated (v1.1) or not (v1.0)."""
    dense_act_fn: Activation = "gelu_pytorch_tanh"
    """Of the MLPs."""
    pad_token_id: int = 0
    """Fills prompts up."""
    eos_token_id: int = 1
    """Ends a prompt."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 2**21, "vocab_size")
        positive(self, "d_model", "d_kv", "d_ff", "num_heads")
        in_range(self, 1, 2**12, "relative_attention_num_buckets")
        in_range(self, 1, 2**12, "relative_attention_max_distance")
        layers(self, "num_layers")
        in_range(self, 0, 1, "layer_norm_epsilon")
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
