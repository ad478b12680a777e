"""The frozen networks that turn pictures and captions into what the transformer reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fluxjax.config.latents import PATCH
from fluxjax.families import FLUX, Conditioning
from fluxjax.file_hash import hash_files

Dtype = Literal["float32", "bfloat16"]
_VERSION = "1"  # raised when the same weights would give other latents or text states


class Encoders(NamedTuple):
    """The frozen networks as functions, and hashes that change when they do.

    They must run on this process alone: which entries a cache lacks differs between processes.
    """

    encode_image: Callable[[Any], Any]  # (n, height, width, 3) in [-1, 1] -> (n, c, h, w)
    encode_text: Callable[[list[str]], Conditioning]  # of n captions
    image_hash: str
    text_hash: str
    mask_channels: Callable[[Any], Any]  # (n, height, width) of 0 and 1 -> (n, c, h, w)
    tokenize: Callable[[list[str]], Any]  # of n captions, what text encoders read
    unit: int = 1
    """Sides of pictures are multiples of this."""
    release: Callable[[], None] = lambda: None
    """Drops the weights; a later call loads them again."""

    def encode_each(self, pictures: Any) -> Any:
        """As `encode_image`, one picture after the other."""
        return np.concatenate([np.asarray(self.encode_image(one[None])) for one in pictures])


def folder_encoders(model: Path, dtype: Dtype = "bfloat16") -> Encoders:
    """A pipeline folder's encoders, whose weights are read when something is first encoded.

    Weights are stored as `dtype`; text is computed in it, pictures in float32. Raises
    FileNotFoundError and ConfigError for a folder that is no FLUX pipeline.
    """
    import jax
    from jax.sharding import SingleDeviceSharding

    from fluxjax.checkpoint.pipeline_folder import read_flux
    from fluxjax.checkpoint.source import open_component

    config = read_flux(model)

    def params(component: Any, *, stacked: bool) -> Any:
        network = open_component(model, component, getattr(config, component))
        place = SingleDeviceSharding(jax.local_devices()[0])
        return network.params(stacked=stacked, dtype=dtype, shardings=place)

    @functools.cache
    def image() -> Callable[[Any], Any]:
        from fluxjax.models.autoencoder import Autoencoder
        from fluxjax.sample.programs import encode_pictures

        return functools.partial(
            encode_pictures, Autoencoder(config.vae), params("vae", stacked=False)
        )

    @functools.cache
    def tokenizers() -> tuple[Any, Any]:
        from fluxjax.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer

        return (
            load_clip_tokenizer(model / "tokenizer", config.text_encoder.vocab_size),
            load_t5_tokenizer(model / "tokenizer_2", config.text_encoder_2.vocab_size),
        )

    def tokenize(texts: list[str]) -> Any:
        length = config.max_sequence_length
        return FLUX.tokenize(tokenizers(), texts, max_sequence_length=length)[0]

    @functools.cache
    def text() -> Callable[[list[str]], Conditioning]:
        import jax.numpy as jnp

        from fluxjax.models.clip import CLIPTextModel
        from fluxjax.models.t5 import T5Encoder

        kind = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype), "scan_layers": True}
        clip = CLIPTextModel(config.text_encoder, **kind)
        t5 = T5Encoder(config.text_encoder_2, **kind)
        weights = params("text_encoder", stacked=True), params("text_encoder_2", stacked=True)

        return lambda texts: FLUX.encode((clip, t5), weights, tokenize(texts))

    def release() -> None:
        image.cache_clear()
        text.cache_clear()

    texts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return Encoders(
        lambda pictures: image()(pictures),
        lambda captions: text()(captions),
        hash_files(model, ("vae", "ae.safetensors"), _VERSION, dtype),
        hash_files(model, texts, _VERSION, dtype, str(config.max_sequence_length)),
        functools.partial(FLUX.mask_channels, config=config),
        tokenize,
        PATCH * config.vae.scale,
        release,
    )
