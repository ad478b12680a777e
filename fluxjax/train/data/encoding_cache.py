"""Latents of pictures and clips, and states of captions, from the disk or, the first time, from the
encoders.

A key hashes content, encoder, size and crop, never a position or a step: whatever the order of the
data, a picture's latents and its caption's states are its own.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fluxjax.cli import sentence
from fluxjax.families import Conditioning
from fluxjax.train.data.cache_file import compact, read_arrays, write_arrays
from fluxjax.train.data.catalogue import Entry, pixels
from fluxjax.train.encoders import Encoders

_CROP = "middle"
_LAYOUT = "n c h w"  # of the latents in an entry; they were once packed


class Seen(NamedTuple):
    """A picture that a caption is read beside; its key hashes what it is."""

    key: str
    pixels: Callable[[], Float[np.ndarray, "height width 3"]]


class EncodingCache:
    """Each is encoded alone, so that it does not depend on what it was asked for together with."""

    def __init__(self, folder: Path, encoders: Encoders, max_megapixels: float):
        self.folder, self.encoders, self.max_megapixels = folder, encoders, max_megapixels
        self.say: Callable[[str], None] | None = None
        """Once training has begun: told what the disk refuses, which until then is raised."""
        self._lock = threading.Lock()

    def latents_path(self, entry: Entry) -> Path:
        size, *frames = self._cut(entry)
        made_by = self.encoders.image_hash
        return self._path("latents", entry.digest, made_by, size, _CROP, _LAYOUT, *frames)

    def text_path(self, caption: str, seen: Seen | None = None) -> Path:
        beside = () if seen is None else (seen.key,)
        return self._path("text", caption, self.encoders.text_hash, *beside)

    def first_frame(self, entry: Entry) -> Seen | None:
        """What the caption of a clip is read beside, where it is."""
        if not self.encoders.sees:
            return None
        first = entry.part(0, 1)
        key = " ".join((entry.digest, *self._cut(first), _CROP))
        return Seen(key, lambda: pixels(first, self.max_megapixels)[0])

    def _cut(self, entry: Entry) -> tuple[str, ...]:
        size = f"{entry.width}x{entry.height}"
        return (size,) if entry.piece is None else (size, "{} {} {}".format(*entry.piece))

    def _path(self, kind: str, *parts: str) -> Path:
        key = hashlib.sha256("\0".join((kind, *parts)).encode()).hexdigest()  # the entry's too
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def latents(self, entry: Entry) -> Float[np.ndarray, "*image c"]:
        """`unpacked` latents, packed."""
        return self.encoders.pack(self.unpacked(entry)[None])[0]

    def unpacked(
        self, entry: Entry, picture: Float[np.ndarray, "*frames h w 3"] | None = None
    ) -> Float[np.ndarray, "c *size"]:
        """Normalised posterior means of a picture or a clip, as an entry has them for any family.

        `picture` is given where it is decoded already.

        Raises ValueError where the picture is no longer what it was when it was listed.
        """

        def make() -> dict[str, np.ndarray]:
            image = pixels(entry, self.max_megapixels) if picture is None else picture
            return {"latents": np.asarray(self.encoders.encode_image(image[None]))[0]}

        return self._find(self.latents_path(entry), make, entry.item.name)["latents"]

    def mask(self, entry: Entry) -> Float[np.ndarray, "*image each"]:
        """How much each latent of the tokens counts: 1 where the mask is white, 0 where black."""
        mask, size, side = entry.mask, (entry.width, entry.height), self.encoders.scale
        assert mask is not None

        def make() -> dict[str, np.ndarray]:
            grey = (pixels(mask, self.max_megapixels).mean(-1) + 1) / 2
            rows, columns = (length // side for length in grey.shape)
            each = grey.reshape(rows, side, columns, side).mean((1, 3))
            return {"mask": self.encoders.pack(each[None, None])[0]}

        form = f"{side} {self.encoders.unit}"
        path = self._path("mask", mask.digest, "{}x{}".format(*size), form, _CROP, mask.item.ground)
        return self._find(path, make, mask.item.name)["mask"]

    def masked(self, entry: Entry) -> Float[np.ndarray, "*image c"]:
        """Latents, as those of `latents`, of a picture whose fill mask is cut out."""
        assert entry.fill_mask is not None

        def make() -> dict[str, np.ndarray]:
            kept = 1 - self._painted(entry)
            image = pixels(entry, self.max_megapixels)[None] * kept[..., None]
            return {"latents": np.asarray(self.encoders.encode_image(image))[0]}

        found = self._find(self.masked_path(entry), make, entry.item.name)["latents"]
        return self.encoders.pack(found[None])[0]

    def masked_path(self, entry: Entry) -> Path:
        assert entry.fill_mask is not None
        size = f"{entry.width}x{entry.height}"
        each = entry.digest, entry.fill_mask.digest, entry.fill_mask.item.ground
        return self._path("masked", *each, self.encoders.image_hash, size, _CROP, _LAYOUT)

    def fill_mask(self, entry: Entry) -> Float[np.ndarray, "*image c"]:
        """The pixels of a fill mask as channels of the tokens under them."""
        mask, size = entry.fill_mask, f"{entry.width}x{entry.height}"
        assert mask is not None

        def make() -> dict[str, np.ndarray]:
            channels = self.encoders.mask_channels(self._painted(entry))
            return {"mask": self.encoders.pack(channels)[0]}

        form = f"{self.encoders.unit} {mask.item.ground}"
        path = self._path("fill mask", mask.digest, size, form, _CROP)
        return self._find(path, make, mask.item.name)["mask"]

    def _painted(self, entry: Entry) -> Float[np.ndarray, "1 height width"]:
        """1 where it is painted anew, else 0."""
        assert entry.fill_mask is not None
        white = pixels(entry.fill_mask, self.max_megapixels).mean(-1) >= 0
        return white.astype(np.float32)[None]

    def text(
        self, captions: Sequence[str], beside: Sequence[Seen | None] | None = None
    ) -> Conditioning:
        """States of each caption, read beside its picture where there is one."""

        def one(caption: str, seen: Seen | None) -> dict[str, np.ndarray]:
            def make() -> dict[str, np.ndarray]:
                more = () if seen is None else (seen.pixels(),)
                heard = self.encoders.encode_text([caption], *more)
                parts = {"text": heard.sequence, "pooled": heard.vector, "mask": heard.mask}
                return {name: np.asarray(x)[0] for name, x in parts.items() if x is not None}

            path = self.text_path(caption, seen)
            return self._find(path, make, f"the caption {caption!r:.60}")

        pairs = [*zip(captions, beside or [None] * len(captions), strict=True)]
        keys = [(caption, seen and seen.key) for caption, seen in pairs]
        states = {key: one(*pair) for key, pair in dict(zip(keys, pairs, strict=True)).items()}
        rows = [states[key] for key in keys]

        def all_of(name: str) -> np.ndarray | None:
            return np.stack([row[name] for row in rows]) if name in rows[0] else None

        sequence, mask = all_of("text"), all_of("mask")
        assert sequence is not None
        return Conditioning(
            sequence, None if mask is None else mask.astype(np.int32), all_of("pooled")
        )

    def _find(
        self, path: Path, make: Callable[[], dict[str, np.ndarray]], what: str
    ) -> dict[str, np.ndarray]:
        with suppress(ValueError, OSError):  # looked at again, and said, by the one who encodes
            if (found := read_arrays(path, path.stem)) is not None:
                return found
        with self._lock:  # one encoder at a time, and each entry once
            if (found := self._read(path)) is not None:
                return found
            made = {name: np.asarray(v, np.float32) for name, v in make().items()}
            if not all(np.isfinite(value).all() for value in made.values()):
                raise ValueError(f"{what} is encoded to values that are not finite")
            try:
                write_arrays(path, made, path.stem)
            except OSError as error:
                if self.say is None:
                    raise
                self.say(f"warning: {what} is encoded anew each time: {sentence(error)}")
        # As it will be read from the disk, so that the first epoch is like the others.
        return {name: compact(value).astype(np.float32) for name, value in made.items()}

    def _read(self, path: Path) -> dict[str, np.ndarray] | None:
        """An entry, or None where it must be made: it is absent, damaged or cannot be read."""
        try:
            return read_arrays(path, path.stem)
        except (ValueError, OSError) as error:
            if self.say is not None:
                self.say(f"warning: {sentence(error)}; it is encoded anew")
            return None
