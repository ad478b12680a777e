"""LLaVA: a language model that reads what CLIP sees of a picture among its words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fluxjax.config.base import check_types, in_range
from fluxjax.config.clip import CLIP_L_VISION, CLIPVisionConfig
from fluxjax.config.llama import LLAMA3_8B, LlamaConfig

CLIP_L_336 = replace(CLIP_L_VISION, image_size=336)


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """Defaults are the LLaVA of HunyuanVideo's image to video. CLIP's states before its last layer,
    without its class token, go through two layers into the width of the language model."""

    text_config: LlamaConfig = LLAMA3_8B
    """The language model."""
    vision_config: CLIPVisionConfig = CLIP_L_336
    """The vision encoder."""
    image_token_index: int = 128257
    """The token in whose place the picture is read."""
    heard_stride: int = 1
    """Of the picture's states every so-manieth is kept. No file tells it."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 0, self.text_config.vocab_size - 1, "image_token_index")
        in_range(self, 1, 64, "heard_stride")

    @property
    def picture_tokens(self) -> int:
        """That a picture becomes."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size


LLAVA_LLAMA3 = LlavaConfig(heard_stride=4)
"""As HunyuanVideo's token_replace hears a picture."""
