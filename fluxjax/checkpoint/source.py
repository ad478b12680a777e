"""Opening a checkpoint of any known form: lazy tensors under reference names, checked.

Forms: diffusers and transformers folders, BFL's and ComfyUI's single files and folders of them,
our Orbax folders. Nothing is read but headers until a tensor is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.checkpoint import engine, tensors
from fluxjax.checkpoint.component_json import network_config, pipeline_class, read_json
from fluxjax.checkpoint.detect import (
    detect_network,
    infer_config,
    refuse_foreign,
    split_prefixes,
)
from fluxjax.checkpoint.file_format import PICKLES, pickle_refusal
from fluxjax.checkpoint.orbax_params import is_orbax, read_orbax
from fluxjax.checkpoint.placement import load_tree
from fluxjax.checkpoint.quantised import comfy
from fluxjax.checkpoint.quantised.gguf import MAGIC, read_gguf
from fluxjax.checkpoint.quantised.reader import refuse_packed, unquantised
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.sharded import read_sharded
from fluxjax.checkpoint.source_record import Record, dequantise, is_fp8_extra
from fluxjax.checkpoint.templates import abstract_params, kept_template, quantised_template
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.config import ConfigError
from fluxjax.networks import NETWORKS, Config, by_component, network_of
from fluxjax.networks.tables import Table
from fluxjax.quantised_kinds import KEEP, NONE

RECORD_FILE = "fluxjax_source.json"
METADATA_KEY = "fluxjax"
PARAMS = "params"
# BFL's and ComfyUI's single files, as they lie in one folder.
SINGLE_FILES = {network.component: network.files for network in NETWORKS.values() if network.files}


@dataclass(frozen=True)
class OpenNetwork:
    """One network of a checkpoint. `tensors` have reference names and layout.

    `where`: the file or folder they are in. `dialect`: whose names they have there.
    `dropped`: names of tensors that belong to no network of ours and are not carried on.
    """

    component: str
    config: Any
    tensors: dict[str, Tensor]
    record: Record
    dialect: str
    where: Path
    dropped: tuple[str, ...] = ()

    def template(self, *, stacked: bool, quantise: str = NONE) -> tuple[dict[str, Any], list[str]]:
        """Shapes of `params`, the values in float32; and what `templates.kept_template` decodes."""
        tree = abstract_params(self.config, stacked=stacked)
        if quantise == KEEP:
            return kept_template(tree, self.config, self.tensors)
        if quantise == NONE:
            return tree, []
        return quantised_template(tree, self.config, quantise), []

    def params(
        self,
        *,
        stacked: bool,
        dtype: Any = None,
        shardings: Any = None,
        quantise: str = NONE,
    ) -> dict[str, Any]:
        """Our parameters as JAX arrays; see `pipeline_folder.load_params`.

        `quantise`: "keep" leaves dense kernels in the codes that the file has; one of
        `fluxjax.quantised_kinds.KINDS` keeps the blocks' products in that; "none" keeps values.

        Raises ConfigError naming a tensor with NaN or infinite values, and the file or folder.
        """
        template, _ = self.template(stacked=stacked, quantise=quantise)
        return self.fill(template, dtype=dtype, shardings=shardings)

    def fill(
        self, template: Mapping[str, Any], *, dtype: Any = None, shardings: Any = None
    ) -> dict[str, Any]:
        """`params` of the form of a `template`."""
        table = network_of(self.config).dialect("reference").table(self.config)
        try:
            return load_tree(self.tensors, table, template, dtype=dtype, shardings=shardings)
        except ConfigError as error:
            raise ConfigError(f"{self.where}: {self.component}: {error}") from None


def make_network(
    raw: Mapping[str, Tensor],
    where: Path,
    *,
    component: str = "",
    config: Any = None,
    record: Record | None = None,
    family: str = "",
    layers: Mapping[str, dict[str, Any]] | None = None,
) -> OpenNetwork:
    """Detect, dequantise, name and check one network's tensors.

    `family`: "FLUX.1" where these are known to be a part of it. `layers`: see `unquantised`.
    Raises ConfigError or engine.MappingError, naming `where`.
    """
    try:
        refuse_packed(raw)
        raw = unquantised(raw, layers)
        network, dialect = detect_network({name: tensor.shape for name, tensor in raw.items()})
        if component in network.parts:
            if type(config) is network.config:
                config = getattr(config, network.parts[component])
            network = by_component(component)
            dialect = network.dialects[0]
        if component and network.component != component:
            wanted = by_component(component).words
            raise ConfigError(
                f"expected the {wanted}, but these are tensors of the {network.words}"
            )
        plain, scaled = dequantise(raw)
        shapes = {name: tensor.shape for name, tensor in plain.items()}
        if config is None:
            config = infer_config(network, dialect, shapes, family)
        elif type(config) is not network.config:
            raise ConfigError(
                f"these are tensors of the {network.words}, but the configuration is of the "
                f"{network_of(config).words}"
            )
        else:
            config = network.fit(config, shapes)
        table = dialect.table(config)
        leaves = engine.reference_leaves(abstract_params(config))
        expected = {name: leaf.shape for name, leaf in leaves.items()}
        reference = engine.to_reference(plain, table, expected)
    except ValueError as error:
        raise type(error)(f"{where}: {error}") from None
    if record is not None:
        _check_record(record, config, reference, where)
    ignored = [n for n in plain if any(re.fullmatch(p, n) for p in table.ignored)]
    kept = [n for n in ignored if re.fullmatch(r".*position_ids|logit_scale", n)]
    renamed, doubled = _other_names(plain, table, expected)
    extras = {name: raw[name] for name in raw if is_fp8_extra(name)}
    extras |= {name: plain[name] for name in kept}
    if record is None:
        record = Record(dialect.name, renamed, doubled, extras, scaled)
    dropped = tuple(sorted(set(ignored) - set(kept)))
    return OpenNetwork(network.component, config, reference, record, dialect.name, where, dropped)


def _check_record(
    record: Record, config: Any, reference: Mapping[str, Tensor], where: Path
) -> None:
    """Raises ValueError unless what the record makes of the network can be read again."""
    table = network_of(config).dialect(record.dialect).table(config)
    theirs = engine.from_reference(reference, table)
    shapes = {name: tensor.shape for name, tensor in reference.items()}
    try:
        for fp8 in (True, False):
            plain, _ = dequantise(record.restore(theirs, record.dialect, fp8=fp8))
            engine.to_reference(plain, table, shapes)
    except ValueError as error:
        raise ValueError(
            f"{where}: {RECORD_FILE}, or the record in the metadata, does not fit the network: "
            f"{error}"
        ) from None


def _other_names(
    plain: Mapping[str, Tensor], table: Table, shapes: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    renamed: dict[str, str] = {}
    doubled: dict[str, str] = {}
    for name in plain if table.identity else ():
        matched = engine.match_rule(table, name)
        if matched and name not in shapes:
            (reference,) = matched[1]
            if reference in plain:
                doubled[name] = reference
            else:
                renamed[reference] = name
    return renamed, doubled


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
    raw, metadata = read_gguf(path) if is_gguf(path) else read_safetensors(path)
    saved = _saved(metadata.get(METADATA_KEY), path)
    try:
        refuse_packed(raw)
        refuse_foreign({name: tensor.shape for name, tensor in raw.items()})
        layers = comfy.layers_of(metadata.get(comfy.METADATA_KEY))
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    groups = split_prefixes(raw)
    if len(groups) > 1 and "" in groups:
        names = ", ".join(map(repr, sorted(groups[""])))
        raise ConfigError(f"{path} holds tensors that belong to none of its networks: {names}")
    name = f"{path.stem}.safetensors"
    if "transformer" in groups or any(fnmatch(name, files) for files in SINGLE_FILES.values()):
        family = "FLUX.1"
    networks = {}
    for prefixed, names in groups.items():
        wanted = not prefixed or prefixed == (component or "transformer")
        network = make_network(
            {short: raw[name] for short, name in names.items()},
            path,
            component=prefixed or component,
            config=(config or saved.get("config")) if wanted else None,
            record=saved.get("record"),
            family=family,
            layers={
                short.removesuffix(".weight"): layers[full.removesuffix(".weight")]
                for short, full in names.items()
                if full.removesuffix(".weight") in layers
            },
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


def is_gguf(path: Path) -> bool:
    """By its content, or by its name where it has none."""
    if not path.is_file():  # a pipe would be waited for
        return False
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
    return start == MAGIC or path.suffix.lower() == ".gguf"


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
    files = _flat_files(path, component)
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


def orbax_folder(folder: Path) -> Path | None:
    """Where the parameters are in a folder of our own, or of Orbax."""
    return next((f for f in (folder / PARAMS, folder, folder / "default") if is_orbax(f)), None)


def _parameters(tree: dict[str, Any]) -> dict[str, Any]:
    """Training states keep the parameters under "params"."""
    return tree["params"] if isinstance(tree.get("params"), Mapping) else tree


def open_component(
    folder: Path, component: str, config: Config | None = None, family: str = "FLUX.1"
) -> OpenNetwork:
    """One network of a pipeline folder, in its own folder or in a single file beside it.

    Raises FileNotFoundError if there are no weights, and what `open_file`, `open_folder` raise.
    """
    path = component_weights(Path(folder), component)
    if path.is_file():
        return open_file(path, config, component)[component]
    return open_folder(path, component, config)


def component_weights(folder: Path, component: str) -> Path:
    """The folder of one network of a pipeline folder, or its single file.

    Raises ValueError if there are several files.
    """
    own = folder / component
    if not _has_weights(own):
        files = [*_flat_files(folder, component), *sorted(own.glob("*.gguf"))]
        if len(files) > 1:
            names = ", ".join(path.name for path in files)
            raise ValueError(f"{folder} holds several {component} files, keep one of: {names}")
        if files:
            return files[0]
    return own


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and (
        is_orbax(folder / PARAMS) or is_orbax(folder) or any(folder.glob("*.safetensors*"))
    )


def weights_of(folder: Path) -> dict[str, Path]:
    """Each network of a checkpoint folder: its folder or its single file. "": the folder is one.

    Raises FileNotFoundError, or ValueError for a folder of pickles.
    """
    if (folder / "model_index.json").is_file():
        pipeline_class(folder)
        index = read_json(folder / "model_index.json")
        parts = [part for part in SINGLE_FILES if index.get(part) not in (None, [None, None])]
    elif _has_weights(folder) and not any(_flat_files(folder, part) for part in SINGLE_FILES):
        return {"": folder}
    else:
        parts = [part for part in SINGLE_FILES if _flat_files(folder, part)]
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


def open_source(path: Path, config_file: Path | None = None) -> dict[str, OpenNetwork]:
    """Every network of a checkpoint, by component.

    `config_file`: the config.json of a network whose shapes do not tell everything.
    Raises FileNotFoundError, or ValueError (ConfigError, engine.MappingError) in one sentence.
    """
    path = Path(path)
    config = None
    if config_file is not None:
        config = network_config(read_json(Path(config_file)), Path(config_file))
    if not path.is_dir():
        return open_file(path, config)
    parts = weights_of(path)
    if parts.keys() == {""}:
        network = open_folder(path, config=config)
        return {network.component: network}
    return {part: open_component(path, part) for part in parts}


def _flat_files(folder: Path, component: str) -> list[Path]:
    """Single files of one network, safetensors and GGUF, as they lie beside others.

    Where the names of several networks fit, as flux1* does a Redux projector, the longest decides.
    """
    if component not in SINGLE_FILES:
        return []
    longer = {n for n in SINGLE_FILES.values() if len(n) > len(SINGLE_FILES[component])}
    return sorted(
        file
        for name in _both(SINGLE_FILES[component])
        for file in folder.glob(name)
        if not any(fnmatch(file.name, other) for each in longer for other in _both(each))
    )


def _both(name: str) -> tuple[str, str]:
    return name, f"{name.removesuffix('.safetensors')}.gguf"


def with_dtype(network: OpenNetwork, dtype: Any) -> OpenNetwork:
    """Values cast; what the record says of fp8 is then forgotten."""
    cast = {name: tensors.astype(t, np.dtype(dtype)) for name, t in network.tensors.items()}
    return without_fp8(replace(network, tensors=cast))


def without_fp8(network: OpenNetwork) -> OpenNetwork:
    """As if it had never been fp8: for values that are others now."""
    extras = {k: v for k, v in network.record.extras.items() if not is_fp8_extra(k)}
    return replace(network, record=replace(network.record, extras=extras, scaled={}))
