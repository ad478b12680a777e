"""Videos of strangers, frame after frame: upright, in RGB, or refused with one reason."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxjax.config import ConfigError
from fluxjax.picture_files import BadPicture

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from jaxtyping import UInt8

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_STRICT = {"err_detect": "explode"}  # damage is an error, not a guess at what was there


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
    """A file, or its content.

    Raises BadPicture, also while frames are read, for what is no video or is damaged; ConfigError,
    which begins with `what` it is, without PyAV.
    """
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
