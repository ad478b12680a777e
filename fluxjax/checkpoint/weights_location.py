"""Where in a folder the weights of each network lie: in its own folder, or in a single file."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from fluxjax.checkpoint.component_json import pipeline_class
from fluxjax.checkpoint.file_format import PICKLES, pickle_refusal
from fluxjax.checkpoint.orbax_params import is_orbax
from fluxjax.json_input import read_json
from fluxjax.networks import NETWORKS

PARAMS = "params"
# BFL's and ComfyUI's single files, as they lie in one folder.
SINGLE_FILES = {network.component: network.files for network in NETWORKS.values() if network.files}


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
    """Single files of one network, safetensors and GGUF, as they lie beside others.

    Where the names of several networks fit, as flux1* does a Redux projector, the longest decides.
    """
    if component not in SINGLE_FILES:
        return []
    longer = {n for n in SINGLE_FILES.values() if len(n) > len(SINGLE_FILES[component])}
    return [
        file
        for file in files_called(folder, SINGLE_FILES[component])
        if not any(fnmatch(file.name, other) for each in longer for other in _both(each))
    ]


def only_file(folder: Path, component: str, files: list[Path]) -> Path | None:
    """The one of a network in `folder`, if any. Raises ValueError if there are several."""
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(f"{folder} holds several {component} files, keep one of: {names}")
    return files[0] if files else None


def files_called(folder: Path, name: str) -> list[Path]:
    """What fits the pattern of a safetensors file, or is its GGUF."""
    return sorted(file for one in _both(name) for file in folder.glob(one))


def _both(name: str) -> tuple[str, str]:
    return name, f"{name.removesuffix('.safetensors')}.gguf"
