"""Writing weights as diffusers and transformers do: one file, or shards of 10 GB with an index."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fluxjax.checkpoint.component_json import write_json
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.tensors import Tensor

SHARD_BYTES = 10 * 10**9


def split_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Greedily, in order; a tensor above `shard_bytes` gets a shard of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def require_space(folder: Path, needed: int) -> None:
    """Raises OSError if the disk that holds `folder` has fewer free bytes than `needed`."""
    free = shutil.disk_usage(folder).free
    if free < needed + 2**26:
        raise OSError(
            f"not enough space at {folder}: {math.ceil(needed / 1e6)} MB are needed, "
            f"{free // 10**6} MB are free"
        )


def write_sharded(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """`stem`.safetensors, or `stem`-00001-of-0000N.safetensors and their index."""
    require_space(folder, sum(tensor.nbytes for tensor in tensors.values()))
    metadata = {"format": "pt", **(metadata or {})}
    shards = split_shards(tensors, shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [
            f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for old in folder.glob(f"{stem}*.safetensors*"):
        if old.name not in names:
            old.unlink()  # a stale shard or index would be read beside the new file
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, metadata, progress=progress)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map: dict[str, Any] = {
            key: name for name, shard in zip(names, shards, strict=True) for key in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
