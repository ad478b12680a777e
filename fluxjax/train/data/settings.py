"""What a recipe says of its data."""

from __future__ import annotations

from dataclasses import dataclass, field

from fluxjax.config import ConfigError
from fluxjax.config.choices import MAX_FPS, MAX_FRAMES
from fluxjax.train.data.random_masks import RandomMasks

RANDOM, CANNY, OBJECTS = "random", "canny", "objects"

_LARGEST = {
    **{"resolution": 2**15, "bucket_step": 2**15, "max_megapixels": 10**4, "scenes": 10**7},
    **{"fps": MAX_FPS, "pieces": 1000},
}


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where pictures, clips and captions come from, and how they are cut to size.

    `source` is a folder of pictures, with `frames` of clips too, with captions beside them or in
    metadata.jsonl; a parquet file or folder, a webdataset tar or folder of tars; or drawn, `scenes`
    or `edits` of scenes, whose captions say what becomes of their `references = "before"`. It is
    only read.

    `references`, `masks`, `fill_masks` and `controls` are pictures that go with those of the
    source: a folder with files of the same names, of a parquet file a column, and in a tar members
    with that before the extension (`KEY.before.png` for "before").
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
    """Training to edit (FLUX.1-Kontext): what the source's pictures are made from. Scaled and cut
    as these are, those of validation pictures too."""
    masks: str = ""
    """Grey pictures of the source's sizes: white is learnt, black is not."""
    fill_masks: str = ""
    """Training to fill (FLUX.1 Fill): pictures of the source's sizes, white is painted anew; or
    `random`: drawn by the rule of random_masks. Of drawn scenes also `objects`: half of the masks
    lie around one of the objects, the others follow that rule."""
    random_masks: RandomMasks = field(default_factory=RandomMasks)
    controls: str = ""
    """Training to follow (FLUX.1 Canny and Depth, ControlNets): what the source's pictures are
    shaped like, scaled and cut as these are; or `canny`: their own edges."""
    canny: tuple[int, int] = (50, 200)
    """The thresholds of these edges."""
    follow_links: bool = False
    """Read what links point to outside of the source."""
    max_megapixels: float = 80.0
    max_bad_share: float = 0.05
    """Above this share of bad pictures nothing is trained."""
    cache: str = ""
    """Folder of latents and text states; by default $XDG_CACHE_HOME/fluxjax/data."""
    frames: tuple[int, ...] = ()
    """Of models that draw clips: the lengths that clips are learnt in, each clip in the greatest
    that it has; 1 is for still pictures beside them. Videos (.mp4, .mov, .mkv, .webm, .avi, .m4v)
    need PyAV."""
    batches: tuple[int, ...] = ()
    """For each of `frames` how many are in an update, on all devices together; by default, and at
    most, as many as the recipe's `batch`."""
    fps: int = 24
    """Of clips of more frames a second only one frame in two, three, ... is taken."""
    motion: int = 4
    """How much is said to move in clips, as `sample --motion`; 0: it is not said."""
    pieces: int = 1
    """How many pieces are learnt of each clip; where they start is drawn."""
    scenes: int = 4096
    """How many scenes are drawn."""
    scene_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of the drawn scenes, in turn; by default a square of the resolution."""

    @property
    def pictures(self) -> frozenset[str]:
        """What a model draws from besides text that learns from these data, see `families.Task`."""
        taught = {
            "reference": bool(self.references),
            "image": bool(self.fill_masks),
            "mask": bool(self.fill_masks),
            "control": bool(self.controls),
        }
        return frozenset(name for name, is_taught in taught.items() if is_taught)

    @property
    def batch_of(self) -> dict[int, int]:
        """For numbers of frames how many are in an update, where it is said."""
        return dict(zip(self.frames, self.batches, strict=False))

    @property
    def words(self) -> str:
        """What the data are, for people."""
        return "clips" if self.frames else "pictures"

    def __post_init__(self) -> None:
        if not self.source:  # not the current folder, which a Path of nothing is
            raise ConfigError("source is empty: give a folder or a file, or scenes")
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if not 0 < value <= largest:
                raise ConfigError(f"{name} must be above 0 and at most {largest}, got {value}")
        if self.resolution < self.bucket_step:
            raise ConfigError(
                f"resolution {self.resolution} is smaller than bucket_step {self.bucket_step}"
            )
        taught = [n for n in ("references", "fill_masks", "controls") if getattr(self, n)]
        if len(taught) > 1:
            raise ConfigError(
                f"references teach to edit, fill_masks to fill and controls to follow: of "
                f"{' and '.join(taught)} give one"
            )
        if self.max_aspect < 1:
            raise ConfigError(f"max_aspect must be at least 1, got {self.max_aspect}")
        self._check_clips(taught)
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"max_bad_share must be in [0, 1], got {self.max_bad_share}")

    def _check_clips(self, taught: list[str]) -> None:
        if len(set(self.frames)) < len(self.frames):
            raise ConfigError(f"frames names a length twice: {', '.join(map(str, self.frames))}")
        for name in ("frames", "batches"):
            for value in getattr(self, name):
                if not 1 <= value <= MAX_FRAMES:
                    raise ConfigError(f"{name} must be from 1 to {MAX_FRAMES}, got {value}")
        if self.batches and len(self.batches) != len(self.frames):
            raise ConfigError(
                f"batches says of each of frames how many are in an update: got "
                f"{len(self.batches)} for {len(self.frames)}"
            )
        if not 0 <= self.motion <= 7:
            raise ConfigError(f"motion must be from 1 to 7, or 0, got {self.motion}")
        if self.frames and (taught or self.masks):
            raise ConfigError("clips have no references, masks, fill_masks or controls")
