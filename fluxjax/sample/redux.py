"""FLUX.1 Redux: pictures that are heard beside the prompt.

Source: diffusers `FluxPriorReduxPipeline`; the pictures are read as SigLIP's processor reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from fluxjax.checkpoint.lora.scaled_file import finite_scale
from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.source import open_network
from fluxjax.config import ConfigError
from fluxjax.families.family import Conditioning
from fluxjax.sample.given_pictures import read_picture, shown_picture
from fluxjax.sample.picture_reader import PictureReader

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SEEN = "last_hidden_state"
"""Of SigLIP's output what the projector reads."""
Heard = tuple["Picture", float]
"""A picture and its weight."""


class Redux:
    """SigLIP and the projector."""

    def __init__(self, encoder: OpenNetwork, projector: OpenNetwork, dtype: Any):
        self.reader = PictureReader(encoder, [projector], SEEN, dtype)
        self.count: int = encoder.config.tokens
        """Tokens that a picture becomes."""

    def tokens(self, pictures: Sequence[Picture]) -> Float[np.ndarray, "n tokens text"]:
        """What the transformer reads of each picture, after T5's states."""
        size = self.reader.size
        (tokens,) = self.reader(np.stack([_pixels(picture, size) for picture in pictures]))
        return tokens

    def heard(self, conditioning: Conditioning, pictures: Sequence[Heard]) -> Conditioning:
        """The prompts' conditioning with the pictures' tokens joined.

        The weighted sum over the pictures of text and tokens alike, as diffusers has it: a weight
        of all pictures together other than 1 makes the text louder or softer too.
        """
        tokens = self.tokens([picture for picture, _ in pictures])
        dtype = self.reader.dtype
        scales = np.asarray([scale for _, scale in pictures]).astype(dtype)

        def summed(each: Sequence[np.ndarray]) -> np.ndarray:
            scaled = [x * scale for x, scale in zip(each, scales, strict=True)]
            return sum(x.astype(np.float32) for x in scaled).astype(dtype)  # pyright: ignore

        sequence, vector = np.asarray(conditioning.sequence), np.asarray(conditioning.vector)
        text = summed([sequence] * len(tokens))
        more = np.broadcast_to(summed(list(tokens))[None], (len(text), *tokens.shape[1:]))
        joined = np.concatenate([text, more], axis=1)
        return Conditioning(joined, None, summed([vector] * len(tokens)))


def _pixels(picture: Picture, size: int) -> Float[np.ndarray, "height width 3"]:
    """Stretched to the square that SigLIP reads; values in [-1, 1]."""
    from PIL import Image

    resized = picture.resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(resized).astype(np.float32) * np.float32(1 / 255) - 0.5) / np.float32(0.5)


def open_redux(folder: Path, width: int, dtype: Any) -> Redux:
    """Of FLUX.1 Redux's pipeline folder, for a transformer that reads text of `width`.

    Raises FileNotFoundError, ConfigError and what damaged files raise.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no Redux folder {folder}")
    encoder, projector = (open_network(folder, part) for part in ("siglip", "image_embedder"))
    projector.config.require_same_model(folder, encoder.config.hidden_size, width)
    return Redux(encoder, projector, dtype)


def read_heard(given: Any) -> tuple[list[Heard], tuple[str, ...] | None]:
    """(pictures and weights, "FILE:SCALE" of each or None where one has no file) of what Python or
    the command gives: a picture or its file, (either, scale), or a list of these.

    Raises FileNotFoundError, ConfigError.
    """
    from PIL.Image import Image

    from fluxjax.sample.sources import absolute_scaled, split_scale

    if isinstance(given, str | Path | Image) or (
        isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float)
    ):
        given = [given]
    if not isinstance(given, list | tuple) or any(len(x) != 2 for x in given if type(x) is tuple):
        raise ConfigError(
            "redux_image: give a picture or its file, (either, scale) or a list of these"
        )
    pictures: list[Heard] = []
    files: list[str] | None = []
    for one in given:
        item, scale = one if isinstance(one, tuple) else (one, 1.0)
        if isinstance(item, Image):
            shown = shown_picture(item, "picture for Redux")
            pictures.append((shown, finite_scale(scale, "a picture for Redux")))
            files = None
            continue
        if not isinstance(item, str | Path):
            kind = type(item).__name__
            raise ConfigError(f"redux_image must be a picture or a file's path, got {kind}")
        text = f"{item}:{finite_scale(scale, str(item)):g}" if isinstance(one, tuple) else str(item)
        path, scale = split_scale(absolute_scaled(text, "picture for Redux"))
        pictures.append((read_picture(path, "Redux")[0], scale))
        if files is not None:
            files.append(f"{path}:{scale:g}")
    return pictures, None if files is None else tuple(files)
