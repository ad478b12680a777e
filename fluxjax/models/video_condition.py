"""Which latent frames of a video are given, and what Open-Sora's transformer sees of them.

Source: hpcaitech/Open-Sora `opensora/utils/inference.py`, `opensora/utils/train.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fluxjax.config import ConfigError

VideoCondition = Literal[
    "t2v",
    "i2v_head",
    "i2v_tail",
    "i2v_loop",
    "v2v_head",
    "v2v_tail",
    "v2v_head_easy",
    "v2v_tail_easy",
]
"""Nothing, a first or last picture or both, or the first or last latent frames of a video."""

_FIRST: Mapping[str, int] = {"i2v_head": 1, "i2v_loop": 1, "v2v_head": 9, "v2v_head_easy": 17}
_LAST: Mapping[str, int] = {"i2v_tail": 1, "i2v_loop": 1, "v2v_tail": 9, "v2v_tail_easy": 17}


class GivenFrames(NamedTuple):
    """A video's latents that are given. `mask` is 1 there; elsewhere `latents` are 0."""

    mask: Float[Array | np.ndarray, "b 1 frames h w"]
    latents: Float[Array | np.ndarray, "b c frames h w"]

    @property
    def condition(self) -> Float[np.ndarray, "b c_and_mask frames h w"]:
        """What the transformer sees, to be packed: the mask first."""
        return np.concatenate([self.mask, self.latents], axis=1)


def given_lengths(kind: str) -> tuple[int, int]:
    """How many latent frames a `VideoCondition` gives at the start and at the end.

    Raises ConfigError for a kind that there is not.
    """
    if kind not in get_args(VideoCondition):
        known = ", ".join(get_args(VideoCondition))
        raise ConfigError(f"{kind!r} is no kind of video condition: there are {known}")
    return _FIRST.get(kind, 0), _LAST.get(kind, 0)


def least_frames(kind: str) -> int:
    """How many latent frames have room for more than what is given."""
    first, last = given_lengths(kind)
    return max(first + last, max(first, last) + 1) if first + last else 1


def given_frames(
    kind: str,
    shape: tuple[int, ...],
    head: Float[Array | np.ndarray, "b c given h w"] | None = None,
    tail: Float[Array | np.ndarray, "b c ending h w"] | None = None,
) -> GivenFrames:
    """Latents of `shape` (b, c, frames, h, w) that are given at their places.

    A `head` may be longer than what `kind` gives, whose first frames are taken; of a `tail` the
    last are. A picture, and each end of a loop, is encoded by itself.
    Raises ConfigError where the video is too short, and where `head` or `tail` is missing or has
    too few frames.
    """
    if shape[2] < least_frames(kind):
        raise ConfigError(
            f"{kind} needs at least {least_frames(kind)} latent frames, got {shape[2]}"
        )
    first, last = given_lengths(kind)
    latents = np.zeros(shape, np.float32)
    for length, given, name in ((first, head, "first"), (last, tail, "last")):
        if length and (given is None or given.shape[2] < length):
            found = 0 if given is None else given.shape[2]
            raise ConfigError(f"{kind} gives the {name} {length} latent frames, got {found}")
    mask = np.zeros((shape[0], 1, *shape[2:]), np.float32)
    if first and head is not None:
        latents[:, :, :first], mask[:, :, :first] = head[:, :, :first], 1.0
    if last and tail is not None:
        latents[:, :, -last:], mask[:, :, -last:] = tail[:, :, -last:], 1.0
    return GivenFrames(mask, latents)


def put_back(
    kind: str, latents: Float[Array, "b c frames h w"], given: GivenFrames
) -> Float[Array, "b c frames h w"]:
    """A drawn video with its given pictures; those of a video (v2v) stay as they were drawn."""
    if not kind.startswith("i2v"):
        return latents
    return jnp.where(given.mask > 0, given.latents, latents)
