"""The edges of a photograph, as FLUX.1 Canny was trained on them (the extra `control`)."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from fluxjax.config import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


_IMPORTING = Lock()  # cv2 is in sys.modules as another module, without a spec, while it is imported


def require_opencv() -> None:
    """Raises ConfigError, which says how to get it, where OpenCV is missing."""
    with _IMPORTING:
        if sys.modules.get("cv2") is None and find_spec("cv2") is None:
            raise ConfigError("canny needs OpenCV: pip install 'fluxjax[control]'")


def canny_edges(photo: Picture, width: int, height: int, thresholds: tuple[int, int]) -> Picture:
    """White on black, in RGB, found at the size at which they are used. Source: BFL's
    `CannyImageEncoder`, whose thresholds are 50 and 200."""
    require_opencv()
    from PIL import Image

    with _IMPORTING:
        import cv2

    resized = np.asarray(photo.resize((width, height), Image.Resampling.LANCZOS))
    return Image.fromarray(cv2.Canny(resized, *thresholds)).convert("RGB")
