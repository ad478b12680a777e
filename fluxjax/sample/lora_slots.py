"""Adapters that each call chooses for each picture: arguments of one compiled program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.scaled_file import scaled_files
from fluxjax.config import ConfigError
from fluxjax.hub import find
from fluxjax.models.lora import adapter_sites
from fluxjax.models.names import flatten, unflatten
from fluxjax.parallel.mesh import place
from fluxjax.shapes import Params

Chosen = str | Path | tuple[str | Path, float]
"""FILE, "FILE:SCALE" or (FILE, SCALE)."""
LoraChoice = Chosen | Sequence[Chosen] | Sequence[Sequence[Chosen]]
"""Adapters of all pictures, one or several, or a list of them for each prompt."""
_Each = Sequence[Mapping[str, float]]
Flat = dict[tuple[str, ...], Any]
"""Leaves by their paths."""


class LoraSlots:
    """`rank` columns of products beside every dense layer and convolution of the network that draws
    and of the text encoders that adapters are made for, shared by the adapters of one call.

    Each adapter has columns of its own, in every layer the same, and each picture (each prompt, in
    a text encoder) a factor for every column: 0 for adapters of other pictures.
    """

    def __init__(
        self,
        params: Mapping[str, Params],
        rank: int,
        places: Callable[[str, Params], Params] | None = None,
    ):
        """`params`: shapes of the networks', by component, stacked or not. `places`: on a mesh, the
        shardings of a tree beside those of a component."""
        if rank < 1:
            raise ConfigError(f"lora_slots is a rank, at least 1, got {rank}")
        self.rank, self._params, self._places = rank, params, places
        self._sites = {component: list(adapter_sites(tree)) for component, tree in params.items()}
        self._files: dict[str, dict[str, dict[str, Adapter]]] = {}
        self._filled: dict[str, tuple[tuple[str, ...], Flat]] = {}

    @property
    def components(self) -> Collection[str]:
        """Those that have slots."""
        return self._params.keys()

    def each(self, lora: LoraChoice | None, prompts: int, number: int) -> _Each:
        """For each picture {file: scale}; `number` of them for each prompt.

        Raises ConfigError, and what reading a file raises; of all of them before anything runs.
        """
        groups: list[Any] = [lora] * prompts
        if lora and isinstance(lora, list | tuple) and all(isinstance(one, list) for one in lora):
            groups = list(lora)
        if len(groups) != prompts:
            raise ConfigError(f"lora has {len(groups)} lists for {prompts} prompts")
        found: list[Mapping[str, float]] = []
        for group in groups:
            scales: dict[str, float] = {}
            for file, scale in scaled_files(group):
                self._read(file)
                scales[file] = scales.get(file, 0.0) + scale
            found += [scales] * number
        self._columns(found)
        return found

    def shapes(self, component: str, pictures: int) -> dict[str, Any]:
        """Of `choose` for so many pictures."""

        def empty() -> dict[str, Any]:
            return self._tree(component, self._zeros(component, jnp), [{}] * pictures, {})

        tree = jax.eval_shape(empty)
        if self._places is None:
            return tree
        spec: Any = jax.ShapeDtypeStruct
        return jax.tree.map(
            lambda leaf, sharding: spec(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self._places(component, tree),
        )

    def choose(self, component: str, each: _Each) -> dict[str, Any]:
        """The LoRA tree (see `fluxjax.models.lora`) of pictures with these adapters."""
        columns = self._columns(each)
        if component not in self._filled or self._filled[component][0] != tuple(columns):
            self._filled.pop(component, None)  # never two banks at a time
            bank = self._placed(component, self._fill(component, columns))
            self._filled[component] = tuple(columns), bank
        tree = self._tree(component, self._filled[component][1], each, columns)
        return unflatten(self._placed(component, flatten(tree)))

    def _placed(self, component: str, flat: Flat) -> Flat:
        tree = unflatten(flat)
        places = None if self._places is None else self._places(component, tree)
        placed = jax.tree.map(jnp.asarray, tree) if places is None else place(tree, places)
        return flatten(placed)

    def _read(self, file: str) -> dict[str, dict[str, Adapter]]:
        """The products by component and module."""
        from fluxjax.checkpoint.lora.reader import read_adapters, split_low_rank

        if file not in self._files:
            path = find(file, "lora")
            found: dict[str, dict[str, Adapter]] = {}
            for component, mine in read_adapters(path, self._params).changes.items():
                found[component], others = split_low_rank(mine, self._params[component])
                if others:
                    raise ConfigError(
                        f"{path} does more than add low-rank products (it changes "
                        f"{next(iter(others))}): load the pipeline with it, as loras=[...]"
                    )
            self._files[file] = found
        return self._files[file]

    def _columns(self, each: _Each) -> dict[str, slice]:
        """Which columns each file has."""
        found, start = {}, 0
        for file in dict.fromkeys(file for scales in each for file in scales):
            products = (one for mine in self._read(file).values() for one in mine.values())
            rank = max((len(one.a) for one in products), default=0)
            found[file] = slice(start, start + rank)
            start += rank
        if start > self.rank:
            raise ConfigError(
                f"the adapters of this call have rank {start} together and the pipeline has slots "
                f"for {self.rank}: load it with lora_slots={start}"
            )
        return found

    def _zeros(self, component: str, numpy: Any) -> Flat:
        flat = {}
        for site in self._sites[component]:
            (fan_in, out), layers = site.shape, (len(site.names),) * site.stacked
            for leaf, shape in (("a", (*site.window, fan_in, self.rank)), ("b", (self.rank, out))):
                flat[*site.module, leaf] = numpy.zeros((*layers, *shape), np.float32)
        return flat

    def _fill(self, component: str, columns: dict[str, slice]) -> Flat:
        flat = self._zeros(component, np)
        for file, own in columns.items():
            adapters = self._files[file].get(component, {})
            for site in self._sites[component]:
                for i, name in enumerate(site.names):
                    adapter = adapters.get(name)
                    if adapter is None:
                        continue
                    a, b = (flat[*site.module, leaf] for leaf in ("a", "b"))
                    a, b = (a[i], b[i]) if site.stacked else (a, b)
                    used = slice(own.start, own.start + len(adapter.a))
                    down, up = adapter.kernels()
                    a[..., used], b[used] = down, up * np.float32(adapter.scale)
        return flat

    def _tree(
        self, component: str, bank: Flat, each: _Each, columns: dict[str, slice]
    ) -> dict[str, Any]:
        factors = np.zeros((len(each), self.rank), np.float32)
        for row, scales in zip(factors, each, strict=True):
            for file, scale in scales.items():
                row[columns[file]] = scale
        flat = dict(bank)
        for site in self._sites[component]:
            layers = (len(site.names),) * site.stacked
            flat[*site.module, "scale"] = jnp.broadcast_to(factors, (*layers, *factors.shape))
        return unflatten(flat)
