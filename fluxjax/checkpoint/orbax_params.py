"""A parameter tree as an Orbax checkpoint (OCDBT), written and read one tensor at a time.

What Orbax calls a PyTree checkpoint: `ocp.StandardCheckpointer` and `ocp.PyTreeCheckpointer`
restore it, into any sharding. A kernel in codes is a node of the tree there: under the name of its
kind it holds its parts, as in kernel/int8/codes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.manifest import check_manifest, write_manifest
from fluxjax.checkpoint.quantised.parts import codes_of_parts
from fluxjax.checkpoint.tensors import Tensor, as_tensor
from fluxjax.models.quantised import Quantised

_MARKER = "_METADATA"
_CHUNK_BYTES = 2**26
_PART = re.compile(rb".+/\d+(\.\d+)*")


def is_orbax(folder: Path) -> bool:
    """Whether a folder holds parameters that `write_orbax` wrote."""
    return (Path(folder) / _MARKER).is_file()


def write_orbax(
    folder: Path,
    params: Mapping[str, Any],
    *,
    chunks: Mapping[str, Any] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Write a tree of `Tensor`s (or arrays) to `folder`, which must not exist, and its manifest.

    Leaves may be codes, with `Tensor`s as parts. `chunks`: a tree like `params` of the shapes in
    which each leaf is stored, and can be read in part; those of more than `_CHUNK_BYTES` are
    divided further.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint._src.arrays.subchunking import choose_chunk_shape

    shapes = {
        ".".join(path): shape for path, shape in engine.flatten(_nested(chunks or {})).items()
    }

    class LazyHandler(ocp.type_handlers.NumpyHandler):
        """Reads tensors when their turn comes, and waits until they are written.

        Small ones go together: each commit to the disk costs tens of milliseconds.
        """

        async def serialize(
            self, values: Sequence[Any], infos: Sequence[Any], args: Any = None
        ) -> Any:
            args = args or [ocp.SaveArgs()] * len(values)
            for batch in _batches([value.nbytes for value in values]):
                arrays = [np.asarray(values[i].read()) for i in batch]
                written = await super().serialize(
                    arrays, [infos[i] for i in batch], [args[i] for i in batch]
                )
                for future in written:
                    await asyncio.to_thread(future.result)
                if failed:
                    raise failed[0]
                if progress:
                    for i in batch:
                        progress(infos[i].name, values[i].nbytes)
            return []

        async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
            # Orbax itself stores a numpy array whole, or divided as it sees fit.
            if shape := shapes.get(tspec["kvstore"]["path"].rstrip("/")):
                tspec["metadata"]["chunks"] = choose_chunk_shape(
                    value.shape, shape, value.dtype, _CHUNK_BYTES
                )
            try:
                await super()._open_and_write(value, tspec, ts_context)
            except ValueError as error:  # raised once the others have ended, which would be orphans
                failed.append(error)

    failed: list[ValueError] = []
    leaves = {path: as_tensor(leaf) for path, leaf in engine.flatten(_nested(params)).items()}
    args = dict.fromkeys(leaves, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
    handler = LazyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((Tensor, handler))
    with _quiet(), _of_the_system(folder):
        trees = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_compression=False, type_handler_registry=registry
        )
        save = ocp.args.PyTreeSave(engine.unflatten(leaves), engine.unflatten(args))
        with ocp.Checkpointer(trees) as checkpointer:
            checkpointer.save(Path(folder).absolute(), args=save)
    write_manifest(Path(folder))


@contextmanager
def _of_the_system(folder: Path) -> Iterator[None]:
    """What TensorStore says of an error of the operating system, a full disk, as an OSError."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(folder)) from None


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    """Indices in order, in batches of at most `_CHUNK_BYTES`, or of one."""
    batches: list[list[int]] = []
    total = 0
    for i, size in enumerate(sizes):
        if not batches or total + size > _CHUNK_BYTES:
            batches.append([])
            total = 0
        batches[-1].append(i)
        total += size
    return batches


class _quiet:
    """Orbax logs every step of a save as a warning or info through absl."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.ERROR)

    def __exit__(self, *_: Any) -> None:
        logging.getLogger("absl").setLevel(self._level)


def read_orbax(folder: Path) -> dict[str, Any]:
    """The tree with lazy leaves, or codes; the hashes are checked where they were written.

    Raises FileNotFoundError; ValueError for a folder that is damaged or of another format.
    """
    import tensorstore as ts

    folder = Path(folder).absolute()
    if not is_orbax(folder):
        raise FileNotFoundError(f"{folder} is no Orbax checkpoint: it has no {_MARKER}")
    check_manifest(folder)
    base = {"driver": "ocdbt", "base": f"file://{folder}/"}
    try:
        keys = ts.KvStore.open(base).result().list().result()
        names = sorted(
            key[: -len(b"/.zarray")].decode() for key in keys if key.endswith(b"/.zarray")
        )
        parts = Counter(key.rpartition(b"/")[0].decode() for key in keys if _PART.fullmatch(key))
        flat = {tuple(name.split(".")): _lazy(base, name, parts[name]) for name in names}
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder} cannot be read as an Orbax checkpoint: {error}") from None
    if not flat:
        raise ValueError(f"{folder} holds no arrays in the OCDBT form of Orbax")
    return _with_codes(engine.unflatten(flat))


def _nested(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With nodes in the place of codes."""

    def open_(value: Any) -> Any:
        if isinstance(value, Quantised):
            return {value.kind: value.parts}
        return _nested(value) if isinstance(value, Mapping) else value

    return {key: open_(value) for key, value in tree.items()}


def _with_codes(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_nested`. Raises ValueError for parts that do not fit each other."""
    closed: dict[str, Any] = {}
    for key, value in tree.items():
        closed[key] = value
        if isinstance(value, Mapping):
            kind = next(iter(value)) if key == "kernel" and len(value) == 1 else ""
            closed[key] = codes_of_parts(kind, value[kind]) if kind else _with_codes(value)
    return closed


def _lazy(base: dict[str, Any], name: str, parts: int) -> Tensor:
    """Raises ValueError if it has fewer `parts` than due: others would be read as zeros."""
    import tensorstore as ts

    store = ts.open({"driver": "zarr", "kvstore": {**base, "path": f"{name}/"}}).result()
    chunk = store.spec().to_json()["metadata"]["chunks"]
    due = math.prod(-(-size // part) for size, part in zip(store.shape, chunk, strict=True))
    if parts != due:
        raise ValueError(f"{name} has {parts} of its {due} parts")

    def rows(start: int, stop: int) -> np.ndarray:
        try:
            return (store[start:stop] if store.shape else store).read().result()
        except ValueError as error:
            where = base["base"].removeprefix("file://").rstrip("/")
            raise ValueError(f"{where} is damaged: {name} cannot be read") from error

    return Tensor(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), rows)
