"""Pictures with captions as batches of latents and text states: a pure function of the step.

`open_dataset` lists and checks a source, and hands out batches by step: the same step gives the
same global batch after a resume and on any number of processes. Each batch holds one size.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fluxjax.atomic_write import remove_leftovers
from fluxjax.config import ConfigError
from fluxjax.families import Conditioning
from fluxjax.picture_files import quiet
from fluxjax.train.data.cache_file import data_folder
from fluxjax.train.data.catalogue import (
    Catalogue,
    Entry,
    Report,
    import_grain,
    in_threads,
    pixels,
    read_catalogue,
)
from fluxjax.train.data.encoding_cache import EncodingCache
from fluxjax.train.data.order import Order
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.encoders import Dtype, Encoders, folder_encoders

_ENDLESS = 2**31


class DataBatch(NamedTuple):
    """This process's rows of one global batch; `index` is step * global batch + global row."""

    latents: Float[np.ndarray, "b *image c"]
    conditioning: Conditioning
    index: Int[np.ndarray, "b"]
    width: int
    height: int
    reference: Float[np.ndarray, "b *image c"] | None = None
    mask: Float[np.ndarray, "b *image each"] | None = None
    channels: Float[np.ndarray, "b *image more"] | None = None
    """What is joined to the latents' channels."""
    ids: Any = None
    """Token ids of the captions, where they are asked for."""


class Dataset:
    """Made by `open_dataset`; `data(step)` is the batch of a step.

    Over the steps all pictures come equally often. Each size is shuffled by itself, anew in every
    round, and what a round leaves over opens the next one's first batch: none is dropped.
    """

    def __init__(
        self,
        settings: DataSettings,
        catalogue: Catalogue,
        states: EncodingCache,
        *,
        batch: int,
        seed: int,
        process_index: int,
        process_count: int,
        channels: Sequence[str] = (),
        with_ids: bool = False,
    ):
        self.entries, self.quarantined, self.notes = catalogue
        self.batch, self.process_index, self.process_count = batch, process_index, process_count
        self._settings, self._states, self._channels = settings, states, tuple(channels)
        self._with_ids = with_ids
        self._order = Order(self.entries, batch, seed)
        listing = [
            (e.digest, e.item.caption, e.width, e.height, *(c.digest for c in e.companions))
            for e in self.entries
        ]
        made_by = (states.encoders.image_hash, states.encoders.text_hash)
        self.fingerprint = hashlib.sha256(json.dumps([made_by, listing]).encode()).hexdigest()
        """Changes with any picture, companion, caption, size or encoder."""

    @property
    def identity(self) -> str:
        """What these data are, for people and for comparing."""
        return f"{len(self)} pictures, {self.fingerprint[:16]}"

    def train(self, say: Callable[[str], None]) -> None:
        """From now on what the disk refuses is told to `say`, and does not end the reading."""
        self._states.say = say

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.entries)

    @property
    def sizes(self) -> dict[tuple[int, int], int]:
        """How many pictures have each (width, height), the most frequent first."""
        return dict(Counter((e.width, e.height) for e in self.entries).most_common())

    def report(self) -> str:
        """The pictures, their sizes, and those left out with the reasons, in lines."""
        sizes = ", ".join(f"{n} of {w}x{h}" for (w, h), n in self.sizes.items())
        lines = [*self.notes, f"{len(self)} pictures in {self._settings.source}: {sizes}"]
        if self.quarantined:
            lines.append(f"{len(self.quarantined)} are left out:")
            lines += [f"  {name}: {reason}" for name, reason in self.quarantined]
        return "\n".join(lines)

    def __call__(self, step: int) -> DataBatch:
        rows = self.batch // self.process_count
        first = self.process_index * rows
        chosen = [self.entries[i] for i in self._order(step, range(first, first + rows))]
        latents = np.stack([self._states.latents(entry) for entry in chosen])
        captions = [entry.item.caption for entry in chosen]
        conditioning, ids = self.captions(captions), self.ids(captions)
        told = [self._states.encoders.sizes(entry.told) for entry in chosen]
        if told[0] is not None:
            conditioning = conditioning._replace(sizes=np.stack(told))
        index = np.arange(first, first + rows, dtype=np.int32) + np.int32(step * self.batch)
        reference = mask = None
        if references := [e.reference for e in chosen if e.reference is not None]:
            reference = np.stack([self._states.latents(other) for other in references])
        if chosen[0].mask is not None:
            mask = np.stack([self._states.mask(e) for e in chosen])
        channels = None
        if self._channels:
            channels = np.stack([self._joined(entry) for entry in chosen])
        size = chosen[0].width, chosen[0].height
        return DataBatch(latents, conditioning, index, *size, reference, mask, channels, ids)

    def _joined(self, entry: Entry) -> Float[np.ndarray, "*image more"]:
        """What is joined to the channels of an entry's tokens."""

        def one(name: str) -> np.ndarray:
            if name == "control":
                assert entry.control is not None
                return self._states.latents(entry.control)
            return self._states.masked(entry) if name == "masked" else self._states.fill_mask(entry)

        return np.concatenate([one(name) for name in self._channels], axis=-1)

    def iterate(self, start_step: int = 0) -> Iterator[DataBatch]:
        """Endless batches from `start_step` on, read ahead by threads. Close it when done."""
        grain = import_grain()
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        steps = grain.MapDataset.range(start_step, _ENDLESS).map(self)
        iterator = iter(steps.to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()

    def captions(self, texts: list[str]) -> Conditioning:
        """States of any captions, through the cache; [""] is what dropped captions become."""
        return self._states.text(texts)

    def ids(self, texts: list[str]) -> Any:
        """Token ids of any captions; None where they are not asked for."""
        return self._states.encoders.tokenize(texts) if self._with_ids else None

    def fill(self, report: Report | None = None) -> None:
        """Encode what the cache lacks; `report(what, done, due)` as it goes.

        Captions come before pictures, so that their encoders need not be held at once. Of several
        processes each begins with its own share and then goes backwards through the others': on a
        disk they have in common they meet, on disks of their own each makes everything.
        """
        states, captions = self._states, sorted({e.item.caption for e in self.entries} | {""})
        paths: dict[Path, tuple[Entry, bool]] = {}
        for entry in self.entries:
            for one in (entry, entry.reference, entry.control):
                if one is not None:
                    paths[states.latents_path(one)] = one, False
            if entry.fill_mask is not None:
                paths[states.masked_path(entry)] = entry, True
        texts = [c for c in self._own_first(captions) if not states.text_path(c).exists()]
        todo = [p for p in self._own_first(sorted(paths)) if not p.exists()]

        def ready(path: Path) -> tuple[Path, np.ndarray | None]:
            megapixels, (entry, masked) = self._settings.max_megapixels, paths[path]
            if masked or path.exists():
                return path, None
            return path, pixels(entry, megapixels)

        with quiet():
            for done, caption in enumerate(texts, 1):
                states.text([caption])
                if report:
                    report("captions encoded", done, len(texts))
            for done, (path, picture) in enumerate(in_threads(ready, todo, ahead=4), 1):
                entry, masked = paths[path]
                if masked:
                    states.masked(entry)
                elif picture is not None:
                    states.latents(entry, picture)
                if report:
                    report("pictures encoded", done, len(todo))

    def _own_first(self, values: list[Any]) -> list[Any]:
        count, own = self.process_count, self.process_index
        others = [values[(own + i) % count :: count] for i in range(1, count)]
        return [*values[own::count], *(v for share in others for v in reversed(share))]


def open_dataset(
    settings: DataSettings,
    encoders: Encoders,
    *,
    batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    report: Report | None = None,
    channels: Sequence[str] = (),
    with_ids: bool = False,
) -> Dataset:
    """Lists and checks the source; `batch` is the global one, of which this process gets a share.
    `channels`: what is joined to the latents', as in `families.Task`. `with_ids`: whether batches
    have token ids of their captions.

    `report(what, done, due)` is called while pictures that are new to the cache are checked. Raises
    ConfigError, FileNotFoundError, and ValueError above the share of bad pictures.
    """
    if batch < 1 or batch % process_count:
        raise ConfigError(f"a batch of {batch} does not divide by {process_count} process(es)")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"there is no process {process_index} of {process_count}")
    if seed < 0:
        raise ConfigError(f"seed={seed} must not be negative")
    if settings.bucket_step % encoders.unit:
        near = max(1, round(settings.bucket_step / encoders.unit)) * encoders.unit
        raise ConfigError(
            f"bucket_step must be a multiple of {encoders.unit}, the pixels of one token, got "
            f"{settings.bucket_step}; {near} would do"
        )
    folder = Path(settings.cache).expanduser() if settings.cache else data_folder()
    remove_leftovers(folder)
    catalogue = read_catalogue(settings, folder, report)
    states = EncodingCache(folder, encoders, settings.max_megapixels)
    return Dataset(
        settings,
        catalogue,
        states,
        batch=batch,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        channels=channels,
        with_ids=with_ids,
    )


def precompute(
    settings: DataSettings,
    model: Path,
    *,
    dtype: Dtype = "bfloat16",
    process_index: int = 0,
    process_count: int = 1,
    report: Report | None = None,
) -> str:
    """Fills the cache for `settings`, see `Dataset.fill`; returns the lines of `Dataset.report`."""
    data = open_dataset(
        settings,
        folder_encoders(model, dtype),
        batch=process_count,
        seed=0,
        process_index=process_index,
        process_count=process_count,
        report=report,
    )
    data.fill(report)
    return data.report()
