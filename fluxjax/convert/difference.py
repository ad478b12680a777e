"""What a checkpoint has learnt beyond another one, as an adapter's file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fluxjax.checkpoint.lora.original_names import prefix_of
from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.pipeline_folder import DEFAULTS_KEY, read_config, sampling_defaults
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import ConfigError
from fluxjax.convert.destination import check_destination
from fluxjax.networks import network_of

_MORE = 16  # columns of the sketch beside the rank
_ROUNDS = 4

Arrays = dict[str, np.ndarray]


class _Extracted(NamedTuple):
    """Tensors by name, and the sums of squares of the matrices' differences and of what is left."""

    arrays: Arrays
    whole: float
    lost: float


def extract_adapter(
    tuned: Path,
    base: Path,
    destination: Path,
    *,
    rank: int = 64,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
) -> str:
    """Write to `destination` what makes `tuned` of `base`, and say in words what it is.

    Of each matrix the nearest of that `rank`, by singular values; norms, biases and a first layer
    that reads more are kept whole (`.diff`, `.diff_b`, as ComfyUI has them). A pipeline's steps and
    guidance go with it. `dtype` None is float32.
    Raises ConfigError where the two are not of one architecture, or are the same.
    """
    if destination.suffix != ".safetensors":
        raise ConfigError(f"{destination}: a LoRA is written as one .safetensors file")
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    for source in (tuned, base):
        check_destination(source, destination, overwrite)
    ours, theirs = open_source(tuned), open_source(base)
    arrays: Arrays = {}
    whole = lost = 0.0
    for component in ours.keys() & theirs.keys():
        if not network_of(ours[component].config).adapter_prefixes:
            continue
        found = _of_network(ours[component], theirs[component], rank)
        prefix = prefix_of("peft", component)
        arrays |= {f"{prefix}{name}": array for name, array in found.arrays.items()}
        whole, lost = whole + found.whole, lost + found.lost
    if not arrays:
        raise ConfigError(f"{tuned} and {base} have no network that differs")
    metadata = {"format": "pt"}
    if (tuned / "model_index.json").is_file():
        metadata[DEFAULTS_KEY] = json.dumps(sampling_defaults(read_config(tuned)))
    kept = {name: of_array(arrays[name].astype(dtype or np.float32)) for name in sorted(arrays)}
    write_safetensors(destination, kept, metadata)
    megabytes = sum(tensor.nbytes for tensor in kept.values()) / 1e6
    share = 1 - lost / whole if whole else 1.0
    return (
        f"{len(kept)} tensors, {megabytes:.1f} MB; rank {rank} keeps {share:.2%} of the squares of "
        "what changes in matrices"
    )


def _of_network(tuned: OpenNetwork, base: OpenNetwork, rank: int) -> _Extracted:
    first = network_of(base.config).widened[0]
    if other := tuned.tensors.keys() ^ base.tensors.keys():
        raise ConfigError(
            f"{tuned.where} is no other version of {base.where}: one of them alone has "
            f"{min(other)}" + f", and {len(other) - 1} more" * (len(other) > 1)
        )
    arrays: Arrays = {}
    whole = lost = 0.0
    for name, tensor in tuned.tensors.items():
        module, _, leaf = name.rpartition(".")
        old = base.tensors[name].read().astype(np.float32)
        wider = module == first and tensor.shape[1:] > old.shape[1:] and old.ndim == 2
        if wider:
            old = np.pad(old, ((0, 0), (0, tensor.shape[1] - old.shape[1])))
        if old.shape != tensor.shape:
            raise ConfigError(
                f"{tuned.where} is no other version of {base.where}: {name} is "
                f"{list(tensor.shape)} and {list(old.shape)}"
            )
        change = tensor.read().astype(np.float32) - old
        if not change.any():
            continue
        if leaf not in ("weight", "bias"):
            raise ConfigError(f"{tuned.where}: no adapter can change {name}, which differs")
        found = {f"{module}.{'diff' if leaf == 'weight' else 'diff_b'}": change}
        if change.ndim > 1 and not wider:
            found, left = _matrix(module, change, rank) or (found, 0.0)
            whole, lost = whole + float(np.square(change).sum()), lost + left
        arrays |= found
    return _Extracted(arrays, whole, lost)


def _matrix(module: str, change: np.ndarray, rank: int) -> tuple[Arrays, float] | None:
    """Its factors, and the squares that they lack; None where they are no smaller than itself. Of a
    convolution the first has the kernel."""
    matrix = change.reshape(len(change), -1)
    rank = min(rank, *matrix.shape)
    if rank * sum(matrix.shape) >= math.prod(matrix.shape):
        return None
    b, a = low_rank_factors(matrix, rank)
    left = float(np.square(matrix - b @ a).sum())
    a, b = a.reshape(rank, *change.shape[1:]), b.reshape(*b.shape, *(1 for _ in change.shape[2:]))
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, left


def low_rank_factors(
    matrix: Float[np.ndarray, "out in"], rank: int
) -> tuple[Float[np.ndarray, "out {rank}"], Float[np.ndarray, "{rank} in"]]:
    """(B, A), of which B A is the nearest to the matrix.

    By singular values; of large matrices within a sketch of their range (Halko, Martinsson, Tropp
    2011, algorithm 4.4), since all of them would take hours for FLUX.1.
    """
    basis = None
    if 2 * (rank + _MORE) < min(matrix.shape):
        columns = (matrix.shape[1], rank + _MORE)
        sketch = np.random.default_rng(0).standard_normal(columns, np.float32)
        basis, _ = np.linalg.qr(matrix @ sketch)
        for _ in range(_ROUNDS):
            rows, _ = np.linalg.qr(matrix.T @ basis)
            basis, _ = np.linalg.qr(matrix @ rows)
    inner = matrix if basis is None else basis.T @ matrix
    left, values, right = np.linalg.svd(inner, full_matrices=False)
    left = left if basis is None else basis @ left
    roots = np.sqrt(values[:rank])
    return left[:, :rank] * roots, roots[:, None] * right[:rank]
