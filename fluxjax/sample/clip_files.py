"""Clips as files that remember how they were made: mp4 through PyAV, animated WebP with Pillow.

A clip is written frame group after frame group, as it is decoded. Beside it lie its first, middle
and last frame as PNGs. The record is JSON, in an mp4 under the key `fluxjax` of its metadata, in a
WebP and in the PNGs where pictures have it (`picture_formats`).
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fluxjax.atomic_write import locked_part, place_new, to_disk, write_new
from fluxjax.clip_reader import ANIMATED, VIDEOS, import_av, is_video, opened_video, read_animation
from fluxjax.config import ConfigError
from fluxjax.config.choices import MAX_FPS
from fluxjax.picture_files import quiet
from fluxjax.sample.file_names import CLIP_FORMATS
from fluxjax.sample.picture_formats import RECORD, encode_picture, exif_of, read_record

if TYPE_CHECKING:
    from PIL.Image import Image

Frames = UInt8[np.ndarray, "t height width 3"]
_BT709 = 1  # ITU-T H.273: primaries, transfer and matrix
_WITHOUT = "; animated .webp does without"
_QUALITY = "16"  # of x264: nothing that an eye sees is lost


@dataclass(frozen=True)
class Clip:
    """A video in memory: its frames, and how many of them a second has."""

    frames: Frames
    fps: float
    info: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a pipeline leaves in it, as Pillow's pictures have it."""


def write_clip(
    path: Path,
    groups: Iterable[Frames],
    *,
    fps: int,
    frames: int,
    record: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a clip of `frames` frames and its stills; returns their paths, the clip's first.

    `path` ends in .mp4, which holds no more than one group in memory, or .webp, whose encoder needs
    all frames at once. A file that is there is kept and the new one gets a number. Raises
    ConfigError for another ending, odd sides of an mp4, another number of frames, and an mp4
    without PyAV; OSError.
    """
    writers = {".mp4": _write_mp4, ".webp": _write_webp}
    require_clip_name(path)
    if frames < 1 or not 1 <= fps <= MAX_FPS:
        raise ConfigError(f"a clip has frames, and 1 to {MAX_FPS} a second, not {frames} and {fps}")
    stills: dict[str, Image] = {}
    with locked_part(path) as (part, file):
        writers[path.suffix.lower()](part, _passing(path, groups, frames, stills), fps, record)
        to_disk(file)
        written = [place_new(part, path)]
    for name, picture in stills.items():
        still = path.with_name(f"{written[0].stem}-{name}.png")
        written.append(write_new(still, encode_picture(picture, ".png", record)))
    return written


def require_clip_name(path: Path) -> None:
    """Raises ConfigError for a name of no clip that is written, and for an mp4's without PyAV."""
    if path.suffix.lower() not in CLIP_FORMATS:
        raise ConfigError(f"{path}: clips are written as {' or '.join(CLIP_FORMATS)}")
    if path.suffix.lower() == ".mp4":
        import_av(path, otherwise=_WITHOUT)


def usual_suffix() -> str:
    """Of clips whose name says nothing else: .mp4 where PyAV is there."""
    from importlib.util import find_spec

    return ".webp" if find_spec("av") is None else ".mp4"


def still_pixels(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Of one that `write_clip` wrote."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture)


def _passing(
    path: Path, groups: Iterable[Frames], frames: int, stills: dict[str, Image]
) -> Iterator[np.ndarray]:
    """Frame after frame; the stills among them are kept."""
    names = {frames // 2: "middle", frames - 1: "last", 0: "first"}  # of few frames the ends
    count = 0
    for frame in (frame for group in groups for frame in group):
        if count in names:
            stills[names[count]] = _picture(frame)
        yield frame
        count += 1
    if count != frames:
        raise ConfigError(f"{path}: {count} frames came, {frames} were announced")


def read_clip(
    path: Path, *, most: int | None = None, last: bool = False, max_megapixels: float = 100.0
) -> Clip:
    """A video or an animated picture, upright, in RGB, transparency over white; of long ones the
    first `most` frames, or the `last`, of which no more are held.

    Raises FileNotFoundError; ConfigError for what cannot be read, frames that are too large, and a
    video without PyAV.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no clip {path}")
    kinds = {**dict.fromkeys(VIDEOS, _video), **dict.fromkeys(ANIMATED, _animation)}
    if path.suffix.lower() not in kinds:
        raise ConfigError(f"{path}: clips are read from {', '.join(kinds)}")
    try:
        frames, fps = kinds[path.suffix.lower()](path, _Kept(most, last), max_megapixels)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # decoders raise almost anything on hostile bytes
        raise ConfigError(f"{path} is no clip that can be read ({error})") from None
    if not frames or len({frame.shape for frame in frames}) > 1:
        raise ConfigError(f"{path} has no frames, or frames of several sizes")
    return Clip(np.stack(frames), fps)


def read_clip_record(path: Path) -> dict[str, Any]:
    """What `write_clip` wrote beside the frames, which are not decoded.

    Raises FileNotFoundError, or ConfigError for a clip that was not made here.
    """
    if not is_video(path.name):
        return read_record(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no clip {path}")
    av = import_av(path)
    try:
        with av.open(str(path)) as container:
            record = json.loads(container.metadata.get(RECORD, "null"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no record can be read ({error})") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path} does not say how it was made: fluxjax did not write it")
    return record


def _picture(frame: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(frame))


def _write_mp4(
    part: Path, frames: Iterator[np.ndarray], fps: int, record: Mapping[str, Any] | None
) -> None:
    """H.264 with half as many colours along each side, which every player shows."""
    av = import_av(part, otherwise=_WITHOUT)
    options = {"movflags": "use_metadata_tags+faststart"}
    with av.open(str(part), "w", format="mp4", options=options) as container:
        if record is not None:
            container.metadata[RECORD] = json.dumps(record)
        stream = container.add_stream("libx264", rate=fps, options={"crf": _QUALITY})
        stream.pix_fmt = "yuv420p"
        for name in ("color_primaries", "color_trc", "colorspace"):
            setattr(stream.codec_context, name, _BT709)
        for index, pixels in enumerate(frames):
            if index == 0:
                stream.height, stream.width = pixels.shape[:2]
                if stream.height % 2 or stream.width % 2:
                    raise ConfigError(
                        f"an mp4's sides are even, not {stream.width} x {stream.height}"
                    )
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts = index
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_webp(
    part: Path, frames: Iterator[np.ndarray], fps: int, record: Mapping[str, Any] | None
) -> None:
    first, *rest = map(_picture, frames)
    # Whole milliseconds that add up to the right length.
    ends = [round(1000 * (i + 1) / fps) for i in range(len(rest) + 1)]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    options = {} if record is None else exif_of(json.dumps(record, ensure_ascii=False))
    first.save(
        part,
        "WEBP",
        save_all=True,
        append_images=rest,
        duration=durations,
        loop=0,
        quality=95,
        kmin=0,
        kmax=1,  # each frame whole: edges of what moved away would stay in the next
        **options,
    )


class _Kept(NamedTuple):
    """Which frames of a clip are."""

    most: int | None
    last: bool

    def of(self, frames: Iterable[np.ndarray]) -> list[np.ndarray]:
        if self.last:
            return list(collections.deque(frames, maxlen=self.most))
        return list(itertools.islice(frames, self.most))


def _video(path: Path, kept: _Kept, max_megapixels: float) -> tuple[list[np.ndarray], float]:
    with opened_video(path, max_megapixels, what=path) as video:
        return kept.of(video.frames), video.fps


def _animation(path: Path, kept: _Kept, max_megapixels: float) -> tuple[list[np.ndarray], float]:
    with quiet():
        animation = read_animation(path, max_megapixels, kept.of)
    most = kept.most or max(animation.counts)  # a frame may stay for hours
    pairs = zip(animation.frames, animation.counts, strict=True)
    repeated = (frame for frame, count in pairs for _ in range(min(count, most)))
    return kept.of(repeated), animation.fps
