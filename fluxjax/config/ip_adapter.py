"""XLabs' IP-Adapters for FLUX.1, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import check_types, in_range, layers, positive


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


IP_ADAPTER = IPAdapterConfig()
