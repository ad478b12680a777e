"""SOURCE -> DESTINATION: open, check, write one tensor at a time, and only then let it be seen."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.checkpoint.component_json import config_json, write_json
from fluxjax.checkpoint.detect import describe
from fluxjax.checkpoint.lora.merge import merge_files
from fluxjax.checkpoint.opened_network import OpenNetwork, scheduler_of, with_dtype
from fluxjax.checkpoint.orbax_params import write_orbax
from fluxjax.checkpoint.pipeline_folder import (
    DEFAULTS_FILE,
    assembled,
    model_index,
    read_config,
    tokenizer_of,
)
from fluxjax.checkpoint.quantised.gguf_writer import write_gguf
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.sharded import SHARD_BYTES, is_index, require_space, write_sharded
from fluxjax.checkpoint.source import open_source
from fluxjax.config import ConfigError, published_defaults
from fluxjax.config.choices import FAMILY_NAMES, FileFamily
from fluxjax.convert.completeness import COPIED, check_complete
from fluxjax.convert.destination import check_destination
from fluxjax.convert.quantise import Kind, form_of, is_gguf_kind
from fluxjax.convert.targets import Target, Weights, json_files, plan_weights, plan_whole
from fluxjax.json_input import read_json
from fluxjax.networks import network_of
from fluxjax.networks.whole_files import whole_file_of
from fluxjax.parallel.mesh_shape import MeshShape

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
Progress = Callable[[str, int], None]
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# What a pipeline folder has beside weights; small files of other kinds are not copied.
_TEXT = (".json", ".txt", ".model", ".md", ".jinja", "")
_MAX_TEXT_BYTES = 2**26


@dataclass(frozen=True)
class Conversion:
    """A conversion that is checked and ready to run."""

    source: Path
    destination: Path
    networks: Mapping[str, OpenNetwork]
    weights: list[Weights]
    files: Mapping[Path, dict[str, Any]]
    copies: Mapping[Path, Path]
    shard_bytes: int
    single_file: bool
    overwrite: bool
    beside: list[str]  # weights of the source that are not read, since others of the network are

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.weights)

    def summary(self) -> list[str]:
        """One line per network: what it is, its parameters and dtypes, what is left out."""
        lines = []
        for network in self.networks.values():
            count = sum(tensor.size for tensor in network.tensors.values())
            dtypes = sorted({tensor.dtype.name for tensor in network.tensors.values()})
            line = f"{describe(network.config)}: {count:,} parameters, {' + '.join(dtypes)}"
            if network.record.scaled:
                line += f" ({len(network.record.scaled)} tensors were scaled fp8)"
            if network.dropped:
                line += f"; left out, no part of it: {', '.join(map(repr, network.dropped[:3]))}"
                line += f" and {len(network.dropped) - 3} more" * (len(network.dropped) > 3)
            lines.append(line)
        if self.beside:
            names = ", ".join(self.beside[:5]) + " ..." * (len(self.beside) > 5)
            lines.append(f"not read, since the source has these networks in another form: {names}")
        needed = [tokenizer_of(name) for name in self.networks if name.startswith("text_encoder")]
        missing = [name for name in needed if not self._has_copy(name)]
        if not self.single_file and len(self.networks) > len(needed) + 1 and missing:
            lines.append(
                f"the source has no {' and no '.join(missing)}: diffusers needs them, and fluxjax "
                "takes published ones"
            )
        return lines

    def _has_copy(self, folder: str) -> bool:
        return any(path.parts[0] == folder for path in self.copies)


def plan(
    source: Path,
    destination: Path,
    target: Target | None = None,
    *,
    quantised: Kind | None = None,
    dtype: Dtype = "keep",
    loras: Sequence[tuple[Path, float]] = (),
    mesh: MeshShape | None = None,
    config_file: Path | None = None,
    family: FileFamily | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Conversion:
    """Open and check everything; of weights reads headers only.

    `loras`: files of adapters to merge into the weights, and their strengths.
    `target`: by default what holds `quantised`, the kind of the codes, or diffusers' folders.
    `mesh`: the devices whose parts of the weights an Orbax folder stores one by one.
    `family`: whose a file is that does not tell it itself.
    Raises FileNotFoundError, OSError, or ValueError (ConfigError, engine.MappingError).
    """
    form: Target = form_of(quantised, target)
    if mesh is not None and form != "orbax":
        raise ConfigError(f"--mesh lays out an Orbax folder; {form} files have none")
    check_destination(source, destination, overwrite)
    beside = check_complete(source) if source.is_dir() else []
    networks = open_source(source, config_file, FAMILY_NAMES[family] if family else "")
    if dtype != "keep":
        networks = {k: with_dtype(network, _DTYPES[dtype]) for k, network in networks.items()}
    plain, (networks, defaults) = networks, merge_files(networks, loras)
    weights = plan_weights(networks, form, mesh, quantised)
    single_file = _is_single_file(destination, quantised)
    together = None
    if form == "bfl" and quantised is None:
        together = whole_file_of({name: one.config for name, one in networks.items()})
    whole = together if single_file else None
    if whole is not None:
        told = read_config(source).scheduler if _is_pipeline(source) else scheduler_of(networks)
        weights = [plan_whole(whole, networks, told)]
    elif single_file and (form != "bfl" or len(networks) > 1):
        raise ConfigError(
            f"{destination} is named like a single file, but {len(networks)} network(s) as "
            f"{form} make a folder; only --to bfl of one network, or of all of a Stable Diffusion, "
            "is a file"
        )
    if form == "bfl" and _is_pipeline(source) and whole is None:
        way = "name one .safetensors file for all of it, or " if together else ""
        if quantised is not None:
            way = "quantise it to int8 or nf4, give --to orbax, or "
        _require_own_files(source, networks, way)
    files: dict[Path, dict[str, Any]] = {}
    copies: dict[Path, Path] = {}
    if not single_file:
        copies = _copies(source)
        rewritten = _without_old_configs(copies, plain, networks)
        if Path("model_index.json") in rewritten:
            rewritten |= _sampled_with(copies, networks, [file for file, _ in loras], defaults)
        whole_source = _is_pipeline(source)
        files = _files(networks, form, copies, whole=whole_source)
        files |= rewritten | _as_written(copies, dtype, whole=whole_source)
        _say_quantised(weights, files, copies)
    return Conversion(
        source,
        destination,
        networks,
        weights,
        files,
        copies,
        shard_bytes,
        single_file,
        overwrite,
        beside,
    )


def _is_single_file(destination: Path, quantised: Kind | None) -> bool:
    """Raises ConfigError for the ending of files of another kind."""
    ending = ".gguf" if is_gguf_kind(quantised) else ".safetensors"
    if destination.suffix not in (".gguf", ".safetensors"):
        return False
    if destination.suffix != ending:
        what = f"--quantise {quantised}" if quantised else "without a --quantise of its types"
        raise ConfigError(
            f"{destination} ends in {destination.suffix}, but {what} a file ends in {ending}"
        )
    return True


def _require_own_files(source: Path, networks: Mapping[str, OpenNetwork], way: str) -> None:
    """Raises ConfigError, which names the other `way`, unless each network has a single file that
    is found beside the others'."""
    for name, network in networks.items():
        known = network_of(network.config)
        if not known.files or known.component != name:
            raise ConfigError(
                f"the {known.words} of {source} has no file of its own beside others in these "
                f"names: {way}convert it by itself ({source / name})"
            )


def _is_pipeline(source: Path) -> bool:
    return (source / "model_index.json").is_file()


def _copies(source: Path) -> dict[Path, Path]:
    """relative path -> file, of the texts beside the weights that are carried on unchanged."""
    if not source.is_dir():
        return {}
    if not _is_pipeline(source):
        names = ["config.json"] if (source / "config.json").is_file() else []
        return {Path(name): source / name for name in names}
    folders = [
        name
        for name, part in read_json(source / "model_index.json").items()
        if isinstance(part, list) and part != [None, None]
    ]
    copies = {}
    # Names from a stranger's file: plain words only, never a path.
    for folder in [".", *(name for name in folders if re.fullmatch(r"\w+", name))]:
        for path in sorted((source / folder).glob("*")):
            is_text = path.is_file() and path.suffix in _TEXT and not path.name.startswith(".")
            ours = path.name == "fluxjax_source.json" or path.name.endswith(
                (".bin.index.json", ".sha256.json")
            )
            ours = ours or is_index(path.name)
            if is_text and not ours and path.stat().st_size <= _MAX_TEXT_BYTES:
                copies[Path(folder) / path.name] = path
    for folder in COPIED:
        found = sorted((source / folder).rglob("*"))
        copies |= {path.relative_to(source): path for path in found if path.is_file()}
    return copies


def _files(
    networks: Mapping[str, OpenNetwork], target: Target, copies: Mapping[Path, Path], whole: bool
) -> dict[Path, dict[str, Any]]:
    files = json_files(networks, target)
    parts = {name: network.config for name, network in networks.items()}
    lone = whole or len(parts) < 2
    config = None if lone else assembled(parts, scheduler=scheduler_of(networks))
    if config is not None:
        files[Path("model_index.json")] = model_index(config, networks)
        files[Path("scheduler/scheduler_config.json")] = config_json(config.scheduler)
    return {path: values for path, values in files.items() if path not in copies}


def _without_old_configs(
    copies: dict[Path, Path],
    before: Mapping[str, OpenNetwork],
    after: Mapping[str, OpenNetwork],
) -> dict[Path, dict[str, Any]]:
    """Takes away copies that are wrong of networks with other configurations now: config.json,
    which is written anew, and the pipeline's index, given back with the class of the pipeline."""
    changed = [name for name in after if after[name].config != before[name].config]
    whole = assembled({name: network.config for name, network in after.items()})
    files = {}
    for name in changed:
        copies.pop(Path(name) / "config.json", None)
        index = copies.pop(Path("model_index.json"), None)
        if len(after) == 1:
            copies.pop(Path("config.json"), None)
        if index is not None and whole is not None:
            files[Path("model_index.json")] = {**read_json(index), "_class_name": whole.class_name}
    return files


def _sampled_with(
    copies: dict[Path, Path],
    networks: Mapping[str, OpenNetwork],
    loras: Sequence[Path],
    defaults: Mapping[str, Any],
) -> dict[Path, dict[str, Any]]:
    """The file of defaults of a pipeline that was given another class by adapters: it is sampled as
    the model is with them beside it. Takes away its copy."""
    names = " ".join(map(str, loras))
    told = {**published_defaults(networks["transformer"].config, names), **defaults}
    given = copies.pop(Path(DEFAULTS_FILE), None)
    return {Path(DEFAULTS_FILE): (read_json(given) if given else {}) | told}


def _say_quantised(
    weights: Sequence[Weights], files: dict[Path, dict[str, Any]], copies: dict[Path, Path]
) -> None:
    """Puts into config.json, in `files` or taken from `copies`, how weights are quantised."""
    for part in weights:
        if part.quantisation is not None:
            path = part.path.parent / "config.json"
            given = read_json(copies.pop(path)) if path in copies else files[path]
            files[path] = {**given, "quantization_config": part.quantisation}


def _as_written(
    copies: dict[Path, Path], dtype: Dtype, *, whole: bool
) -> dict[Path, dict[str, Any]]:
    """Files of configurations that must say something else of the weights than the source's do.
    One above the networks of a `whole` pipeline is nobody's, and need not even be JSON: some
    repositories have one so that downloads are counted.

    transformers casts to the dtype that is named there, and both libraries expect quantised
    weights where a quantisation is.
    """
    changed = {}
    for name, path in copies.items():
        if name.name != "config.json" or (whole and name.parent == Path()):
            continue
        given = read_json(path)
        values = {key: value for key, value in given.items() if key != "quantization_config"}
        if dtype != "keep":
            values |= dict.fromkeys(values.keys() & {"torch_dtype", "dtype"}, dtype)
        if values != given:
            changed[name] = values
    for name in changed:
        del copies[name]
    return changed


def run(conversion: Conversion, progress: Progress | None = None) -> float:
    """Write it all; returns seconds. The destination appears once everything is on the disk.

    Raises OSError (no space, not writable); then the destination is as it was before.
    """
    start = time.perf_counter()
    parent = next(p for p in conversion.destination.absolute().parents if p.exists())
    require_space(parent, conversion.nbytes)
    with whole_or_nothing(conversion.destination) as part:
        # Again, now that nobody else of us can write there.
        check_destination(conversion.source, conversion.destination, conversion.overwrite)
        if conversion.single_file:
            (weights,) = conversion.weights
            write = write_gguf if weights.kind == "gguf" else write_safetensors
            write(part, weights.tensors, weights.metadata, progress=progress)
            return time.perf_counter() - start
        part.mkdir()
        for name, path in conversion.copies.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part / name)
        for name, values in conversion.files.items():
            write_json(part / name, values)
        for weights in conversion.weights:
            _write(part, weights, conversion.shard_bytes, progress)
    return time.perf_counter() - start


def _write(part: Path, weights: Weights, shard_bytes: int, progress: Progress | None) -> None:
    path = part / weights.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if weights.kind == "orbax":
        write_orbax(path, weights.tree, chunks=weights.chunks, progress=progress)
    elif weights.kind in ("file", "gguf"):
        write = write_gguf if weights.kind == "gguf" else write_safetensors
        write(path, weights.tensors, weights.metadata, progress=progress)
    else:
        write_sharded(
            path.parent,
            path.name,
            weights.tensors,
            shard_bytes=shard_bytes,
            metadata=weights.metadata,
            progress=progress,
        )
