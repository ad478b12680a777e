"""Which pictures a step shows: a pure function of seed and step, each batch of one size."""

from __future__ import annotations

import numpy as np

from fluxjax.train.data.catalogue import Entry, import_grain


class Order:
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
