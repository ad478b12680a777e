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
    import jax
    from jax.sharding import SingleDeviceSharding

    from fluxjax.checkpoint.pipeline_folder import read_config, tokenizer_of
    from fluxjax.checkpoint.source import open_component
    from fluxjax.networks import network_of
    from fluxjax.sample.pictures import to_bytes

    config = read_config(model)
    family = family_of(config.class_name)
    texts = {name: config.networks[name] for name in config.text_encoders}

    def params(component: Any, *, stacked: bool) -> Any:
        network = open_component(model, component, getattr(config, component))
        place = SingleDeviceSharding(jax.local_devices()[0])
        return network.params(stacked=stacked, dtype=dtype, shardings=place)

    @functools.cache
    def image() -> Callable[[Any], Any]:
        from fluxjax.models.autoencoder import Autoencoder
        from fluxjax.sample.decoding import encode_clips
        from fluxjax.sample.programs import encode_pictures

        if (tiling := config.tiling) is not None:
            vae, weights = network_of(config.vae).build(config.vae), params("vae", stacked=False)

            def encode(pictures: Any) -> Any:
                clips = pictures if pictures.ndim == 5 else pictures[:, None]
                return encode_clips(vae, weights, clips, tiling, mesh=None)

            return encode
        return functools.partial(
            encode_pictures, Autoencoder(config.vae), params("vae", stacked=False)
        )

    @functools.cache
    def tokenizers() -> tuple[Any, ...]:
        from fluxjax.text.tokenizers import load_tokenizer

        return tuple(
            load_tokenizer(network_of(of).tokenizer, model / tokenizer_of(name), of.vocab_size)
            for name, of in texts.items()
        )

    def tokenize(captions: list[str], picture: np.ndarray | None = None) -> Any:
        from PIL import Image

        more: dict[str, Any] = {"max_sequence_length": config.max_sequence_length}
        if picture is not None:
            more["picture"] = Image.fromarray(to_bytes(picture[None])[0])
        return family.tokenize(tokenizers(), captions, **more)[0]

    @functools.cache
    def text() -> Callable[..., Conditioning]:
        import jax.numpy as jnp

        kind = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype), "scan_layers": True}
        modules = tuple(network_of(of).build(of, **kind) for of in texts.values())
        weights = tuple(params(name, stacked=True) for name in texts)

        return lambda *heard: family.encode(modules, weights, tokenize(*heard))

    def release() -> None:
        image.cache_clear()
        text.cache_clear()

    def sizes(told: Told) -> Any:
        alone = family.sizes(config, Told(told.size))
        if alone is None:
            return None
        try:
            return family.sizes(config, told)
        except ConfigError:  # it hears nothing of what the picture was cut out of
            return alone

    files = [*texts, *map(tokenizer_of, texts)]
    return Encoders(
        lambda pictures: image()(pictures),
        lambda *heard: text()(*heard),
        hash_files(model, ("vae", "ae.safetensors"), _VERSION, dtype),
        hash_files(model, files, _VERSION, dtype, str(config.max_sequence_length)),
        functools.partial(family.mask_channels, config=config),
        tokenize,
        lambda latents: np.asarray(family.pack(latents).values),
        sizes,
        family.prompt_of,
        config.latent_frames,
        config.frames_of,
        config.unit,
        config.vae.scale,
        any(task.heard for task in family.tasks_of(config)),
        release,
    )
