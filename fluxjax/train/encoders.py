"""The frozen networks that turn pictures and captions into what the transformer reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.families import Conditioning, Told, family_of
from fluxjax.file_hash import hash_files

Dtype = Literal["float32", "bfloat16"]
_VERSION = "1"  # raised when the same weights would give other latents or text states


class Encoders(NamedTuple):
    """The frozen networks as functions, and hashes that change when they do.

    They must run on this process alone: which entries a cache lacks differs between processes.
    """

    encode_image: Callable[[Any], Any]  # (n, *frames, height, width, 3) in [-1, 1] -> (n, c, *size)
    encode_text: Callable[..., Conditioning]  # of n captions, beside one picture that `sees` asks
    image_hash: str
    text_hash: str
    mask_channels: Callable[[Any], Any]  # (n, height, width) of 0 and 1 -> (n, c, h, w)
    tokenize: Callable[[list[str]], Any]  # of n captions, what text encoders read
    pack: Callable[[Any], Any]  # (n, c, *size) -> (n, *image, d), as the network takes them
    sizes: Callable[[Told], Any] = lambda told: None
    """What the network is told of a picture besides its caption, or None."""
    prompt_of: Callable[[str, Told], str] = lambda caption, told: caption
    """A caption as the text encoders read it."""
    latents_of: Callable[[int], int] = lambda frames: 1
    """How many latent frames a clip of so many frames has."""
    frames_of: Callable[[int], int] = lambda latents: 1
    """And how many frames there are in so many latents."""
    unit: int = 1
    """Sides of pictures are multiples of this."""
    scale: int = 1
    """Pixels on each side of a latent."""
    sees: bool = False
    """Whether captions are read beside a picture, (height, width, 3) in [-1, 1]; it is black where
    none is given."""
    release: Callable[[], None] = lambda: None
    """Drops the weights; a later call loads them again."""

    def encode_each(self, pictures: Any) -> Any:
        """As `encode_image`, one picture after the other."""
        return np.concatenate([np.asarray(self.encode_image(one[None])) for one in pictures])


def folder_encoders(model: Path, dtype: Dtype = "bfloat16") -> Encoders:
    """A pipeline folder's encoders, whose weights are read when something is first encoded.

    Weights are stored as `dtype`; text is computed in it, pictures in float32. Raises
    FileNotFoundError and ConfigError for a folder that is no pipeline.
    """
    from fluxjax.checkpoint.pipeline_folder import tokenizer_of
    from fluxjax.checkpoint.weights_location import named_parts

    folder = _Folder(model, dtype)
    config, family = folder.config, folder.family
    files = [name for name in named_parts(model, folder.texts) if name not in folder.texts]
    texts = [*folder.texts, *map(tokenizer_of, folder.texts), *files]
    return Encoders(
        encode_image=lambda pictures: folder.image(pictures),
        encode_text=lambda *heard: folder.text(*heard),
        image_hash=hash_files(model, ("vae", "ae.safetensors"), _VERSION, dtype),
        text_hash=hash_files(model, texts, _VERSION, dtype, str(config.max_sequence_length)),
        mask_channels=functools.partial(family.mask_channels, config=config),
        tokenize=folder.tokenize,
        pack=lambda latents: np.asarray(family.pack(latents).values),
        sizes=folder.sizes,
        prompt_of=family.prompt_of,
        latents_of=config.latent_frames,
        frames_of=config.frames_of,
        unit=config.unit,
        scale=config.vae.scale,
        sees=any(task.heard for task in family.tasks_of(config)),
        release=folder.release,
    )


class _Folder:
    """A pipeline folder whose parts are opened when they are first used."""

    def __init__(self, model: Path, dtype: Dtype) -> None:
        from fluxjax.checkpoint.pipeline_folder import read_config

        self.model, self.dtype = model, dtype
        self.config = read_config(model)
        self.family = family_of(self.config.class_name)
        self.texts = {name: self.config.networks[name] for name in self.config.text_encoders}

    @functools.cached_property
    def image(self) -> Callable[[Any], Any]:
        """The autoencoder's encoder."""
        from fluxjax.networks import network_of
        from fluxjax.sample.decoding import encode_clips
        from fluxjax.sample.programs import encode_pictures

        config, tiling = self.config.vae, self.config.tiling
        vae, params = network_of(config).build(config), self._params("vae", stacked=False)
        if tiling is None:
            return functools.partial(encode_pictures, vae, params)

        def encode(pictures: Any) -> Any:
            clips = pictures if pictures.ndim == 5 else pictures[:, None]
            return encode_clips(vae, params, clips, tiling, mesh=None)

        return encode

    @functools.cached_property
    def text(self) -> Callable[..., Conditioning]:
        """The text encoders."""
        import jax.numpy as jnp

        from fluxjax.networks import network_of

        kind = {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.dtype)}
        modules = tuple(
            network_of(of).build(of, scan_layers=True, **kind) for of in self.texts.values()
        )
        params = tuple(self._params(name, stacked=True) for name in self.texts)
        return lambda *heard: self.family.encode(modules, params, self.tokenize(*heard))

    @functools.cached_property
    def tokenizers(self) -> tuple[Any, ...]:
        from fluxjax.checkpoint.tokenizer_places import open_tokenizers, tokenizer_places

        places = tokenizer_places(self.model, self.model, self.config)
        return open_tokenizers(places, self.config)

    def tokenize(self, captions: list[str], picture: np.ndarray | None = None) -> Any:
        """`picture`: (height, width, 3) in [-1, 1], seen beside them."""
        from PIL import Image

        from fluxjax.sample.pictures import to_bytes

        more: dict[str, Any] = {"max_sequence_length": self.config.max_sequence_length}
        if picture is not None:
            more["picture"] = Image.fromarray(to_bytes(picture[None])[0])
        return self.family.tokenize(self.tokenizers, captions, **more)[0]

    def sizes(self, told: Told) -> Any:
        """What the network is told of a picture."""
        alone = self.family.sizes(self.config, Told(told.size))
        if alone is None:
            return None
        try:
            return self.family.sizes(self.config, told)
        except ConfigError:  # it hears nothing of what the picture was cut out of
            return alone

    def release(self) -> None:
        """Drops the weights; the next call reads them again."""
        for name in ("image", "text"):
            self.__dict__.pop(name, None)

    def _params(self, component: Any, *, stacked: bool) -> Any:
        import jax
        from jax.sharding import SingleDeviceSharding

        from fluxjax.checkpoint.source import open_component

        network = open_component(self.model, component, getattr(self.config, component))
        place = SingleDeviceSharding(jax.local_devices()[0])
        return network.params(stacked=stacked, dtype=self.dtype, shardings=place)
