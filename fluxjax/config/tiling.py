"""How clips are cut into tiles that an autoencoder codes one by one: each code's own, as data."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import check_types, positive, require


@dataclass(frozen=True)
class Tiles:
    """Along one axis, in pixels or frames: a new tile begins every `stride`. What it shares with
    the one before fades from that into it."""

    size: int
    """Of a tile."""
    stride: int

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "size", "stride")
        require(
            self.stride <= self.size,
            f"Tiles of {self.size} that begin every {self.stride} leave gaps between them",
        )

    @property
    def overlap(self) -> int:
        return self.size - self.stride


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """None: not cut along that axis. Rows and columns are cut where either side exceeds its tiles,
    frames where they exceed theirs; a causal autoencoder's tiles have one frame more.

    Statistics of norms and attention are each tile's own, so that another tiling is another result,
    and what a code draws depends on its tiling.
    """

    rows: Tiles | None = None
    """Along the height."""
    columns: Tiles | None = None
    """Along the width."""
    frames: Tiles | None = None
    """Along the time."""

    def __post_init__(self) -> None:
        require(
            (self.rows is None) == (self.columns is None),
            f"Tiling cuts rows and columns or neither, got {self.rows} and {self.columns}",
        )


_SPACE = Tiles(256, 192)
WHOLE = Tiling()
OPEN_SORA = Tiling(rows=_SPACE, columns=_SPACE)
"""Open-Sora 2.0's sampling, of HunyuanVideo's autoencoder."""
TENCENT = Tiling(rows=_SPACE, columns=_SPACE, frames=Tiles(64, 48))
"""HunyuanVideo's own code."""
DIFFUSERS_TILED = Tiling(rows=_SPACE, columns=_SPACE, frames=Tiles(16, 12))
"""diffusers after `enable_tiling`."""
OPEN_SORA_DC = Tiling(rows=_SPACE, columns=_SPACE, frames=Tiles(32, 24))
"""Open-Sora 2.0's deep-compression autoencoder with all of its tiling."""
