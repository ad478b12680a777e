"""Which pictures or clips a step shows: a function of seed and step, each batch of one size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fluxjax.train.data.catalogue import Entry, import_grain


class Order:
    """Which pictures or clips a step shows. A batch has one size; `batches`: of so many frames
    how many are in one, which by default are `batch`."""

    def __init__(
        self, entries: list[Entry], batch: int, seed: int, batches: Mapping[int, int]
    ) -> None:
        grain = import_grain()
        members: dict[tuple[int, ...], list[int]] = {}
        for i, entry in enumerate(entries):
            members.setdefault(entry.bucket, []).append(i)
        sizes = sorted(members)
        lengths = [entries[members[size][0]].frames for size in sizes]
        self.batches = [batches.get(length, batch) for length in lengths]
        # Of smaller batches there are more, so that all come equally often.
        self.counts = np.array(
            [
                max(1, round(len(members[size]) * batch / each))
                for size, each in zip(sizes, self.batches, strict=True)
            ]
        )
        seeds = [np.random.SeedSequence((seed, *size)).generate_state(1)[0] for size in sizes]
        self.shuffled = [
            grain.MapDataset.source(members[size]).shuffle(seed=int(one)).repeat()
            for size, one in zip(sizes, seeds, strict=True)
        ]
        # A size with n batches in a cycle has them evenly spread: its j-th one is due at a random
        # moment of the j-th n-th of that time.
        rng = np.random.default_rng(seed)
        self.sizes = np.repeat(np.arange(len(sizes)), self.counts)
        self.ranks = np.concatenate([np.arange(n) for n in self.counts])
        due = (self.ranks + rng.random(len(self.ranks))) / self.counts[self.sizes]
        order = np.argsort(due, kind="stable")
        self.sizes, self.ranks = self.sizes[order], self.ranks[order]

    def batch(self, step: int) -> int:
        """How many are in that of a step."""
        return self.batches[self.sizes[step % len(self.sizes)]]

    def __call__(self, step: int, rows: range) -> list[int]:
        cycle, place = divmod(step, len(self.sizes))
        size = self.sizes[place]
        first = int(cycle * self.counts[size] + self.ranks[place]) * self.batches[size]
        return [self.shuffled[size][first + row] for row in rows]
