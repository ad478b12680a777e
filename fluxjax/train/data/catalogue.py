"""The pictures and clips of a source that can be trained on, and those that cannot with the reason.

Every one is decoded once before training: which ones are left out must be known ahead for
batches to be a function of the step. What was found is remembered by name, size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from fluxjax.atomic_write import write_bytes
from fluxjax.clip_reader import import_av, is_video
from fluxjax.config import ConfigError
from fluxjax.families import Told
from fluxjax.picture_files import BadPicture, decode, quiet, upright_rgb
from fluxjax.train.data.buckets import bucket, cut, fit
from fluxjax.train.data.clips import Length, Piece, measure_clip, pieces, read_piece, speed
from fluxjax.train.data.companions import (
    KINDS,
    OF_ITS_SIZE,
    Kind,
    canny_item,
    companion_items,
    place_of,
    random_mask_items,
    words,
)
from fluxjax.train.data.item import Item
from fluxjax.train.data.settings import CANNY, RANDOM, DataSettings
from fluxjax.train.data.sources import list_items

Report = Callable[[str, int, int], None]  # what is counted, how many are done, and of how many
_NAMED = 5  # bad pictures in an error message
_VERSION = 3  # of what is remembered
_T, _R = TypeVar("_T"), TypeVar("_R")


class Entry(NamedTuple):
    """A good picture or clip: what it is made of, and the size that it and its companions are cut
    to. `piece`: of a clip, which is told to have so many `fps` and so much `motion`."""

    item: Item
    digest: str
    width: int
    height: int
    reference: Entry | None = None
    mask: Entry | None = None
    fill_mask: Entry | None = None
    control: Entry | None = None
    original_size: tuple[int, int] | None = None
    piece: Piece | None = None
    fps: int = 24
    motion: int = 4

    @property
    def frames(self) -> int:
        return 1 if self.piece is None else self.piece.count

    @property
    def bucket(self) -> tuple[int, ...]:
        """(width, height), of several frames also their number: batches have one."""
        size = self.width, self.height
        return size if self.frames == 1 else (*size, self.frames)

    def part(self, first: int, count: int) -> Entry:
        """So many frames of a clip, as a clip by themselves."""
        assert self.piece is not None
        return self._replace(piece=self.piece.part(first, count))

    @property
    def told(self) -> Told:
        """What a network may be told of the picture: its size, and what it was cut out of."""
        size = self.width, self.height
        crop = self.original_size and cut(self.original_size, size)
        told = Told(size, self.original_size, crop)
        return told._replace(fps=self.fps, motion=self.motion)

    @property
    def companions(self) -> list[Entry]:
        every = (self.reference, self.mask, self.fill_mask, self.control)
        return [other for other in every if other is not None]


class Catalogue(NamedTuple):
    """`quarantined` holds (name, reason); `notes` say what was remembered wrongly."""

    entries: list[Entry]
    quarantined: list[tuple[str, str]]
    notes: list[str]


def import_grain() -> Any:
    """Raises ConfigError where it is not installed."""
    try:
        import grain
    except ImportError:
        raise ConfigError("training data needs grain: pip install -e '.[train]'") from None
    return grain


def in_threads(function: Callable[[_T], _R], values: Sequence[_T], ahead: int = 16) -> Iterator[_R]:
    """`function` of each value in order, computed ahead of the reader. Results are never None."""
    grain = import_grain()
    options = grain.ReadOptions(
        num_threads=min(8, ahead, os.cpu_count() or 1), prefetch_buffer_size=ahead
    )
    iterator = iter(grain.MapDataset.source(values).map(function).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def read_catalogue(settings: DataSettings, folder: Path, report: Report | None = None) -> Catalogue:
    """Lists the source, decodes what is new to `folder`, and assigns sizes.

    Raises ValueError above the share of bad pictures, naming the first of them.
    """
    items, notes = list_items(settings), []

    def inspect(items: list[Item], source: str) -> list[_Found]:
        memory = _Memory(source, items, settings, folder)
        notes.extend(filter(None, [memory.problem]))
        return _inspect_all(items, settings, memory, report)

    found = inspect(items, settings.source)
    beside = {}
    for kind in KINDS:
        if place := place_of(kind, settings):
            others = companion_items(kind, items, settings)
            if any(item.beside for item in items):
                place = f"{settings.source} {place}"
            beside[kind] = list(zip(others, inspect(others, place), strict=True))
    entries, quarantined = [], []
    for i, (item, one) in enumerate(zip(items, found, strict=True)):
        digest, size = one.digest, one.size
        companions = {kind: pairs[i] for kind, pairs in beside.items()}
        problem = one.problem or _problem(size, companions)
        if not problem:
            try:
                width, height = bucket(
                    *size,
                    resolution=settings.resolution,
                    step=settings.bucket_step,
                    max_aspect=settings.max_aspect,
                )
                each: Any = {
                    kind: Entry(other, found.digest, width, height)
                    for kind, (other, found) in companions.items()
                }
                entry = Entry(item, digest, width, height, **each, original_size=size)
                entry = entry._replace(fps=settings.fps, motion=settings.motion)
                if settings.frames:
                    entries += _in_time(entry, one, settings)
                else:
                    entries += _with_made(entry, settings)
                continue
            except BadPicture as error:
                problem = str(error)
        quarantined.append((item.name, problem))
    if not entries or len(quarantined) > settings.max_bad_share * len(items):
        named = "; ".join(f"{name}: {reason}" for name, reason in quarantined[:_NAMED])
        rest = len(quarantined) - _NAMED
        count, what = len(quarantined), f"{settings.words} of {settings.source} are bad"
        allowed = f", and at most {settings.max_bad_share:.0%} may be"
        some = f"{count} of {len(items)} {what}{allowed}"
        raise ValueError(
            f"{some if entries else f'all {count} {what}'}: {named}"
            + (f"; and {rest} more" if rest > 0 else "")
        )
    return Catalogue(entries, quarantined, notes)


class _Found(NamedTuple):
    digest: str
    size: tuple[int, int]
    problem: str
    frames: int = 1
    fps: float = 0.0


def _in_time(entry: Entry, found: _Found, settings: DataSettings) -> list[Entry]:
    """The pieces of a clip, or a still picture. Raises BadPicture for one that is not learnt."""
    if not entry.item.is_clip:
        if 1 not in settings.frames:
            raise BadPicture("it is a still picture, and frames has no 1")
        return [entry]
    entry = entry._replace(fps=speed(found.fps, settings.fps)[1])
    length = Length(found.size, found.frames, found.fps)
    return [entry._replace(piece=one) for one in pieces(entry.digest, length, settings)]


def _problem(size: tuple[int, int], companions: Mapping[Kind, tuple[Item, _Found]]) -> str:
    """Why a good picture cannot be used with its companions."""
    for kind, (item, found) in companions.items():
        if found.problem:
            return found.problem if item.problem else f"its {words(kind)}: {found.problem}"
        if kind in OF_ITS_SIZE and found.size != size:
            shown = ["{} x {}".format(*one) for one in (found.size, size)]
            return f"its {words(kind)} has {shown[0]} pixels, and the picture {shown[1]}"
    return ""


def _with_made(entry: Entry, settings: DataSettings) -> list[Entry]:
    """With companions that are made of the picture: its edges, and once with each random mask."""
    size, name = (entry.width, entry.height), entry.item.name
    if settings.controls == CANNY:
        read = partial(pixels, entry, settings.max_megapixels)
        edges = canny_item(entry.digest, name, read, size, settings.canny)
        return [entry._replace(control=Entry(edges, edges.digest, *size))]
    if settings.fill_masks == RANDOM:
        masks = random_mask_items(entry.digest, name, size, settings)
        return [entry._replace(fill_mask=Entry(mask, mask.digest, *size)) for mask in masks]
    return [entry]


class _Memory:
    """What decoding found in a source's pictures, in a file with a checksum.

    One that is damaged, or of another source, is named in `problem` and made anew.
    """

    def __init__(
        self, source: str, items: list[Item], settings: DataSettings, folder: Path
    ) -> None:
        import PIL

        where = os.fsencode(Path(source).expanduser().absolute())
        readers = PIL.__version__
        if any(item.is_clip for item in items):  # what is animated is a bad picture elsewhere
            readers += " clips"
        if any(item.is_clip and is_video(item.name) for item in items):
            readers += f" {import_av(source).__version__}"
        key = f"{_VERSION} {settings.max_megapixels} {readers} ".encode() + where
        self.key = hashlib.sha256(key).hexdigest()
        self.path = folder / "catalogues" / f"{self.key}.json"
        self.problem = ""
        self.known: dict[str, _Found] = {}
        try:
            self.known = self._read(self.path.read_bytes())
        except FileNotFoundError:
            pass
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror}; all pictures are checked again"
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
            self.problem = f"{self.path} is damaged; all pictures are checked again"

    def _read(self, content: bytes) -> dict[str, _Found]:
        checksum, _, text = content.partition(b"\n")
        if checksum != self._checksum(text):
            raise ValueError
        return {
            name: _Found(digest, (size[0], size[1]), problem, *time)
            for name, (digest, size, problem, *time) in json.loads(text).items()
        }

    def write(self, known: Mapping[str, _Found]) -> None:
        text = json.dumps(known).encode()
        write_bytes(self.path, self._checksum(text) + b"\n" + text)

    def _checksum(self, text: bytes) -> bytes:
        return hashlib.sha256(self.key.encode() + text).hexdigest().encode()


def _inspect_all(
    items: list[Item], settings: DataSettings, memory: _Memory, report: Report | None
) -> list[_Found]:
    known = dict(memory.known)
    todo = [i for i in items if not i.problem and i.size is None and _name(i) not in known]
    new: dict[str, _Found] = {}
    try:
        with quiet():
            results = in_threads(lambda i: _inspect(i, settings.max_megapixels), todo)
            for item, result in zip(todo, results, strict=True):
                new[_name(item)] = result
                if report:
                    report(f"{settings.words} checked", len(new), len(todo))
    finally:
        # A file that could not be opened may open next time; what decoding found stays true.
        known |= {name: result for name, result in new.items() if result.digest}
        if new:
            names = set(map(_name, items))
            memory.write({name: result for name, result in known.items() if name in names})
    known |= new
    return [
        _Found("", (0, 0), item.problem)
        if item.problem
        else _Found(item.digest, item.size, "")
        if item.size is not None
        else known[_name(item)]
        for item in items
    ]


def _name(item: Item) -> str:
    return f"{item.name} {item.stamp}"


def _inspect(item: Item, max_megapixels: float) -> _Found:
    """Never raises: whatever is wrong is this picture's problem."""
    digest = ""
    try:
        data = item.read()
        assert isinstance(data, bytes)
        digest = hashlib.sha256(data).hexdigest()
        if item.is_clip:
            size, frames, fps = measure_clip(data, max_megapixels)
            return _Found(digest, size, "", frames, fps)
        picture = decode(data, max_megapixels)
        return _Found(digest, picture.size, "")
    except BadPicture as error:
        return _Found(digest, (0, 0), str(error))
    except OSError as error:
        return _Found("", (0, 0), f"it cannot be read ({error.strerror or error})")


def pixels(entry: Entry, max_megapixels: float) -> Float[np.ndarray, "*frames height width 3"]:
    """The picture at its size, or the frames of a clip; values in [-1, 1].

    Raises ValueError where it is no longer what it was when it was listed.
    """
    from PIL import Image

    try:
        data = entry.item.read()
        if isinstance(data, np.ndarray):
            picture = Image.fromarray(data)
        elif hashlib.sha256(data).hexdigest() != entry.digest:
            raise BadPicture("its bytes are others than when it was listed")
        elif entry.piece is not None:
            return read_piece(data, entry.piece, entry.width, entry.height, max_megapixels)
        else:
            seen = partial(upright_rgb, ground=entry.item.ground)
            picture = decode(data, max_megapixels, seen)
    except (BadPicture, OSError) as error:
        raise ValueError(f"{entry.item.name} has changed while it was used: {error}") from None
    return fit(picture, entry.width, entry.height)
