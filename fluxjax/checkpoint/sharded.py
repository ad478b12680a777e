"""Weights as diffusers and transformers keep them: one file, or shards of 10 GB with an index."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fluxjax.checkpoint.component_json import write_json
from fluxjax.checkpoint.file_format import PICKLES, pickle_refusal
from fluxjax.checkpoint.quantised import comfy
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.tensor_file import read_tensor_file
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.json_input import read_json
from fluxjax.networks import NETWORKS

SHARD_BYTES = 10 * 10**9


def weights_file(folder: Path) -> Path:
    """The index of the shards of one component, or its one file.

    Raises FileNotFoundError, and ValueError for several sets of weights and for pickles.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    indices, files = _indices(folder), sorted(folder.glob("*.safetensors"))
    # A variant (model.fp16.safetensors) beside the plain file is passed over.
    plain = [p for p in indices if p.name.count(".") == 3], [p for p in files if _is_plain(p)]
    indices, files = plain if any(plain) else (indices, files)
    # As diffusers and transformers: beside their own names there may be those of the original code.
    indices, files = (_of_their_names(indices), _of_their_names(files))
    if len(indices) > 1 or (not indices and len(files) > 1):
        names = ", ".join(path.name for path in indices or files)
        raise ValueError(f"{folder} holds several sets of weights, keep one of: {names}")
    if indices or files:
        return (indices or files)[0]
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    if pickles:
        raise ValueError(pickle_refusal(folder / pickles[0]))
    raise FileNotFoundError(f"{folder} holds no .safetensors file")


def _indices(folder: Path) -> list[Path]:
    """Of shards, those of variants too, which diffusers and transformers call
    model.safetensors.index.fp16.json."""
    return [p for p in sorted(folder.glob("*.safetensors.index*.json")) if is_index(p.name)]


def is_index(name: str) -> bool:
    """Whether a file of that name says in which shards tensors lie."""
    return re.search(r"\.safetensors\.index(\.\w+)?\.json$", name) is not None


def _of_their_names(files: list[Path]) -> list[Path]:
    own = [
        path for path in files if path.name.split(".")[0] in ("diffusion_pytorch_model", "model")
    ]
    return own if len(own) == 1 else files


def _is_plain(file: Path) -> bool:
    return file.name.count(".") == 1


def shards_of(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index says.

    Raises FileNotFoundError for missing files, ValueError for an index that is damaged or names a
    file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} names shards that are no strings")
    for name in sorted(set(weight_map.values())):
        if (
            Path(name).name != name
            or not name.endswith(".safetensors")
            or "\0" in name
            or len(name) > 255
        ):
            raise ValueError(f"{index} names {name[:200]!r}, which is no file of its own folder")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent} lacks {name}, which its index names")
    return weight_map


def name_plainly(folder: Path) -> None:
    """Gives a variant that is a component's only weights the names that PyTorch looks for unasked:
    model.fp16-00001-of-00002.safetensors becomes model-00001-of-00002.safetensors."""
    if files_together(folder) or not any(folder.glob("*.safetensors")):
        return
    first = weights_file(folder)
    weight_map = shards_of(first) if first.suffix == ".json" else {}
    names = {name: _plain_name(name) for name in {*weight_map.values()} or {first.name}}
    if all(name == plain for name, plain in names.items()):
        return
    for name, plain in names.items():
        (folder / name).rename(folder / plain)
    if weight_map:
        index = read_json(first)
        index["weight_map"] = {key: names[name] for key, name in weight_map.items()}
        first.unlink()
        write_json(folder / f"{first.name.partition('.')[0]}.safetensors.index.json", index)


def _plain_name(name: str) -> str:
    found = re.fullmatch(r"([^.]+)\.[^.-]+(-\d+-of-\d+)?(\.safetensors)", name)
    return name if found is None else "".join(filter(None, found.groups()))


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """Lazy tensors of one component's safetensors: an index and its shards, the one file, or the
    files that are a network only together.

    Raises what `weights_file`, `shards_of` and `read_safetensors` raise, and ValueError for an
    index that does not agree with its shards.
    """
    folder = Path(folder)
    if files := files_together(folder):
        return read_together(files)
    first = weights_file(folder)
    if first.suffix == ".safetensors":
        return _marked(folder, [read_safetensors(first)])
    weight_map = shards_of(first)
    shards = {name: read_safetensors(folder / name) for name in sorted(set(weight_map.values()))}
    held = {key: name for name, (shard, _) in shards.items() for key in shard}
    if held != weight_map:
        wrong = sorted(held.items() ^ weight_map.items())[0][0]
        raise ValueError(f"{first} and its shards disagree, first about {wrong[:200]!r}")
    return _marked(folder, list(shards.values()))


def read_together(files: list[Path]) -> dict[str, Tensor]:
    """Those of a network that lies in several files of a folder without an index."""
    return _marked(files[0].parent, [read_tensor_file(file) for file in files])


def _marked(
    folder: Path, files: list[tuple[dict[str, Tensor], dict[str, str]]]
) -> dict[str, Tensor]:
    """Their tensors, and what their metadata say of the tensors' quantisation."""
    tensors = {name: tensor for held, _ in files for name, tensor in held.items()}
    try:
        return comfy.with_markers(tensors, *(metadata for _, metadata in files))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def files_together(folder: Path) -> list[Path]:
    """The files of one network that lies in several without an index, of which some may be GGUF; of
    others none."""
    safetensors, gguf = (sorted(folder.glob(f"*.{kind}")) for kind in ("safetensors", "gguf"))
    if not safetensors or _indices(folder):
        return []
    candidates = [safetensors, sorted(safetensors + gguf)] if gguf else [safetensors]
    return next(filter(_are_one_network, candidates), [])


def _are_one_network(files: list[Path]) -> bool:
    split = [one for net in NETWORKS.values() for one in net.dialects if one.files == len(files)]
    if len(files) < 2 or not split:
        return False
    names = [name for file in files for name in _names(file)]
    return len(set(names)) == len(names) and any(dialect.fits(names) for dialect in split)


def _names(file: Path) -> list[str]:
    """None of a GGUF file that cannot be read: it need not be a part of what is."""
    try:
        return list(read_tensor_file(file)[0])
    except ValueError:
        if file.suffix == ".gguf":
            return []
        raise


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
