"""The SigLIP vision encoder, and the published size that FLUX.1 Redux reads."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import Activation, check_types, in_range, layers, positive, require


@dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig:
    """The SigLIP vision encoder (ViT without a class token). Defaults are so400m/14 at 384."""

    hidden_size: int = 1152
    """Width of the residual stream."""
    intermediate_size: int = 4304
    """Width inside the MLPs."""
    num_hidden_layers: int = 27
    """Transformer blocks."""
    num_attention_heads: int = 16
    """Heads; they share hidden_size out, 72 each in so400m."""
    num_channels: int = 3
    """Channels of the picture."""
    image_size: int = 384
    """Pixels of a side of the picture, which is square; what is left beyond whole patches (6 of
    384) is not seen."""
    patch_size: int = 14
    """Pixels of a side of the patches, each of which is a token."""
    hidden_act: Activation = "gelu_pytorch_tanh"
    """Of the MLPs."""
    layer_norm_eps: float = 1e-6
    """Added to the variance in every layer norm."""
    vision_use_head: bool = True
    """Whether the weights hold the pooling head, which Redux does not read."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "hidden_size", "intermediate_size", "num_attention_heads")
        in_range(self, 1, 16, "num_channels")
        in_range(self, 1, 1024, "image_size", "patch_size")
        layers(self, "num_hidden_layers")
        in_range(self, 0, 1, "layer_norm_eps")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"SiglipVisionConfig.hidden_size={self.hidden_size} must divide by "
            f"num_attention_heads={self.num_attention_heads}",
        )
        require(
            self.image_size >= self.patch_size,
            f"SiglipVisionConfig.image_size={self.image_size} must be at least "
            f"patch_size={self.patch_size}",
        )

    @property
    def tokens(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2


SIGLIP_SO400M = SiglipVisionConfig()
