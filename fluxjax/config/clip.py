"""The CLIP text and vision encoders, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import Activation, positive, require


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The CLIP text encoder. Defaults are CLIP ViT-L/14, FLUX's first text encoder."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 0
    eos_token_id: int = 2
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "projection_dim",
            "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        )  # fmt: skip
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"CLIPTextConfig.hidden_size={self.hidden_size} must divide by "
            f"num_attention_heads={self.num_attention_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """The CLIP vision encoder (ViT). Defaults are CLIP ViT-L/14."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    projection_dim: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        positive(
            self, "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
            "num_attention_heads", "num_channels", "image_size", "patch_size",
        )  # fmt: skip
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"CLIPVisionConfig.hidden_size={self.hidden_size} must divide by "
            f"num_attention_heads={self.num_attention_heads}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"CLIPVisionConfig.image_size={self.image_size} must divide by "
            f"patch_size={self.patch_size}",
        )


CLIP_L_TEXT = CLIPTextConfig()
CLIP_BASE_TEXT = CLIPTextConfig(
    hidden_size=512, intermediate_size=2048, projection_dim=512, num_attention_heads=8
)
CLIP_L_VISION = CLIPVisionConfig()
CLIP_BASE_VISION = CLIPVisionConfig(
    hidden_size=768,
    intermediate_size=3072,
    projection_dim=512,
    num_hidden_layers=12,
    num_attention_heads=12,
    patch_size=32,
)
