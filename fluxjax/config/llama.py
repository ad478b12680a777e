"""Decoder-only language models as text encoders, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import Activation, check_types, in_range, layers, positive, require


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Llama, and Qwen3, which norms queries and keys. Defaults are the Llama 3 8B of LLaVA,
    HunyuanVideo's text encoder."""

    vocab_size: int = 128320
    """Rows of the embedding; the tokenizer may know fewer tokens."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 14336
    """Width inside the MLPs."""
    num_hidden_layers: int = 32
    """Transformer blocks."""
    num_attention_heads: int = 32
    """Heads of the queries."""
    num_key_value_heads: int = 8
    """Heads of keys and values, each of which serves as many of the queries."""
    head_dim: int = 128
    """Width of a head; heads x head_dim need not be hidden_size."""
    hidden_act: Activation = "silu"
    """Of the MLPs."""
    rope_theta: float = 500000.0
    """Base of the rotations' frequencies."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in every norm."""
    attention_bias: bool = False
    """Whether the attention's four layers have biases."""
    qk_norm: bool = False
    """Whether queries and keys are normed, head by head (Qwen3)."""
    stops_after: int | None = None
    """The layer whose states are read, without the last norm: later layers are neither kept nor
    computed. None: all layers and the norm."""
    pad_token_id: int | None = None
    """Fills prompts up; no weights tell it."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 2**21, "vocab_size")
        positive(self, "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
        positive(self, "num_key_value_heads")
        layers(self, "num_hidden_layers")
        in_range(self, 1e-6, 1e12, "rope_theta")
        in_range(self, 0, 1, "rms_norm_eps")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"LlamaConfig.num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"LlamaConfig.head_dim must be even, got {self.head_dim}",
        )
        require(
            self.stops_after is None or 1 <= self.stops_after <= self.num_hidden_layers,
            f"LlamaConfig.stops_after must be from 1 to num_hidden_layers="
            f"{self.num_hidden_layers}, got {self.stops_after}",
        )

    @property
    def kept_layers(self) -> int:
        """Those that there are parameters of."""
        return self.num_hidden_layers if self.stops_after is None else self.stops_after


LLAMA3_8B = LlamaConfig(stops_after=30, pad_token_id=128258)
"""As HunyuanVideo reads it: the third state from the end."""
QWEN3_4B = LlamaConfig(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    qk_norm=True,
)
