"""Pictures or clips with captions as batches of latents and text states: a function of the step.

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
from fluxjax.models.video_condition import given_lengths
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
from fluxjax.train.data.encoding_cache import EncodingCache, Seen
from fluxjax.train.data.order import Order
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.encoders import Dtype, Encoders, folder_encoders
from fluxjax.train.given_clips import conditions, draw_kind, fitting_kinds
from fluxjax.train.settings import ConditionKinds

_ENDLESS = 2**31
_GIVEN = "given"  # of the channels, see `families.Task`
_KINDS = ConditionKinds()


class DataBatch(NamedTuple):
    """This process's rows of one global batch; `index` is step * global batch + global row."""

    latents: Float[np.ndarray, "b *image c"]
    conditioning: Conditioning
    index: Int[np.ndarray, "b"]
    width: int
    height: int
    frames: int = 1
    reference: Float[np.ndarray, "b *image c"] | None = None
    mask: Float[np.ndarray, "b *image each"] | None = None
    channels: Float[np.ndarray, "b *image more"] | None = None
    """What is joined to the latents' channels."""
    ids: Any = None
    """Token ids of the captions, where they are asked for."""


class Dataset:
    """Made by `open_dataset`; `data(step)` is the batch of a step.

    Over the steps all come equally often. Each size is shuffled by itself, anew in every
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
        kinds: ConditionKinds = _KINDS,
    ):
        self.entries, self.quarantined, self.notes = catalogue
        self.batch, self.process_index, self.process_count = batch, process_index, process_count
        self._settings, self._states, self._channels = settings, states, tuple(channels)
        self._with_ids, self._seed, self._kinds = with_ids, seed, kinds
        self._order = Order(self.entries, batch, seed, settings.batch_of)
        listing = [
            (e.digest, self._said(e), e.width, e.height, *(c.digest for c in e.companions))
            + (e.piece or ())
            for e in self.entries
        ]
        made_by = (states.encoders.image_hash, states.encoders.text_hash, *settings.batches)
        self.fingerprint = hashlib.sha256(json.dumps([made_by, listing]).encode()).hexdigest()
        """Changes with any picture, companion, caption, size, piece of a clip or encoder."""
        if _GIVEN in self._channels:  # lengths that are too short show now
            for frames in {entry.frames for entry in self.entries}:
                draw_kind(kinds, np.random.default_rng(0), states.encoders.latents_of(frames))

    @property
    def identity(self) -> str:
        """What these data are, for people and for comparing."""
        return f"{len(self)} {self._settings.words}, {self.fingerprint[:16]}"

    def train(self, say: Callable[[str], None]) -> None:
        """From now on what the disk refuses is told to `say`, and does not end the reading."""
        self._states.say = say

    def __len__(self) -> int:
        """The number of pictures, or of pieces of clips."""
        return len(self.entries)

    @property
    def sizes(self) -> dict[tuple[int, ...], int]:
        """How many have each `Entry.bucket`, the most frequent first."""
        return dict(Counter(e.bucket for e in self.entries).most_common())

    def report(self) -> str:
        """The pictures, their sizes, and those left out with the reasons, in lines."""
        sizes = ", ".join(f"{n} of {'x'.join(map(str, one))}" for one, n in self.sizes.items())
        what = self._settings.words
        lines = [*self.notes, f"{len(self)} {what} in {self._settings.source}: {sizes}"]
        if self.quarantined:
            lines.append(f"{len(self.quarantined)} are left out:")
            lines += [f"  {name}: {reason}" for name, reason in self.quarantined]
        return "\n".join(lines)

    def __call__(self, step: int) -> DataBatch:
        rows = self._order.batch(step) // self.process_count
        first = self.process_index * rows
        chosen = [self.entries[i] for i in self._order(step, range(first, first + rows))]
        whole = [self._states.unpacked(entry) for entry in chosen]
        latents = np.concatenate([self._states.encoders.pack(one[None]) for one in whole])
        captions = [self._said(entry) for entry in chosen]
        beside = list(map(self._states.first_frame, chosen))
        conditioning, ids = self.captions(captions, beside), self.ids(captions)
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
            each = zip(chosen, index, (one.shape for one in whole), strict=True)
            channels = np.stack([self._joined(entry, int(i), shape) for entry, i, shape in each])
        size = chosen[0].width, chosen[0].height, chosen[0].frames
        return DataBatch(latents, conditioning, index, *size, reference, mask, channels, ids)

    def _said(self, entry: Entry) -> str:
        """The caption as the text encoders read it."""
        return self._states.encoders.prompt_of(entry.item.caption, entry.told)

    def _joined(
        self, entry: Entry, index: int, shape: tuple[int, ...]
    ) -> Float[np.ndarray, "*image more"]:
        """What is joined to the channels of an entry's tokens, in the sample of this index;
        `shape`: of its latents."""

        def one(name: str) -> np.ndarray:
            if name == "control":
                assert entry.control is not None
                return self._states.latents(entry.control)
            if name == _GIVEN:
                return self._given(entry, index, shape)
            return self._states.masked(entry) if name == "masked" else self._states.fill_mask(entry)

        return np.concatenate([one(name) for name in self._channels], axis=-1)

    def _given(
        self, entry: Entry, index: int, shape: tuple[int, ...]
    ) -> Float[np.ndarray, "*image more"]:
        """Which frames of a clip are given, and those, of a kind that seed and index draw."""
        states = self._states
        kind = draw_kind(self._kinds, np.random.default_rng((self._seed, index)), shape[1])
        ends = [one and states.unpacked(one) for one in self._ends(entry, kind)]
        return states.encoders.pack(conditions([kind], shape, *([end] for end in ends)))[0]

    def _ends(self, entry: Entry, kind: str) -> tuple[Entry | None, Entry | None]:
        """The first and last frames that a kind gives, each by themselves."""
        frames_of = self._states.encoders.frames_of
        first, last = (length and frames_of(length) for length in given_lengths(kind))
        head = entry.part(0, first) if first else None
        return head, entry.part(entry.frames - last, last) if last else None

    def _all_ends(self, entry: Entry) -> Iterator[Entry]:
        """Of all kinds that may be drawn."""
        if _GIVEN in self._channels:
            for kind in fitting_kinds(self._kinds, self._states.encoders.latents_of(entry.frames)):
                yield from (one for one in self._ends(entry, kind) if one is not None)

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

    def captions(
        self, texts: Sequence[str], beside: Sequence[Seen | None] | None = None
    ) -> Conditioning:
        """States of any captions, `beside` pictures where these are seen, through the cache; [""]
        is what dropped captions become."""
        return self._states.text(texts, beside)

    def ids(self, texts: list[str]) -> Any:
        """Token ids of any captions; None where they are not asked for."""
        return self._states.encoders.tokenize(texts) if self._with_ids else None

    def fill(self, report: Report | None = None) -> None:
        """Encode what the cache lacks; `report(what, done, due)` as it goes.

        Captions come before pictures, so that their encoders need not be held at once. Of several
        processes each begins with its own share and then goes backwards through the others': on a
        disk they have in common they meet, on disks of their own each makes everything.
        """
        states = self._states
        said = [(self._said(entry), states.first_frame(entry)) for entry in self.entries]
        captions = {states.text_path(*one): one for one in (("", None), *said)}
        paths: dict[Path, tuple[Entry, bool]] = {}
        for entry in self.entries:
            for one in (entry, entry.reference, entry.control, *self._all_ends(entry)):
                if one is not None:
                    paths[states.latents_path(one)] = one, False
            if entry.fill_mask is not None:
                paths[states.masked_path(entry)] = entry, True
        texts = [path for path in self._own_first(sorted(captions)) if not path.exists()]
        todo = [p for p in self._own_first(sorted(paths)) if not p.exists()]

        def ready(path: Path) -> tuple[Path, np.ndarray | None]:
            megapixels, (entry, masked) = self._settings.max_megapixels, paths[path]
            if masked or path.exists():
                return path, None
            return path, pixels(entry, megapixels)

        with quiet():
            for done, (caption, seen) in enumerate(map(captions.__getitem__, texts), 1):
                states.text([caption], [seen])
                if report:
                    report("captions encoded", done, len(texts))
            ahead = 1 if self._settings.frames else 4  # a clip in float32 is large
            for done, (path, picture) in enumerate(in_threads(ready, todo, ahead=ahead), 1):
                entry, masked = paths[path]
                if masked:
                    states.masked(entry)
                elif picture is not None:
                    states.unpacked(entry, picture)
                if report:
                    report(f"{self._settings.words} encoded", done, len(todo))

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
    kinds: ConditionKinds = _KINDS,
) -> Dataset:
    """Lists and checks the source; `batch` is the global one, of which this process gets a share.
    `channels`: what is joined to the latents', as in `families.Task`. `with_ids`: whether batches
    have token ids of their captions. `kinds`: of conditions, where "given" frames are joined.

    `report(what, done, due)` is called while pictures that are new to the cache are checked. Raises
    ConfigError, FileNotFoundError, and ValueError above the share of bad pictures.
    """
    for one in (batch, *settings.batches):
        if one < 1 or one % process_count:
            raise ConfigError(f"a batch of {one} does not divide by {process_count} process(es)")
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
        kinds=kinds,
    )


def precompute(
    settings: DataSettings,
    model: Path,
    *,
    dtype: Dtype = "bfloat16",
    process_index: int = 0,
    process_count: int = 1,
    report: Report | None = None,
    channels: Sequence[str] = (),
    kinds: ConditionKinds = _KINDS,
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
        channels=channels,
        kinds=kinds,
    )
    data.fill(report)
    return data.report()
