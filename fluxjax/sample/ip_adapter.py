"""IP-Adapters of FLUX.1: pictures that the transformer's blocks attend to beside the prompt.

Source: diffusers `FluxPipeline`.
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
from fluxjax.config import IP_IMAGES, ConfigError, PipelineConfig
from fluxjax.families import FLUX, family_of
from fluxjax.families.clip_pixels import clip_pixels
from fluxjax.families.family import AnyArray
from fluxjax.hub import find
from fluxjax.sample.picture_reader import PictureReader

if TYPE_CHECKING:
    from fluxjax.sample.given_pictures import Given
    from fluxjax.sample.settings import Settings

SEEN = "image_embeds"
"""Of CLIP's output what the adapter reads."""
Attended = tuple[Float[AnyArray, "n layers tokens d"], Float[AnyArray, "n layers tokens d"]]
"""Keys and values for all blocks."""


class ImagePrompts(NamedTuple):
    """What is attended to in each pass, of each adapter in one row for all pictures, and how much
    of each adapter in each block."""

    passes: tuple[tuple[Attended, ...], ...]
    scales: tuple[Float[np.ndarray, " layers"], ...]

    def rows(self, count: int) -> tuple[tuple[Attended, ...], ...]:
        """Of each pass and adapter for each of `count` pictures."""
        return jax.tree.map(lambda x: np.broadcast_to(x, (count, *x.shape[1:])), self.passes)


class ImagePrompter:
    """CLIP's vision encoder and IP-Adapters, each of which is attended to by itself.

    `scales`: of what the blocks see through each, unless a call says otherwise.
    """

    def __init__(
        self,
        encoder: OpenNetwork,
        adapters: Sequence[OpenNetwork],
        scales: Sequence[float],
        dtype: Any,
    ):
        self.reader, self.scales = PictureReader(encoder, adapters, SEEN, dtype), tuple(scales)

    def shapes(self, pictures: int) -> list[tuple[int, int, int]]:
        """Of each adapter (layers, tokens, width) of the keys that so many pictures become."""
        each = zip(self.reader.reading.followers, self.seen(pictures), strict=True)
        return [(a.num_layers, len(seen) * a.num_tokens, a.inner_dim) for a, seen in each]

    def seen(self, pictures: int) -> list[Sequence[int]]:
        """Which of so many pictures each adapter sees: a single one all of them, of several each
        its own, or all the only one. Raises ConfigError for another number."""
        many = len(self.scales)
        if many == 1:
            return [range(pictures)]
        if pictures not in (1, many):
            raise ConfigError(
                f"of {many} IP-Adapters each sees its ip_image, or all see one: got {pictures}"
            )
        return [[i if pictures > 1 else 0] for i in range(many)]

    def block_scales(self, settings: Settings) -> tuple[Float[np.ndarray, " layers"], ...]:
        """Of each adapter in each block. Raises ConfigError for another number of them."""
        layers, many = self.reader.reading.followers[0].num_layers, len(self.scales)
        chosen = settings.ip_scale or self.scales
        what, allowed = ("blocks", layers) if many == 1 else ("IP-Adapters", many)
        if len(chosen) not in (1, allowed):
            raise ConfigError(
                f"ip_scale is one number, or one for each of {allowed} {what}, got {len(chosen)}"
            )
        each = [chosen] if many == 1 else np.broadcast_to(chosen, many)[:, None]
        return tuple(np.broadcast_to(np.asarray(one, np.float32), (layers,)) for one in each)

    def prompts(self, given: Given, settings: Settings, passes: int) -> ImagePrompts:
        """Of the pictures that are given. A negative pass sees the negative picture, or black."""
        from PIL import Image

        pictures, size = given.ip_images, self.reader.size
        negative = len(pictures)
        if passes > 1:
            black = Image.new("RGB", (size, size))
            pictures = [*pictures, given.negative_ip_image or black]
        read = self.reader(np.stack([clip_pixels(picture, size) for picture in pictures]))
        each = list(zip(read, self.seen(negative), strict=True))

        def attended(is_negative: bool) -> tuple[Attended, ...]:
            # A negative pass has as many tokens: one picture, repeated, weighs the same.
            return tuple(
                (_joined(keys, part), _joined(values, part))
                for (keys, values), seen in each
                for part in [[negative] * len(seen) if is_negative else seen]
            )

        found = tuple(attended(i > 0) for i in range(passes))
        return ImagePrompts(found, self.block_scales(settings))


def _joined(
    x: Float[np.ndarray, "layers pictures tokens d"], part: Sequence[int]
) -> Float[np.ndarray, "1 layers all d"]:
    return np.concatenate([x[:, i] for i in part], axis=1)[None]


def given_ip_adapters(given: Any) -> list[tuple[str, float]]:
    """(file, scale) of each of what Python gives, see `scaled_files`. Raises ConfigError for more
    than there can be pictures."""
    found = scaled_files(given)
    if len(found) > len(IP_IMAGES):
        raise ConfigError(f"at most {len(IP_IMAGES)} IP-Adapters go together, got {len(found)}")
    return found


def open_ip_adapters(
    given: Sequence[tuple[str, float]],
    image_encoder: str | Path | None,
    model: Path,
    config: PipelineConfig,
    dtype: Any,
) -> ImagePrompter | None:
    """`image_encoder`: a folder with CLIP's vision encoder; by default that of the model's folder.

    Raises FileNotFoundError, and ConfigError for what does not belong together.
    """
    if not given:
        if image_encoder is not None:
            raise ConfigError("an image encoder sees for an IP-Adapter: give a file of one too")
        return None
    if family_of(config.class_name) is not FLUX:
        raise ConfigError(f"XLabs' IP-Adapters go with FLUX.1 alone, not with {config.class_name}")
    paths = [find(file, "checkpoint") for file, _ in given]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no IP-Adapter file {path}")
    if image_encoder is None and (model / "image_encoder").is_dir():
        image_encoder = model / "image_encoder"
    if image_encoder is None:
        raise ConfigError(
            f"{paths[0]} needs an image_encoder (--image-encoder): a folder with the CLIP vision "
            "encoder that it was trained with, such as openai/clip-vit-large-patch14"
        )
    folder = find(image_encoder, "checkpoint")
    if not folder.exists():
        raise FileNotFoundError(f"there is no image encoder folder {folder}")
    encoder, transformer = open_network(folder, "image_encoder"), config.networks[config.denoiser]
    adapters = [open_network(path, "ip_adapter") for path in paths]
    for path, adapter in zip(paths, adapters, strict=True):
        adapter.config.require_same_model(path, transformer, encoder.config, folder)
    return ImagePrompter(encoder, adapters, [scale for _, scale in given], dtype)


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
    prompter.seen(len(pictures))
    prompter.block_scales(settings)
