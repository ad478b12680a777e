"""ControlNets of FLUX.1, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fluxjax.config.base import in_range, require
from fluxjax.config.flux import FluxConfig


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(FluxConfig):
    """Blocks of FLUX that see a control picture and add to the transformer's tokens.

    Defaults are InstantX's and Shakker's union ControlNets for FLUX.1-dev. `in_channels` are those
    of a token of the picture, and of the control picture's latents; `out_channels` has no meaning.
    """

    num_layers: int = 5
    num_single_layers: int = 10
    num_mode: int = 0
    """Kinds of control pictures that one network has learnt, each with a token; 0 has none."""
    conditioning_embedding_channels: int = 0
    """Channels that convolutions make of the control picture's pixels (XLabs); with 0 it comes as
    the autoencoder's latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, 0, 2**12, "num_mode")
        in_range(self, 0, 2**12, "conditioning_embedding_channels")
        require(
            self.conditioning_embedding_channels in (0, self.in_channels / 4),
            "ControlNetConfig.conditioning_embedding_channels must be a quarter of in_channels="
            f"{self.in_channels}, got {self.conditioning_embedding_channels}: 2 x 2 are a token",
        )

    def require_same_model(self, where: object, transformer: FluxConfig) -> None:
        """Raises ConfigError, which names `where` it is from, if it is of another model."""
        require(
            transformer.in_channels == transformer.out_channels,
            f"{where}: ControlNets go with models that draw from text, and this one joins pictures "
            "to its channels (FLUX.1 Fill, Canny or Depth)",
        )
        for words, mine, wanted in (
            ("blocks of width", self.inner_dim, transformer.inner_dim),
            ("text of width", self.joint_attention_dim, transformer.joint_attention_dim),
            ("pooled text of width", self.pooled_projection_dim, transformer.pooled_projection_dim),
            ("tokens of width", self.in_channels, transformer.in_channels),
        ):
            require(
                mine == wanted,
                f"{where}: this ControlNet has {words} {mine}, and the model {wanted}: it belongs "
                "to another model",
            )

    @property
    def sees_pixels(self) -> bool:
        """Whether the control picture comes as pixels and not as latents."""
        return self.conditioning_embedding_channels > 0


UNION = ControlNetConfig(num_mode=10)
UNION_2 = replace(UNION, num_layers=6, num_single_layers=0, num_mode=0)
XLABS = replace(
    UNION, num_layers=2, num_single_layers=0, num_mode=0, conditioning_embedding_channels=16
)
