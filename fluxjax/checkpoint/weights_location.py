"""Where in a folder the weights of each network lie: in its own folder, or in a single file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from fluxjax.checkpoint.component_json import pipeline_class
from fluxjax.checkpoint.file_format import PICKLES, pickle_refusal
from fluxjax.checkpoint.orbax_params import is_orbax
from fluxjax.config import PIPELINES
from fluxjax.json_input import read_json
from fluxjax.networks import NETWORKS
from fluxjax.networks.whole_files import WHOLE_FILES

PARAMS = "params"
# BFL's and ComfyUI's single files, as they lie in one folder.
SINGLE_FILES = {network.component: network.files for network in NETWORKS.values() if network.files}
TEXT_FILES = {part.file for whole in WHOLE_FILES for part in whole.parts.values() if part.file} | {
    pattern for cls in PIPELINES for patterns in cls.text_files.values() for pattern in patterns
}
"""Patterns of the files of text encoders."""
ST = ".safetensors"


def orbax_folder(folder: Path) -> Path | None:
    """Where the parameters are in a folder of our own, or of Orbax."""
    return next((f for f in (folder / PARAMS, folder, folder / "default") if is_orbax(f)), None)


def component_weights(folder: Path, component: str) -> Path:
    """The folder of one network of a pipeline folder, or its single file.

    Raises ValueError if there are several files.
    """
    own = folder / component
    if not _has_weights(own):
        files = [*single_files(folder, component), *sorted(own.glob("*.gguf"))]
        return only_file(folder, component, files) or own
    return own


def named_parts(folder: Path, components: Iterable[str]) -> list[str]:
    """What of a pipeline folder holds these networks: their folders, and the files beside them that
    have their weights, as BFL's lie."""
    names = []
    for component in components:
        names.append(component)
        with suppress(ValueError):  # who loads the model says that there are several
            path = component_weights(folder, component)
            if path.is_file() and path.parent == folder:
                names.append(path.name)
    return names


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and (
        is_orbax(folder / PARAMS) or is_orbax(folder) or any(folder.glob("*.safetensors*"))
    )


def _only_weights(folder: Path) -> Path | None:
    """Of a folder of one network: itself, or the one GGUF file beside its config.json."""
    files = sorted(folder.glob("*.gguf")) if (folder / "config.json").is_file() else []
    if _has_weights(folder):
        return folder
    return files[0] if len(files) == 1 else None


def weights_of(folder: Path) -> dict[str, Path]:
    """Each network of a checkpoint folder: its folder or its single file. "": the folder is
    that of one network.

    Raises FileNotFoundError, or ValueError for a folder of pickles.
    """
    if (folder / "model_index.json").is_file():
        known = dict.fromkeys((*pipeline_class(folder).components, *SINGLE_FILES))
        index = read_json(folder / "model_index.json")
        parts = [part for part in known if index.get(part) not in (None, [None, None])]
    elif not any(single_files(folder, part) for part in SINGLE_FILES) and (
        found := _only_weights(folder)
    ):
        return {"": found}
    else:
        parts = [part for part in SINGLE_FILES if single_files(folder, part)]
        parts += [part for part in SINGLE_FILES if part not in parts]
        parts = [
            part
            for part in parts
            if component_weights(folder, part) != folder / part or _has_weights(folder / part)
        ]
    if parts:
        return {part: component_weights(folder, part) for part in parts}
    pickles = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLES]
    if pickles:
        raise ValueError(pickle_refusal(pickles[0]))
    raise FileNotFoundError(
        f"{folder} holds no model: a diffusers folder has model_index.json or config.json with "
        "safetensors, BFL's has flux1-*.safetensors (or .gguf) or ae.safetensors, ours has params/"
    )


def single_files(folder: Path, component: str) -> list[Path]:
    """Single files of one network, safetensors and GGUF, as they lie beside others."""
    if component not in SINGLE_FILES:
        return []
    return files_called(folder, SINGLE_FILES[component], SINGLE_FILES.values())


def text_files(folder: Path, component: str, patterns: Iterable[str]) -> list[Path]:
    """Files of a text encoder, one of each of the patterns, as ComfyUI keeps them beside others';
    none where the component has a folder. Raises ValueError if there are several of one."""
    if (folder / component).is_dir():
        return []
    called = (files_called(folder, pattern, TEXT_FILES) for pattern in patterns)
    found = (only_file(folder, component, files) for files in called)
    return [file for file in found if file is not None]


def only_file(folder: Path, component: str, files: list[Path]) -> Path | None:
    """The one of a network in `folder`, if any; of a text encoder's several the one in 16 bits.
    Raises ValueError if there are several."""
    if component.startswith("text_encoder"):
        whole = in_16_bits(path.name for path in files)
        files = [path for path in files if path.name in whole]
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(f"{folder} holds several {component} files, keep one of: {names}")
    return files[0] if files else None


def in_16_bits(names: Iterable[str]) -> list[str]:
    """Those of files of one network that are called so; where none is, all."""
    names = list(names)
    return [name for name in names if re.search("fp16|bf16", name)] or names


def files_called(folder: Path, pattern: str, patterns: Iterable[str] = ()) -> list[Path]:
    """Those of a folder whose names are `fitting`."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [folder / name for name in fitting(names, pattern, patterns)]


def fitting(names: Iterable[str], pattern: str, patterns: Iterable[str] = ()) -> list[str]:
    """Names that fit the pattern of a safetensors file, or are its GGUF.

    Where several of `patterns` fit, as flux1* does a Redux projector, the longest decides.
    """
    longer = [other for other in patterns if len(other) > len(pattern)]

    def fits(name: str, pattern: str) -> bool:
        return any(fnmatch(name, pattern.removesuffix(ST) + end) for end in (ST, ".gguf"))

    return [
        name for name in names if fits(name, pattern) and not any(fits(name, p) for p in longer)
    ]
