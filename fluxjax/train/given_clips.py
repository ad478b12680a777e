"""Which frames of a clip are given while a transformer of the Open-Sora kind learns.

Source: hpcaitech/Open-Sora `opensora/utils/train.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fluxjax.config import ConfigError
from fluxjax.families.family import AnyArray
from fluxjax.models.video_condition import GivenFrames, given_frames, least_frames, put_back
from fluxjax.train.settings import ConditionKinds


def draw_kind(kinds: ConditionKinds, rng: np.random.Generator, frames: int) -> str:
    """A kind of `VideoCondition` for one clip of so many latent frames.

    Kinds for which the clip is too short are left out for it alone, and a picture is given nothing.
    Raises ConfigError where none is left.
    """
    fitting = fitting_kinds(kinds, frames)
    if not fitting:
        wanted = [kind for kind, weight in kinds.weights.items() if weight]
        raise ConfigError(
            f"kinds: a clip of {frames} latent frames is too short for {', '.join(wanted)}"
        )
    shares = np.array([*fitting.values()]) / sum(fitting.values())
    return [*fitting][int(rng.choice(len(shares), p=shares))]


def fitting_kinds(kinds: ConditionKinds, frames: int) -> dict[str, float]:
    """Those that may be drawn for a clip of so many latent frames, with their weights."""
    if frames == 1:
        return {"t2v": 1.0}
    each = kinds.weights.items()
    return {kind: weight for kind, weight in each if weight and frames >= least_frames(kind)}


def conditions(
    kinds: Sequence[str],
    shape: tuple[int, ...],
    heads: Sequence[Float[np.ndarray, "c given h w"] | None],
    tails: Sequence[Float[np.ndarray, "c ending h w"] | None],
) -> Float[np.ndarray, "b c_and_mask frames h w"]:
    """What the transformer sees of what is given, of clips of latents of one `shape` (c, frames, h,
    w); `heads` and `tails` are encoded by themselves, as `given_frames` takes them."""
    rows = []
    for kind, head, tail in zip(kinds, heads, tails, strict=True):
        ends = (None if end is None else end[None] for end in (head, tail))
        rows.append(given_frames(kind, (1, *shape), *ends).condition[0])
    return np.stack(rows)


def with_first_frames(
    latents: Float[AnyArray, "b c frames h w"], condition: Float[AnyArray, "b more frames h w"]
) -> Float[AnyArray, "b c frames h w"]:
    """Drawn latents with the first frames of their `conditions` in their places."""
    seen = jnp.asarray(condition)
    return put_back("i2v_head", jnp.asarray(latents), GivenFrames(seen[:, :1], seen[:, 1:]))
