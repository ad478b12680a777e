"""Opening a checkpoint of any known form: lazy tensors under published names, checked.

Forms: diffusers and transformers folders, BFL's and ComfyUI's single files and folders of them,
our Orbax folders. Nothing is read but headers until a tensor is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import network_config
from fluxjax.checkpoint.detect import detect_network, refuse_foreign, split_prefixes
from fluxjax.checkpoint.file_format import PICKLES, pickle_refusal
from fluxjax.checkpoint.opened_network import OpenNetwork, make_network
from fluxjax.checkpoint.orbax_params import read_orbax
from fluxjax.checkpoint.quantised import comfy
from fluxjax.checkpoint.quantised.reader import refuse_packed
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.sharded import read_sharded, read_together
from fluxjax.checkpoint.source_record import METADATA_KEY, RECORD_FILE, Record
from fluxjax.checkpoint.tensor_file import is_gguf, read_tensor_file
from fluxjax.checkpoint.weights_location import (
    SINGLE_FILES,
    component_weights,
    files_called,
    only_file,
    orbax_folder,
    single_files,
    weights_of,
)
from fluxjax.checkpoint.whole_file import open_part, open_whole_file
from fluxjax.config import ConfigError
from fluxjax.json_input import read_json
from fluxjax.networks import Config, network_of
from fluxjax.networks.whole_files import WholeFile


def open_file(
    path: Path, config: Config | None = None, component: str = "", family: str = ""
) -> dict[str, OpenNetwork]:
    """The networks of one file, safetensors or GGUF: BFL's, ComfyUI's all-in-one, or any one.

    `config` where shapes do not tell it; `family` where it is known, as by the names under which
    FLUX's files are published. Raises FileNotFoundError, ValueError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix.lower() in PICKLES:
        raise ValueError(pickle_refusal(path))
    raw, metadata = read_tensor_file(path)
    if not raw:
        raise ConfigError(f"{path} holds no tensors")
    try:
        raw = comfy.with_markers(raw, metadata)
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    if not component and (networks := open_whole_file(raw, path, metadata, config, family)):
        return networks
    saved = _saved(metadata.get(METADATA_KEY), path)
    try:
        refuse_packed(raw)
        refuse_foreign({name: tensor.shape for name, tensor in raw.items()})
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    groups = split_prefixes(raw)
    if len(groups) > 1 and "" in groups:
        names = ", ".join(map(repr, sorted(groups[""])))
        raise ConfigError(f"{path} holds tensors that belong to none of its networks: {names}")
    name = f"{path.stem}.safetensors"
    if "transformer" in groups:
        shapes = {short: raw[full].shape for short, full in groups["transformer"].items()}
        found = detect_network(shapes)[0].family
        family = family if family.startswith(found) else found  # it may be told more closely
    elif not family and any(fnmatch(name, files) for files in SINGLE_FILES.values()):
        family = "FLUX.1"
    networks = {}
    for prefixed, names in groups.items():
        wanted = len(groups) == 1 or prefixed == (component or "transformer")
        network = make_network(
            {short: raw[name] for short, name in names.items()},
            path,
            component=prefixed or component,
            config=(config or saved.get("config")) if wanted else None,
            record=saved.get("record"),
            family=family,
        )
        networks[network.component] = network
    return networks


def _saved(text: str | None, path: Path) -> dict[str, Any]:
    """What our own writer left in the metadata: the configuration and the record."""
    if text is None:
        return {}
    try:
        values = json.loads(text)
        saved: dict[str, Any] = {"config": network_config(values["config"], path)}
        if values.get("record"):
            saved["record"] = Record.from_json(values["record"])
        return saved
    except (KeyError, TypeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path}: the metadata under {METADATA_KEY!r} is damaged") from None


def open_folder(
    folder: Path, component: str = "", config: Config | None = None, family: str = ""
) -> OpenNetwork:
    """One network's folder: config.json beside safetensors (or shards, or Orbax in params/)."""
    folder = Path(folder)
    if config is None and (folder / "config.json").is_file():
        config = network_config(read_json(folder / "config.json"), folder / "config.json")
    record = None
    if (folder / RECORD_FILE).is_file():
        record = Record.from_json(read_json(folder / RECORD_FILE))
    orbax = orbax_folder(folder)
    raw = engine.from_tree(_parameters(read_orbax(orbax))) if orbax else read_sharded(folder)
    return make_network(
        raw, folder, component=component, config=config, record=record, family=family
    )


def open_network(path: Path, component: str) -> OpenNetwork:
    """One network by itself: a file, its folder, or a pipeline's folder with it in a subfolder.

    Raises FileNotFoundError, and what `open_file` and `open_folder` raise for another network.
    """
    path = Path(path)
    if not path.is_dir():
        return open_file(path, component=component, family="FLUX.1")[component]
    for folder in (path, *sorted(inner for inner in path.iterdir() if inner.is_dir())):
        if _describes(folder / "config.json", component):
            return open_folder(folder, component)
    files = single_files(path, component)
    if len(files) == 1:
        return open_file(files[0], component=component, family="FLUX.1")[component]
    return open_folder(path, component, family="FLUX.1")


def _describes(config_file: Path, component: str) -> bool:
    """Whether it is of that kind of weights, or of a kind that holds it."""
    if not config_file.is_file():
        return False
    try:
        network = network_of(network_config(read_json(config_file), config_file))
    except ValueError:
        return False
    return component == network.component or component in network.parts


def _parameters(tree: dict[str, Any]) -> dict[str, Any]:
    """Training states keep the parameters under "params"."""
    return tree["params"] if isinstance(tree.get("params"), Mapping) else tree


def open_component(
    folder: Path, component: str, config: Config | None = None, family: str = ""
) -> OpenNetwork:
    """One network of a pipeline folder, in its own folder or in a single file beside it.

    Raises FileNotFoundError if there are no weights, and what `open_file`, `open_folder` raise.
    """
    path = component_weights(Path(folder), component)
    if path.is_file():
        return open_file(path, config, component, family)[component]
    return open_folder(path, component, config, family)


def open_text_encoder(
    folder: Path,
    component: str,
    files: list[Path],
    config: Config | None = None,
    family: str = "",
) -> OpenNetwork:
    """From its `files`, several of which are one network together; without any `open_component`."""
    if len(files) > 1:
        raw = read_together(files)
        return make_network(raw, folder, component=component, config=config, family=family)
    if files:
        return open_file(files[0], config, component, family)[component]
    return open_component(folder, component, config, family)


def open_beside(folder: Path, component: str, whole: WholeFile) -> OpenNetwork | None:
    """A network that a file of a whole pipeline lacks: from a folder of its own in `folder`, or a
    file, as ComfyUI keeps them. None where there is neither; raises ValueError for several files.
    """
    if (folder / component).is_dir():
        return open_component(folder, component)
    pattern = whole.parts[component].file
    path = only_file(folder, component, files_called(folder, pattern) if pattern else [])
    if path is None:
        return None
    if is_gguf(path):
        return open_file(path, component=component, family=whole.family)[component]
    raw, metadata = read_safetensors(path)
    return open_part(comfy.with_markers(raw, metadata), path, component, whole)


def open_source(
    path: Path, config_file: Path | None = None, family: str = ""
) -> dict[str, OpenNetwork]:
    """Every network of a checkpoint, by component.

    `config_file`: the config.json of a network whose shapes do not tell everything. `family`: see
    `make_network`.
    Raises FileNotFoundError, or ValueError (ConfigError, engine.MappingError) in one sentence.
    """
    path = Path(path)
    config = None
    if config_file is not None:
        config = network_config(read_json(Path(config_file)), Path(config_file))
    if not path.is_dir():
        return open_file(path, config, family=family)
    parts = weights_of(path)
    if parts.keys() == {""} and parts[""].is_file():
        own = path / "config.json"
        return open_file(parts[""], config or network_config(read_json(own), own), family=family)
    if parts.keys() == {""}:
        network = open_folder(path, config=config, family=family)
        return {network.component: network}
    return {part: open_component(path, part) for part in parts}
