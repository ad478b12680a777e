"""What a run is to draw: one job for each picture, from the model's values, files and options."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxjax.config import ConfigError
from fluxjax.sample.given_options import MOST_PICTURES, given_settings
from fluxjax.sample.options import Options
from fluxjax.sample.override import override
from fluxjax.sample.prompts_file import Line
from fluxjax.sample.settings import Settings
from fluxjax.sample.sources import absolute_lora

if TYPE_CHECKING:
    from fluxjax.sample.pipeline import Pipeline


@dataclass(frozen=True)
class Job:
    """One picture. `lora`: FILE:SCALE in full; `place`: its number in the order asked for."""

    settings: Settings
    lora: tuple[str, ...]
    place: int = 0


def picture_jobs(
    options: Options,
    repeated: Mapping[str, Any],
    lines: Sequence[Line],
    lora: tuple[str, ...],
    opened: Callable[[tuple[str, ...]], Pipeline],
) -> list[Job]:
    """Settings of every picture: the model's, then --like's (`repeated`), the command line's, a
    line's. `lora`: where a line names none. `opened`: with adapters, some of which decide what a
    model draws from; one after another.

    Raises ConfigError, beginning with the line where one is to blame.
    """
    given = given_settings(options)
    adapters: list[tuple[str, ...]] = []
    for line in lines:
        with blamed(line):
            adapters.append(lora if line.lora is None else tuple(map(absolute_lora, line.lora)))
    found: dict[int, Settings] = {}
    for own in dict.fromkeys(adapters):
        mine = [i for i, other in enumerate(adapters) if other == own]
        pipe = opened(own)
        base = override(override(pipe.defaults, repeated, str(options.like)), given)
        for i in mine:
            with blamed(lines[i]):
                settings = override(base, lines[i].values)
                settings = _completed(settings, (repeated, given, lines[i].values), pipe)
                pipe.check(settings)
            found[i] = settings
    jobs: list[Job] = []
    for i, (line, own) in enumerate(zip(lines, adapters, strict=True)):
        first = found[i].seed
        if all(one.get("seed") is None for one in (given, line.values, repeated)):
            first = secrets.randbelow(2**32)
        for more in range(options.number if line.number is None else line.number):
            with blamed(line):
                one = dataclasses.replace(found[i], seed=first + more)
            jobs.append(Job(one, own, len(jobs)))
        if len(jobs) > MOST_PICTURES:
            raise ConfigError(f"more than {MOST_PICTURES} pictures are asked for")
    return jobs


@contextmanager
def blamed(line: Line) -> Iterator[None]:
    """Begins with the line what goes wrong with it."""
    try:
        yield
    except (ConfigError, FileNotFoundError) as error:
        raise type(error)(f"{line.where}: {error}" if line.where else str(error)) from None


def _completed(settings: Settings, given: Sequence[Mapping], pipe: Pipeline) -> Settings:
    """With the hashes of its pictures, and what follows from them where nothing else is given."""
    from fluxjax.sample.given_pictures import read_given

    pictures, settings = read_given(settings)
    told = [one.get("noise_mask") for one in given]
    if False in told[1:] and True not in told:  # a record tells of it always
        pipe.require_mask_read(settings, pictures)
    fixed = [name for one in given for name, value in one.items() if value is not None]
    return pipe.complete(settings, pictures, fixed)


def batches(asked: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Runs of at most `size` jobs that differ in prompt and seed alone; one LoRA after another."""
    order = {lora: i for i, lora in enumerate(dict.fromkeys(job.lora for job in asked))}

    def alike(job: Job) -> tuple:
        return order[job.lora], dataclasses.replace(job.settings, prompt="", seed=0)

    for _, run in itertools.groupby(sorted(asked, key=lambda job: order[job.lora]), key=alike):
        together = list(run)
        yield from (together[i : i + size] for i in range(0, len(together), size))
