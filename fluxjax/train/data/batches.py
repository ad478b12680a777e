"""Pictures with captions as batches of latents and text states: a pure function of the step.

`open_data` lists and checks a source, and hands out batches by step: the same step gives the same
global batch after a resume and on any number of processes. Each batch holds pictures of one size.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from fluxjax.config import ConfigError
from fluxjax.picture_files import quiet
from fluxjax.train.data.catalogue import (
    Catalogue,
    Entry,
    Report,
    import_grain,
    in_threads,
    pixels,
    read_catalogue,
)
from fluxjax.train.data.disk_cache import data_folder
from fluxjax.train.data.encoded import States, TextStates
from fluxjax.train.encoders import Dtype, Encoders, folder_encoders

_ENDLESS = 2**31


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where pictures and captions come from, and how they are cut to size.

    `source` is a folder of pictures with captions beside them or in metadata.jsonl, a parquet file
    or folder, a webdataset tar or folder of tars, or `scenes`: drawn ones. It is only read.
    """

    source: str = "scenes"
    resolution: int = 512
    """Pictures keep their aspect ratio and get at most resolution² pixels; none is enlarged."""
    bucket_step: int = 64
    """Widths and heights are multiples of this."""
    max_aspect: float = 2.0
    """Longer pictures than this ratio of sides are cropped to it."""
    caption_extension: str = ".txt"
    caption_key: str = "text"
    """The captions' name in metadata.jsonl, parquet columns and JSON members of tars."""
    image_key: str = "image"
    """The pictures' parquet column."""
    default_caption: str | None = None
    """For pictures without a caption; None counts them as bad."""
    references: str = ""
    """Training to edit (FLUX.1-Kontext): a folder of pictures, of the source's names, from which
    the source's are made. Scaled and cut as these are, those of validation pictures too."""
    masks: str = ""
    """A folder of grey pictures, of the source's names and sizes: white is learnt, black is not."""
    follow_links: bool = False
    """Read what links point to outside of the source."""
    max_megapixels: float = 80.0
    max_bad_share: float = 0.05
    """Above this share of bad pictures nothing is trained."""
    cache: str = ""
    """Folder of latents and text states; by default $XDG_CACHE_HOME/fluxjax/data."""
    scenes: int = 4096
    """How many scenes are drawn."""
    scene_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of the drawn scenes, in turn; by default a square of the resolution."""

    def __post_init__(self) -> None:
        for name in ("resolution", "bucket_step", "max_megapixels", "scenes"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"DataSettings.{name}={getattr(self, name)} must be greater than 0"
                )
        if self.resolution < self.bucket_step:
            raise ConfigError(
                f"DataSettings.resolution={self.resolution} is smaller than "
                f"bucket_step={self.bucket_step}"
            )
        if self.max_aspect < 1:
            raise ConfigError(f"DataSettings.max_aspect={self.max_aspect} must be at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"DataSettings.max_bad_share={self.max_bad_share} is no share of 1")


class DataBatch(NamedTuple):
    """This process's rows of one global batch; `index` is step * global batch + global row."""

    latents: Float[np.ndarray, "b image c"]
    text: Float[np.ndarray, "b text d"]
    pooled: Float[np.ndarray, "b p"]
    index: Int[np.ndarray, "b"]
    width: int
    height: int
    reference: Float[np.ndarray, "b image c"] | None = None
    mask: Float[np.ndarray, "b image 4"] | None = None


class Data:
    """Made by `open_data`; `data(step)` is the batch of a step.

    Over the steps all pictures come equally often. Each size is shuffled by itself, anew in every
    round, and what a round leaves over opens the next one's first batch: none is dropped.
    """

    def __init__(
        self,
        settings: DataSettings,
        catalogue: Catalogue,
        states: States,
        *,
        batch: int,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        self.entries, self.quarantined = catalogue
        self.batch, self.process_index, self.process_count = batch, process_index, process_count
        self._settings, self._states = settings, states
        self._order = _Order(self.entries, batch, seed)
        listing = [
            (e.digest, e.item.caption, e.width, e.height, *(c.digest for c in _companions(e)))
            for e in self.entries
        ]
        made_by = (states.encoders.image_hash, states.encoders.text_hash)
        self.fingerprint = hashlib.sha256(json.dumps([made_by, listing]).encode()).hexdigest()
        """Changes with any picture, companion, caption, size or encoder."""

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
        lines = [f"{len(self)} pictures in {self._settings.source}: {sizes}"]
        if self.quarantined:
            lines.append(f"{len(self.quarantined)} are left out:")
            lines += [f"  {name}: {reason}" for name, reason in self.quarantined]
        return "\n".join(lines)

    def __call__(self, step: int) -> DataBatch:
        rows = self.batch // self.process_count
        first = self.process_index * rows
        chosen = [self.entries[i] for i in self._order(step, range(first, first + rows))]
        latents = np.stack([self._states.latents(entry) for entry in chosen])
        text, pooled = self.captions([entry.item.caption for entry in chosen])
        index = np.arange(first, first + rows, dtype=np.int32) + np.int32(step * self.batch)
        reference = mask = None
        if references := [e.reference for e in chosen if e.reference is not None]:
            reference = np.stack([self._states.latents(other) for other in references])
        if chosen[0].mask is not None:
            mask = np.stack([self._states.mask(e, latents.shape[1]) for e in chosen])
        size = chosen[0].width, chosen[0].height
        return DataBatch(latents, text, pooled, index, *size, reference, mask)

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

    def captions(self, texts: list[str]) -> TextStates:
        """States of any captions, through the cache; [""] is what dropped captions become."""
        return self._states.text(texts)

    def fill(self, report: Report | None = None) -> None:
        """Encode what the cache lacks; `report(what, done, due)` as it goes.

        Captions come before pictures, so that their encoders need not be held at once. Of several
        processes each begins with its own share and then goes backwards through the others': on a
        disk they have in common they meet, on disks of their own each makes everything.
        """
        states, captions = self._states, sorted({e.item.caption for e in self.entries} | {""})
        entries = [e for one in self.entries for e in (one, one.reference) if e is not None]
        paths = {states.latents_path(entry): entry for entry in entries}
        texts = [c for c in self._own_first(captions) if not states.text_path(c).exists()]
        todo = [p for p in self._own_first(sorted(paths)) if not p.exists()]

        def ready(path: Path) -> tuple[Path, np.ndarray | None]:
            megapixels = self._settings.max_megapixels
            return path, None if path.exists() else pixels(paths[path], megapixels)

        with quiet():
            for done, caption in enumerate(texts, 1):
                states.text([caption])
                if report:
                    report("captions encoded", done, len(texts))
            for done, (path, picture) in enumerate(in_threads(ready, todo, ahead=4), 1):
                if picture is not None:
                    states.latents(paths[path], picture)
                if report:
                    report("pictures encoded", done, len(todo))

    def _own_first(self, values: list[Any]) -> list[Any]:
        count, own = self.process_count, self.process_index
        others = [values[(own + i) % count :: count] for i in range(1, count)]
        return [*values[own::count], *(v for share in others for v in reversed(share))]


def _companions(entry: Entry) -> list[Entry]:
    return [other for other in (entry.reference, entry.mask) if other is not None]


class _Order:
    """Which pictures a step shows. A batch has one size."""

    def __init__(self, entries: list[Entry], batch: int, seed: int):
        grain = import_grain()
        self.batch = batch
        members: dict[tuple[int, int], list[int]] = {}
        for i, entry in enumerate(entries):
            members.setdefault((entry.width, entry.height), []).append(i)
        sizes = sorted(members)
        self.counts = np.array([len(members[size]) for size in sizes])
        seeds = [np.random.SeedSequence((seed, *size)).generate_state(1)[0] for size in sizes]
        self.shuffled = [
            grain.MapDataset.source(members[size]).shuffle(seed=int(one)).repeat()
            for size, one in zip(sizes, seeds, strict=True)
        ]
        # A size with n pictures takes n of len(entries) steps, evenly spread: its j-th batch is
        # due at a random moment of the j-th n-th of that time.
        rng = np.random.default_rng(seed)
        self.sizes = np.repeat(np.arange(len(sizes)), self.counts)
        self.ranks = np.concatenate([np.arange(n) for n in self.counts])
        due = (self.ranks + rng.random(len(entries))) / self.counts[self.sizes]
        order = np.argsort(due, kind="stable")
        self.sizes, self.ranks = self.sizes[order], self.ranks[order]

    def __call__(self, step: int, rows: range) -> list[int]:
        cycle, place = divmod(step, len(self.sizes))
        size = self.sizes[place]
        first = int(cycle * self.counts[size] + self.ranks[place]) * self.batch
        return [self.shuffled[size][first + row] for row in rows]


def open_data(
    settings: DataSettings,
    encoders: Encoders,
    *,
    batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    report: Report | None = None,
) -> Data:
    """Lists and checks the source; `batch` is the global one, of which this process gets a share.

    `report(what, done, due)` is called while pictures that are new to the cache are checked. Raises
    ConfigError, FileNotFoundError, and ValueError above the share of bad pictures.
    """
    if batch < 1 or batch % process_count:
        raise ConfigError(f"a batch of {batch} does not divide by {process_count} process(es)")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"there is no process {process_index} of {process_count}")
    if seed < 0:
        raise ConfigError(f"seed={seed} must not be negative")
    folder = Path(settings.cache).expanduser() if settings.cache else data_folder()
    catalogue = read_catalogue(settings, folder, report)
    states = States(folder, encoders, settings.max_megapixels)
    return Data(
        settings,
        catalogue,
        states,
        batch=batch,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
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
    """Fills the cache for `settings`, see `Data.fill`; returns the lines of `Data.report`."""
    data = open_data(
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
