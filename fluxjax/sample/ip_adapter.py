"""IP-Adapters of FLUX.1: pictures that the transformer's blocks attend to beside the prompt.

Source: diffusers `FluxPipeline`; the pictures are read as CLIP's processor reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from fluxjax.checkpoint.lora.scaled_file import scaled_files
from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.source import open_network
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.families import FLUX, family_of
from fluxjax.families.family import AnyArray
from fluxjax.hub import find
from fluxjax.sample.picture_reader import PictureReader

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from fluxjax.sample.given_pictures import Given
    from fluxjax.sample.settings import Settings

# CLIP's, of red, green and blue.
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

SEEN = "image_embeds"
"""Of CLIP's output what the adapter reads."""
Attended = tuple[Float[AnyArray, "n layers tokens d"], Float[AnyArray, "n layers tokens d"]]
"""Keys and values for all blocks."""


class ImagePrompts(NamedTuple):
    """What is attended to in each pass, in one row for all pictures, and how much in each block."""

    passes: tuple[Attended, ...]
    scale: Float[np.ndarray, " layers"]

    def rows(self, count: int) -> tuple[Attended, ...]:
        """Of each pass for each of `count` pictures."""
        return jax.tree.map(lambda x: np.broadcast_to(x, (count, *x.shape[1:])), self.passes)


class ImagePrompter:
    """CLIP's vision encoder and an IP-Adapter.

    `scale`: of what the blocks see of pictures, unless a call says otherwise.
    """

    def __init__(self, encoder: OpenNetwork, adapter: OpenNetwork, scale: float, dtype: Any):
        self.reader, self.scale = PictureReader(encoder, adapter, SEEN, dtype), scale

    def shape(self, pictures: int) -> tuple[int, int, int]:
        """(layers, tokens, width) of the keys that so many pictures become."""
        config = self.reader.reading.follower
        return config.num_layers, pictures * config.num_tokens, config.inner_dim

    def scales(self, settings: Settings) -> Float[np.ndarray, " layers"]:
        """Of each block. Raises ConfigError for another number of them."""
        layers = self.reader.reading.follower.num_layers
        chosen = settings.ip_scale or (self.scale,)
        if len(chosen) not in (1, layers):
            raise ConfigError(
                f"ip_scale is one number, or one for each of {layers} blocks, got {len(chosen)}"
            )
        return np.broadcast_to(np.asarray(chosen, np.float32), (layers,))

    def prompts(self, given: Given, settings: Settings, passes: int) -> ImagePrompts:
        """Of the pictures that are given. A negative pass sees the negative picture, or black."""
        from PIL import Image

        pictures, size = given.ip_images, self.reader.size
        if passes > 1:
            black = Image.new("RGB", (size, size))
            pictures = [*pictures, given.negative_ip_image or black]
        keys, values = self.reader(np.stack([_pixels(picture, size) for picture in pictures]))
        many = len(given.ip_images)
        # The negative pass has as many tokens: one picture, repeated, weighs the same.
        parts = (range(many), [many] * many)[:passes]
        return ImagePrompts(
            tuple((_joined(keys, part), _joined(values, part)) for part in parts),
            self.scales(settings),
        )


def _joined(
    x: Float[np.ndarray, "layers pictures tokens d"], part: Sequence[int]
) -> Float[np.ndarray, "1 layers all d"]:
    return np.concatenate([x[:, i] for i in part], axis=1)[None]


def _pixels(picture: Picture, size: int) -> Float[np.ndarray, "size size 3"]:
    """The middle square of a picture whose shorter side is `size`, with CLIP's mean and spread."""
    from PIL import Image

    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    square = resized[top : top + size, left : left + size].astype(np.float32)
    return (square * np.float32(1 / 255) - _MEAN) / _DEVIATION


def given_ip_adapter(given: Any) -> tuple[str, float] | None:
    """(file, scale) of what Python gives, see `scaled_files`. Raises ConfigError for several."""
    found = scaled_files(given)
    if len(found) > 1:
        raise ConfigError(f"one IP-Adapter sees all pictures, got {len(found)}")
    return found[0] if found else None


def open_ip_adapter(
    given: tuple[str, float] | None,
    image_encoder: str | Path | None,
    model: Path,
    config: PipelineConfig,
    dtype: Any,
) -> ImagePrompter | None:
    """`image_encoder`: a folder with CLIP's vision encoder; by default that of the model's folder.

    Raises FileNotFoundError, and ConfigError for what does not belong together.
    """
    if given is None:
        if image_encoder is not None:
            raise ConfigError("an image encoder sees for an IP-Adapter: give a file of one too")
        return None
    if family_of(config.class_name) is not FLUX:
        raise ConfigError(f"XLabs' IP-Adapters go with FLUX.1 alone, not with {config.class_name}")
    file, scale = given
    path = find(file, "checkpoint")
    if not path.exists():
        raise FileNotFoundError(f"there is no IP-Adapter file {path}")
    if image_encoder is None and (model / "image_encoder").is_dir():
        image_encoder = model / "image_encoder"
    if image_encoder is None:
        raise ConfigError(
            f"{path} needs an image_encoder (--image-encoder): a folder with the CLIP vision "
            "encoder that it was trained with, such as openai/clip-vit-large-patch14"
        )
    folder = find(image_encoder, "checkpoint")
    if not folder.exists():
        raise FileNotFoundError(f"there is no image encoder folder {folder}")
    adapter, encoder = open_network(path, "ip_adapter"), open_network(folder, "image_encoder")
    transformer = config.networks[config.denoiser]
    adapter.config.require_same_model(path, transformer, encoder.config, folder)
    return ImagePrompter(encoder, adapter, scale, dtype)


def check_image_prompts(prompter: ImagePrompter | None, settings: Settings, given: Given) -> None:
    """Raises ConfigError for pictures without an IP-Adapter, and the other way round."""
    pictures = given.ip_images
    if prompter is None:
        named = {
            "ip_image": bool(pictures),
            "negative_ip_image": given.negative_ip_image is not None,
            "ip_scale": settings.ip_scale is not None,
        }
        if wrong := [name for name, there in named.items() if there]:
            raise ConfigError(
                f"{wrong[0]} is for an IP-Adapter, and this model has none: give a file of one as "
                "ip_adapter"
            )
        return
    if not pictures:
        raise ConfigError("an IP-Adapter needs a picture that it sees: give an ip_image")
    if given.negative_ip_image is not None and settings.negative_prompt is None:
        raise ConfigError("negative_ip_image is seen by true_cfg: give a negative_prompt and that")
    prompter.scales(settings)
