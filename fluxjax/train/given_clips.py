"""Which frames of a clip are given while a transformer of the Open-Sora kind learns.

Source: hpcaitech/Open-Sora `opensora/utils/train.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from fluxjax.config import ConfigError
from fluxjax.models.video_condition import given_frames, given_lengths
from fluxjax.train.settings import ConditionKinds


def draw_kind(kinds: ConditionKinds, rng: np.random.Generator, frames: int) -> str:
    """A kind of `VideoCondition` for one clip of so many latent frames.

    Kinds for which the clip is too short are left out for it alone, and a picture is given nothing.
    Raises ConfigError where none is left.
    """
    if frames == 1:
        return "t2v"
    fitting = {kind: weight for kind, weight in kinds.weights.items() if _fits(kind, frames)}
    total = sum(fitting.values())
    if not total:
        wanted = [kind for kind, weight in kinds.weights.items() if weight]
        raise ConfigError(
            f"kinds: a clip of {frames} latent frames is too short for {', '.join(wanted)}"
        )
    shares = np.array([*fitting.values()]) / total
    return [*fitting][int(rng.choice(len(shares), p=shares))]


def _fits(kind: str, frames: int) -> bool:
    first, last = given_lengths(kind)
    return frames >= first + last and (not first + last or frames > max(first, last))


def conditions(
    kinds: Sequence[str],
    shape: tuple[int, int, int, int],
    heads: Sequence[Float[np.ndarray, "c given h w"] | None],
    tails: Sequence[Float[np.ndarray, "c ending h w"] | None],
) -> Float[np.ndarray, "b c_and_mask frames h w"]:
    """What the transformer sees of what is given, of clips of latents of one `shape` (c, frames, h,
    w); `heads` and `tails` are encoded by themselves, as `given_frames` takes them."""
    rows = []
    for kind, head, tail in zip(kinds, heads, tails, strict=True):
        ends = (None if end is None else end[None] for end in (head, tail))
        rows.append(np.asarray(given_frames(kind, (1, *shape), *ends).condition)[0])
    return np.stack(rows)
