"""XLabs' IP-Adapters for FLUX.1, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import check_types, in_range, layers, positive, require
from fluxjax.config.clip import CLIPVisionConfig
from fluxjax.config.flux import FluxConfig


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """A picture's embedding as tokens, and what each double block attends to of them.

    Defaults are XLabs' first adapter for FLUX.1-dev.
    """

    num_layers: int = 19
    """Double blocks of the transformer."""
    inner_dim: int = 3072
    """Width of the transformer's residual stream."""
    cross_attention_dim: int = 4096
    """Width of the picture's tokens."""
    image_embed_dim: int = 768
    """Width of CLIP's projected embedding of the picture."""
    num_tokens: int = 4
    """Tokens that the embedding becomes (16 in the second version)."""

    def __post_init__(self) -> None:
        check_types(self)
        layers(self, "num_layers")
        positive(self, "inner_dim", "cross_attention_dim", "image_embed_dim")
        in_range(self, 1, 2**12, "num_tokens")

    def require_same_model(
        self, where: object, transformer: FluxConfig, encoder: CLIPVisionConfig, seen_in: object
    ) -> None:
        """Raises ConfigError, which names `where` it and `seen_in` where the encoder is from,
        unless they belong together."""
        for words, mine, wanted in (
            ("is for {} double blocks", self.num_layers, transformer.num_layers),
            ("is for blocks of width {}", self.inner_dim, transformer.inner_dim),
        ):
            require(
                mine == wanted,
                f"{where}: this IP-Adapter {words.format(mine)}, and the model has {wanted}: it "
                "belongs to another model",
            )
        require(
            encoder.with_projection,
            f"{seen_in} has no projection (visual_projection), which IP-Adapters read",
        )
        require(
            encoder.projection_dim == self.image_embed_dim,
            f"{where} reads pictures embedded in {self.image_embed_dim} numbers, and {seen_in} "
            f"makes {encoder.projection_dim}: it belongs to another image encoder",
        )


IP_ADAPTER = IPAdapterConfig()
