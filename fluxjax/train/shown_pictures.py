"""The pictures that validation draws from: of each prompt what it edits, fills or follows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float

from fluxjax.sample.edges import canny_edges
from fluxjax.sample.given_pictures import read_picture
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.train.data.buckets import fit
from fluxjax.train.data.encoding_cache import Seen
from fluxjax.train.data.settings import CANNY, DataSettings
from fluxjax.train.encoders import Encoders
from fluxjax.train.given_clips import conditions
from fluxjax.train.settings import ValidationSettings

Pictures = dict[str, Float[np.ndarray, "prompts height width 3"]]


def read_shown(settings: ValidationSettings, size: tuple[int, int], data: DataSettings) -> Pictures:
    """In [-1, 1], cut to (width, height), by what they are to a task; none if nothing is drawn."""
    if not settings.every:
        return {}
    found: Pictures = {}
    for name, paths in settings.pictures.items():
        pictures = [read_picture(path, name)[0] for path in paths]
        if name == "control" and data.controls == CANNY:
            pictures = [canny_edges(one, *one.size, data.canny) for one in pictures]
        if pictures:
            found[name] = np.stack([fit(one, *size) for one in pictures])
    return found


def seen_beside(pictures: Pictures, encoders: Encoders) -> list[Seen] | None:
    """What prompts are read beside, where they are; None where nothing is drawn."""
    if not encoders.sees or not pictures:
        return None
    each = pictures["reference"]
    keys = [hashlib.sha256(one.tobytes()).hexdigest() for one in each]
    return [Seen(key, partial(np.asarray, one)) for key, one in zip(keys, each, strict=True)]


def encode_shown(
    pictures: Pictures,
    channels: tuple[str, ...],
    encoded: Callable[[np.ndarray], np.ndarray],
    mask_channels: Callable[[np.ndarray], np.ndarray],
    latent_frames: int = 1,
    *,
    begins: bool = False,
) -> Inputs:
    """What the pipeline is given besides the prompts: a row for each of them. Of clips, of so many
    latent frames, a reference is the first one.

    `channels`: what is joined to the latents', in its order, and `begins`, see `families.Task`.
    `encoded`: (n, height, width, 3) in [-1, 1] -> latents; `mask_channels`: as `families.Family`'s.
    """
    if not pictures:
        return Inputs()
    if channels == ("given",):
        heads = encoded(pictures["reference"])
        count, c, _, rows, columns = heads.shape
        shape = (c, latent_frames, rows, columns)
        kinds = ["i2v_head"] * count
        given = conditions(kinds, shape, [*heads], [None] * count)
        return Inputs(channels=given, image=heads if begins else None)
    joined = []
    for name in channels:
        if name == "control":
            joined.append(encoded(pictures[name]))
            continue
        painted = (pictures["mask"].mean(-1) >= 0).astype(np.float32)
        cut = pictures["image"] * (1 - painted)[..., None]
        joined.append(encoded(cut) if name == "masked" else mask_channels(painted))
    reference = pictures.get("reference")
    return Inputs(
        None if reference is None else encoded(reference),
        np.concatenate(joined, axis=1) if joined else None,
    )
