"""The CLIP text and vision encoders, both in one, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import Activation, check_types, in_range, layers, positive, require

CLIP_L_FILE = "clip_l*.safetensors"
"""What a file of CLIP ViT-L/14's text encoder is called, as a pattern."""


def _heads_divide(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    require(
        config.hidden_size % config.num_attention_heads == 0,
        f"{type(config).__name__}.hidden_size={config.hidden_size} must divide by "
        f"num_attention_heads={config.num_attention_heads}",
    )


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The CLIP text encoder. Defaults are CLIP ViT-L/14, FLUX's first text encoder."""

    vocab_size: int = 49408
    """Tokens that the tokenizer knows."""
    hidden_size: int = 768
    """Width of the residual stream."""
    intermediate_size: int = 3072
    """Width inside the MLPs."""
    projection_dim: int = 768
    """Width of the space that texts and pictures share; only with_projection uses it."""
    with_projection: bool = False
    """Whether the pooled state is also projected into that space, as text_embeds."""
    num_hidden_layers: int = 12
    """Transformer blocks."""
    num_attention_heads: int = 12
    """Heads; they share hidden_size out."""
    max_position_embeddings: int = 77
    """Tokens of a prompt, padding included."""
    hidden_act: Activation = "quick_gelu"
    """Of the MLPs: quick_gelu in OpenAI's weights, gelu in OpenCLIP's. No shape tells it."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""
    bos_token_id: int = 0
    """The published files say 0, 1 and 2 where the tokenizer has 49406 and 49407."""
    eos_token_id: int = 2
    """Where the sequence is pooled; 2 means the highest id, as the published files mean it."""
    pad_token_id: int = 1
    """What the published files say of padding; the tokenizer decides."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 2**21, "vocab_size")
        in_range(self, 1, 2**14, "max_position_embeddings")
        positive(self, "hidden_size", "intermediate_size", "projection_dim", "num_attention_heads")
        layers(self, "num_hidden_layers")
        in_range(self, 0, 1, "layer_norm_eps")
        _heads_divide(self)


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """The CLIP vision encoder (ViT). Defaults are CLIP ViT-L/14."""

    hidden_size: int = 1024
    """Width of the residual stream."""
    intermediate_size: int = 4096
    """Width inside the MLPs."""
    projection_dim: int = 768
    """Width of the space that texts and pictures share; only with_projection uses it."""
    with_projection: bool = False
    """Whether the pooled state is also projected into that space, as image_embeds."""
    num_hidden_layers: int = 24
    """Transformer blocks."""
    num_attention_heads: int = 16
    """Heads; they share hidden_size out."""
    num_channels: int = 3
    """Channels of the picture."""
    image_size: int = 224
    """Pixels of a side of the picture, which is square."""
    patch_size: int = 14
    """Pixels of a side of the patches, each of which is a token."""
    hidden_act: Activation = "quick_gelu"
    """Of the MLPs: quick_gelu in OpenAI's weights, gelu in OpenCLIP's. No shape tells it."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every layer norm."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "hidden_size", "intermediate_size", "projection_dim", "num_attention_heads")
        in_range(self, 1, 16, "num_channels")
        in_range(self, 1, 1024, "image_size", "patch_size")
        layers(self, "num_hidden_layers")
        in_range(self, 0, 1, "layer_norm_eps")
        _heads_divide(self)
        require(
            self.image_size % self.patch_size == 0,
            f"CLIPVisionConfig.image_size={self.image_size} must divide by "
            f"patch_size={self.patch_size}",
        )


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """A whole CLIP: both encoders with their projections, and the temperature."""

    text_config: CLIPTextConfig = CLIPTextConfig(with_projection=True)
    """The text encoder."""
    vision_config: CLIPVisionConfig = CLIPVisionConfig(with_projection=True)
    """The vision encoder."""

    def __post_init__(self) -> None:
        check_types(self)
        text, vision = self.text_config, self.vision_config
        require(
            text.with_projection and vision.with_projection,
            "CLIPConfig needs both encoders with_projection",
        )
        require(
            text.projection_dim == vision.projection_dim,
            "CLIPConfig needs one projection_dim, got "
            f"{text.projection_dim} for texts and {vision.projection_dim} for pictures",
        )


CLIP_L_TEXT = CLIPTextConfig()
CLIP_BASE_TEXT = CLIPTextConfig(
    hidden_size=512, intermediate_size=2048, projection_dim=512, num_attention_heads=8
)
# OpenCLIP's: Stable Diffusion 2.1's, whose file ends a layer early, and the second of XL and 3.
CLIP_H_TEXT = CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=512,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
CLIP_BIGG_TEXT = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1280,
    with_projection=True,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
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
