"""What a folder holds, compared with what of it is converted: nothing is left out unsaid."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxjax.checkpoint.component_json import pipeline_class
from fluxjax.checkpoint.file_format import PICKLES
from fluxjax.checkpoint.orbax_params import is_orbax
from fluxjax.checkpoint.sharded import files_together, shards_of, weights_file
from fluxjax.checkpoint.weights_location import (
    SINGLE_FILES,
    component_weights,
    orbax_folder,
    weights_of,
)
from fluxjax.config import ConfigError
from fluxjax.json_input import read_json

_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".msgpack", ".h5", ".sft", *PICKLES)
# Classes whose folders hold texts only, which are copied. transformers 5 calls a tokenizer that is
# but a file TokenizersBackend.
_WITHOUT_WEIGHTS = re.compile(
    r"\w*(Tokenizer|TokenizerFast|Backend|Scheduler|Processor|FeatureExtractor)"
)
_NAMED = 5
COPIED = ("safety_checker",)
"""Networks of no use here, whose folders are carried along as they are: PyTorch's pipelines have
them in their index."""


def check_complete(folder: Path) -> list[str]:
    """Weights that are not read because others of the same network are, to be said.

    Raises ConfigError, naming it, for a pipeline of another class and for everything with weights
    that would not be carried over; FileNotFoundError for what is listed and not there.
    """
    if (folder / "model_index.json").is_file():
        _check_listed(folder, read_json(folder / "model_index.json"))
    return _left_out(folder, weights_of(folder))


def _check_listed(folder: Path, index: Mapping[str, Any]) -> None:
    name, own = index.get("_class_name"), pipeline_class(folder).components
    listed = {
        key: value
        for key, value in index.items()
        if isinstance(value, list) and value not in ([None, None], [])
    }
    lost = [key for key, value in listed.items() if not _carried(key, value, own)]
    if lost:
        raise ConfigError(
            f"{folder} is a {name} with {_names(lost)}, which cannot be carried over, so nothing "
            "is converted; its other networks can be, one by one"
        )
    # Without tokenizers weights are whole, and the summary says so: single files have none.
    for key in (key for key in listed if not key.startswith("tokenizer")):
        path = component_weights(folder, key)
        if not (path.is_file() or _has_files(path)):
            raise FileNotFoundError(f"{folder} lacks {key}, which its model_index.json lists")


def _carried(key: str, value: list[Any], own: Sequence[str]) -> bool:
    kind = value[-1]
    without_weights = isinstance(kind, str) and _WITHOUT_WEIGHTS.fullmatch(kind) is not None
    known = key in own or (key in COPIED and isinstance(kind, str))
    return known or (without_weights and key.isidentifier())


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.iterdir())


def _left_out(folder: Path, read: Mapping[str, Path]) -> list[str]:
    """`read`: each network's folder or file."""
    used = {file for path in read.values() for file in _files_read(path)}
    folders = {path for path in read.values() if path.is_dir()}
    singles = [SINGLE_FILES[name] for name in read if name in SINGLE_FILES]
    beside, others = [], []
    for path in _weights(folder):
        # A variant, what other libraries read, or the original code's (sdxl_vae) has the network's
        # folder; BFL's file lies above.
        same = (path.parent in folders and re.search("model|vae", path.stem) is not None) or (
            path.parent == folder
            and any(path.with_suffix(".safetensors").match(pattern) for pattern in singles)
        )
        if path not in used:
            (beside if same else others).append(path)
    others = [path for path in others if path.relative_to(folder).parts[0] not in COPIED]
    if others:
        raise ConfigError(
            f"{folder} holds {_names([str(p.relative_to(folder)) for p in others])}, which would "
            "be left out: move it away, or convert what you need by itself"
        )
    return [str(path.relative_to(folder)) for path in beside]


def _files_read(path: Path) -> list[Path]:
    """As `open_folder` and `open_file` read one network."""
    if path.is_file():
        return [path]
    if orbax := orbax_folder(path):
        return [orbax / "_METADATA"]
    if files := files_together(path):
        return files
    first = weights_file(path)
    if first.suffix == ".safetensors":
        return [first]
    return [path / name for name in set(shards_of(first).values())]


def _weights(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if is_orbax(Path(root)):
            found.append(Path(root) / "_METADATA")
            folders.clear()
            continue
        found += [Path(root) / n for n in sorted(names) if Path(n).suffix.lower() in _WEIGHTS]
    return found


def _names(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + f" and {len(names) - _NAMED} more" * (len(names) > _NAMED)
