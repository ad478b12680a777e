"""Picture files and plain encoders for the tests of the training data."""

import hashlib
import io
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from fluxjax.families import Conditioning
from fluxjax.models.latents import pack
from fluxjax.train.encoders import Encoders

SIZES = ((40, 40), (64, 40), (40, 64), (90, 30), (33, 47))


def colour(number: int) -> tuple[int, int, int]:
    """Tells up to 200 pictures apart."""
    return number + 20, 250 - number, (number * 37) % 256


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def picture_bytes(number: int, size: tuple[int, int] | None = None) -> bytes:
    return encoded(Image.new("RGB", size or SIZES[number % len(SIZES)], colour(number)))


def write_folder(root: Path, count: int) -> Path:
    """`count` pictures of several sizes, each with its caption beside it."""
    root.mkdir(parents=True)
    for number in range(count):
        (root / f"{number:03}.png").write_bytes(picture_bytes(number))
        (root / f"{number:03}.txt").write_text(f"picture {number}\n")
    return root


def encode_image(images: np.ndarray) -> np.ndarray:
    """The mean colour as latents of half the size."""
    n, height, width, _ = images.shape
    mean = images.mean((1, 2))[:, :, None, None]
    return np.broadcast_to(mean, (n, 3, height // 2, width // 2))


def encode_text(texts: list[str]) -> Conditioning:
    rows = [list(hashlib.sha256(text.encode()).digest()[:8]) for text in texts]
    pooled = np.array(rows, np.float32)
    return Conditioning(np.repeat(pooled[:, None], 4, axis=1), None, pooled)


def mask_channels(masks: np.ndarray) -> np.ndarray:
    """The pixels of latents of half the size."""
    return rearrange(masks, "n (h y) (w x) -> n (y x) h w", y=2, x=2)


ENCODERS = Encoders(
    encode_image,
    encode_text,
    "image",
    "text",
    mask_channels,
    lambda texts: None,
    lambda latents: np.asarray(pack(latents)),
    scale=2,
)


def number_of(latents: np.ndarray) -> int:
    """Which picture these latents are of."""
    return round((float(latents[0, 0]) + 1) * 127.5) - 20
