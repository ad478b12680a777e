"""What a recipe says of its data."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config import ConfigError

_LARGEST = {"resolution": 2**15, "bucket_step": 2**15, "max_megapixels": 10**4, "scenes": 10**7}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where pictures and captions come from, and how they are cut to size.

    `source` is a folder of pictures with captions beside them or in metadata.jsonl, a parquet file
    or folder, a webdataset tar or folder of tars, or `scenes`: drawn ones. It is only read.
    """

    source: str = "scenes"
    resolution: int = 512
    """Pictures keep their aspect ratio and get at most resolution² pixels; none is enlarged."""
    bucket_step: int = 64
    """Widths and heights are multiples of this."""
    max_aspect: float = 2.0
    """Longer pictures than this ratio of sides are cropped to it."""
    caption_extension: str = ".txt"
    caption_key: str = "text"
    """The captions' name in metadata.jsonl, parquet columns and JSON members of tars."""
    image_key: str = "image"
    """The pictures' parquet column."""
    default_caption: str | None = None
    """For pictures without a caption; None counts them as bad."""
    references: str = ""
    """Training to edit (FLUX.1-Kontext): a folder of pictures, of the source's names, from which
    the source's are made. Scaled and cut as these are, those of validation pictures too."""
    masks: str = ""
    """A folder of grey pictures, of the source's names and sizes: white is learnt, black is not."""
    follow_links: bool = False
    """Read what links point to outside of the source."""
    max_megapixels: float = 80.0
    max_bad_share: float = 0.05
    """Above this share of bad pictures nothing is trained."""
    cache: str = ""
    """Folder of latents and text states; by default $XDG_CACHE_HOME/fluxjax/data."""
    scenes: int = 4096
    """How many scenes are drawn."""
    scene_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of the drawn scenes, in turn; by default a square of the resolution."""

    def __post_init__(self) -> None:
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if not 0 < value <= largest:
                raise ConfigError(f"{name} must be above 0 and at most {largest}, got {value}")
        if self.resolution < self.bucket_step:
            raise ConfigError(
                f"resolution {self.resolution} is smaller than bucket_step {self.bucket_step}"
            )
        if self.max_aspect < 1:
            raise ConfigError(f"max_aspect must be at least 1, got {self.max_aspect}")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"max_bad_share must be in [0, 1], got {self.max_bad_share}")
