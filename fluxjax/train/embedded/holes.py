"""Holes around an object of a drawn scene, which a model that fills paints anew."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from fluxjax.train.embedded.scenes import Scene


def hole(
    scene: Scene, chosen: int, rng: np.random.Generator, *, width: int, height: int
) -> Float[np.ndarray, "height width"]:
    """1 in a rectangle or an ellipse around the object `chosen`, with some room, else 0; the
    scene's fields have no leading axis, sizes are in pixels."""
    side = min(width, height)
    x, y = scene.centre[chosen] * side
    reach = 1.15 * scene.radius[chosen] * side + 3
    wide, high = reach * rng.uniform(1.0, 1.3, 2)
    rows, columns = np.mgrid[:height, :width] + 0.5
    across, down = np.abs(columns - x) / wide, np.abs(rows - y) / high
    if rng.random() < 0.5:
        return (np.maximum(across, down) <= 1).astype(np.float32)
    return (across**2 + down**2 <= 1.5).astype(np.float32)
