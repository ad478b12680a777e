"""Videos and animated pictures of strangers, frame after frame: upright, in RGB, or refused with
one reason."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxjax.config import ConfigError
from fluxjax.config.choices import MAX_FPS
from fluxjax.picture_files import BadPicture, quiet, upright_rgb

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from jaxtyping import UInt8

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
ANIMATED = (".webp", ".gif", ".png")
_FORMATS = ("WEBP", "GIF", "PNG")
_STRICT = {"err_detect": "explode"}  # damage is an error, not a guess at what was there


def is_video(name: str) -> bool:
    return name.lower().endswith(VIDEOS)


class OpenedVideo(NamedTuple):
    """A video whose frames are read one after the other."""

    fps: float
    frames: Iterator[UInt8[np.ndarray, "height width 3"]]
    """Decoded as they are asked for."""


def import_av(what: object, *, otherwise: str = "") -> ModuleType:
    """PyAV. Raises ConfigError, which begins with `what` is to be read or written and ends with
    what does `otherwise`."""
    try:
        import av
    except ImportError:
        raise ConfigError(
            f"{what}: videos need PyAV: pip install 'fluxjax[video]'{otherwise}"
        ) from None
    return av


@contextmanager
def opened_video(
    source: Path | bytes, max_megapixels: float, *, what: object = "the data"
) -> Iterator[OpenedVideo]:
    """A file, or its content; of an animated picture, which is read with Pillow, the content.

    Raises BadPicture, also while frames are read, for what is no video or is damaged; ConfigError,
    which begins with `what` it is, without PyAV.
    """
    if isinstance(source, bytes) and _is_picture(source):
        ends = [0.0]
        for _ in _animated(source, max_megapixels, ends):  # how long a frame stays, it says late
            pass
        fps, counts = _rate(ends)
        frames = zip(_animated(source, max_megapixels, [0.0]), counts, strict=True)
        yield OpenedVideo(fps, (frame for frame, count in frames for _ in range(count)))
        return
    av = import_av(what)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            if not container.streams.video:
                raise BadPicture("it holds no video")
            stream = container.streams.video[0]
            if stream.width * stream.height > max_megapixels * 1e6:
                raise BadPicture(f"it has more than {max_megapixels:g} megapixels a frame")
            stream.codec_context.options = _STRICT
            rate = stream.average_rate or stream.base_rate or 24
            yield OpenedVideo(float(rate), _frames(container, stream))
    except (BadPicture, MemoryError):
        raise
    except (av.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        raise BadPicture(f"it cannot be decoded ({error})") from None


def _frames(container: Any, stream: Any) -> Iterator[np.ndarray]:
    import numpy as np  # late, as options know names of videos before anything slow is imported

    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise BadPicture(f"its frame {number} is damaged")
        # Cameras write how far a frame is to be turned, against the clock.
        yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


class Animation(NamedTuple):
    """An animated picture. Writers join frames that are equal into one that stays longer: each has
    a count, which may be in the millions."""

    frames: list[UInt8[np.ndarray, "height width 3"]]
    counts: list[int]
    fps: float


def is_animated(path: Path) -> bool:
    """Whether it is a picture of several frames, as its head says; False where it says nothing."""
    from PIL import Image

    try:
        with quiet(), Image.open(path, formats=_FORMATS) as picture:
            return getattr(picture, "is_animated", False)
    except Exception:  # decoders raise almost anything: what it is shows when it is read
        return False


def read_animation(
    path: Path,
    max_megapixels: float,
    keep: Callable[[Iterable[np.ndarray]], list[np.ndarray]] = list,
) -> Animation:
    """What `keep` makes of its frames, which are decoded as it asks for them; upright, in RGB,
    transparency over white. Raises BadPicture."""
    ends = [0.0]
    frames = keep(_animated(path, max_megapixels, ends))
    fps, counts = _rate(ends)
    return Animation(frames, counts[len(counts) - len(frames) :], fps)


def _is_picture(content: bytes) -> bool:
    """As `ANIMATED` begin; AVI is RIFF too."""
    starts = content.startswith((b"GIF8", b"\x89PNG"))
    return starts or (content[:4], content[8:12]) == (b"RIFF", b"WEBP")


def _animated(
    source: Path | bytes, max_megapixels: float, ends: list[float]
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Its frames, each read after the one before; `ends` get when it ends, in milliseconds."""
    import numpy as np
    from PIL import Image, ImageSequence

    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=_FORMATS) as picture:
            if picture.width * picture.height > max_megapixels * 1e6:
                raise BadPicture(f"it has more than {max_megapixels:g} megapixels a frame")
            for frame in ImageSequence.Iterator(picture):
                pixels = np.asarray(upright_rgb(frame))
                ends.append(ends[-1] + frame.info.get("duration", 0))  # known once it is decoded
                yield pixels
    except (BadPicture, MemoryError):
        raise
    except Exception as error:  # decoders raise almost anything on hostile bytes
        raise BadPicture(f"it cannot be decoded ({error})") from None


def _rate(ends: list[float]) -> tuple[float, list[int]]:
    """Frames a second, and how many of them each stays, of `ends` in whole milliseconds: where some
    stay longer, the lowest rate at whose frames all end, if there is one."""
    import numpy as np

    at, count = np.asarray(ends), len(ends) - 1
    if count and np.ptp(np.diff(at)) > 1:
        for fps in range(1, MAX_FPS + 1):
            places = np.rint(at * fps / 1000)
            if (np.diff(places) > 0).all() and (np.abs(places * 1000 / fps - at) <= 0.5).all():
                return float(fps), np.diff(places).astype(int).tolist()
    return 1000 * count / ends[-1] if ends[-1] else 24.0, [1] * count
