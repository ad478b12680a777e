"""What a family is: how its networks make a picture. Sampling, training and diff know only this."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Num

AnyArray = Array | np.ndarray
Apply = Callable[..., Any]
"""`flax.linen.Module.apply`, or what takes its place on a mesh (`parallel.apply.apply_on`)."""


class Conditioning(NamedTuple):
    """What a transformer hears of each prompt. `mask` is 1 at the tokens that it attends to, None
    where it attends to all, as FLUX does."""

    sequence: Float[AnyArray, "b text d"]
    mask: Int[AnyArray, "b text"] | None
    vector: Float[AnyArray, "b p"]


class Tokens(NamedTuple):
    """Latents as a sequence, and where each token stands."""

    values: Float[AnyArray, "b image d"]
    positions: Num[AnyArray, "image axes"]


class Extras(NamedTuple):
    """What a forward is given besides state, times and text."""

    positions: Num[AnyArray, "image axes"]
    """Of the state's tokens."""
    guidance: Float[AnyArray, " b"] | None = None
    """For the guidance embedding; models without one ignore it."""
    tokens: Tokens | None = None
    """More tokens, free of noise, after the state's (FLUX.1 Kontext's reference)."""
    channels: Float[AnyArray, "b image c"] | None = None
    """More channels of the state's tokens, after its own (FLUX.1 Fill and Control)."""


@dataclass(frozen=True, eq=False)
class Family:
    """Module-level functions, so that programs are compiled once; their types are those of FLUX's
    (`fluxjax.families.flux`), which say what each one does.

    `forward` is what a network predicts, for sampling, training, validation and diff alike; `hoist`
    is the same for a whole run, taken apart into what is done once and what each step does.
    """

    components: tuple[str, ...]
    tasks: Mapping[str, tuple[str, ...]]
    """The class names in model_index.json, each with the pictures that it takes."""
    tokenize: Callable[..., tuple[Any, list[str]]]
    encode: Callable[..., Conditioning]
    text_shapes: Callable[..., tuple[Any, Conditioning]]
    state_shape: Callable[..., tuple[int, int, int]]
    pack: Callable[..., Tokens]
    unpack: Callable[..., Float[AnyArray, "n c h w"]]
    schedule: Callable[..., Any]
    passes: Callable[..., Float[np.ndarray, "steps differences"]]
    forward: Callable[..., Any]
    hoist: Callable[..., tuple[Any, Callable[[Any, Any], Any]]]
    noised: Callable[..., Float[Array, "b *shape"]]
    target: Callable[..., Float[Array, "b *shape"]]
