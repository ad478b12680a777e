"""What each target form consists of: files and the tensors in them, still lazy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json
from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.pipeline_folder import weights_stem
from fluxjax.checkpoint.quantised.gguf_writer import stored
from fluxjax.checkpoint.source_record import METADATA_KEY, RECORD_FILE
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.checkpoint.weights_location import PARAMS
from fluxjax.checkpoint.whole_file import whole_tensors
from fluxjax.config import ConfigError
from fluxjax.convert.quantise import (
    FORMS,
    bitsandbytes_config,
    gguf_keys,
    is_gguf_kind,
    quantise,
    spelled,
)
from fluxjax.models.quantised import Quantised
from fluxjax.networks import network_of
from fluxjax.networks.whole_files import WholeFile
from fluxjax.parallel.mesh_shape import AXES, MeshShape
from fluxjax.parallel.rules import param_shardings

Target = Literal["diffusers", "bfl", "orbax"]


@dataclass(frozen=True)
class Weights:
    """One set of weights to write. `path` is relative to the destination.

    kind "file": a single safetensors file, "gguf": a GGUF file. "sharded": `path` is the stem of
    one file or of shards. "orbax": `path` is a folder and `tree` its parameters, `chunks` the
    shapes they are stored in. `quantisation`: what config.json says of the codes.
    """

    kind: Literal["file", "gguf", "sharded", "orbax"]
    path: Path
    tensors: dict[str, Tensor]
    tree: dict[str, Any]
    metadata: Mapping[str, Any]
    chunks: dict[str, Any] | None = None
    quantisation: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        if self.kind == "orbax":
            return sum(tensor.nbytes for tensor in jax.tree.leaves(self.tree))
        tensors = self.tensors.values()
        return sum((stored(t)[0] if self.kind == "gguf" else t).nbytes for t in tensors)


def plan_weights(
    networks: Mapping[str, OpenNetwork],
    target: Target,
    mesh: MeshShape | None = None,
    quantised: str | None = None,
) -> list[Weights]:
    """One network goes into the destination itself, several into one folder each.

    For BFL all are single files: flux1-*.safetensors, ae.safetensors, and with the published
    names, as ComfyUI has them, clip_l.safetensors and t5xxl.safetensors. `mesh` is for Orbax.
    `quantised`: the kind of the codes of the networks that have large products. Raises ConfigError
    where none has.
    """
    if quantised is not None and not any(map(_has_codes, networks.values())):
        words = " and ".join(network_of(one.config).words for one in networks.values())
        raise ConfigError(f"--quantise {quantised}: the {words} is never quantised")
    return [
        _plan_network(network, target, mesh, quantised, Path(name if len(networks) > 1 else "."))
        for name, network in networks.items()
    ]


def plan_whole(
    whole: WholeFile, networks: Mapping[str, OpenNetwork], scheduler: Any = None
) -> Weights:
    """All of a pipeline in one file, in the original code's names. `scheduler`: as
    `whole_tensors` takes it."""
    tensors, metadata = whole_tensors(whole, networks, scheduler)
    return Weights("file", Path("."), tensors, {}, metadata)


def _has_codes(network: OpenNetwork) -> bool:
    known = network_of(network.config)
    return bool(known.quantised and known.quantised_files)


def _plan_network(
    network: OpenNetwork, target: Target, mesh: MeshShape | None, kind: str | None, folder: Path
) -> Weights:
    if kind is None or not _has_codes(network):
        return _plan(network, target, mesh, folder)
    if target == "orbax":
        return _plan_codes(network, kind, mesh, folder)
    return _plan_quantised(network, kind, folder)


def _plan_quantised(network: OpenNetwork, kind: str, folder: Path) -> Weights:
    description = network_of(network.config)
    gguf = is_gguf_kind(kind)
    name = "published" if kind in FORMS else "bfl"
    dialect = description.dialect("gguf" if gguf and description.has_dialect("gguf") else name)
    table = dialect.table(network.config)
    tensors = engine.from_published(network.tensors, table)
    form = "diffusers" if kind in FORMS else "bfl"
    tensors = quantise(tensors, network.config, table, kind, form)
    tensors = network.record.restore(tensors, dialect.name, fp8=False)
    saved = json.dumps({"config": config_json(network.config)})
    file = Path(description.file_name(network.config))
    if gguf:
        keys = gguf_keys(network.config, kind, saved)
        tensors = dict(sorted(tensors.items()))
        return Weights("gguf", file.with_suffix(".gguf"), tensors, {}, keys)
    if name == "bfl":
        return Weights("file", file, spelled(tensors, kind), {}, {METADATA_KEY: saved})
    path = folder / weights_stem(network.config)
    codes = dict(sorted(spelled(tensors, kind).items()))
    config = bitsandbytes_config(tensors, kind)
    return Weights("sharded", path, codes, {}, {}, quantisation=config)


def _plan_codes(network: OpenNetwork, kind: str, mesh: MeshShape | None, folder: Path) -> Weights:
    """For Orbax, whose trees hold codes of all kinds."""
    table = network_of(network.config).dialect("published").table(network.config)
    tensors = quantise(network.tensors, network.config, table, kind, "orbax")
    template = abstract_params(network.config)
    codes: dict[tuple[str, ...], Quantised] = {}
    for name, leaf in engine.published_leaves(template).items():
        packed = tensors[name].packed
        if packed is not None and packed.kind in (kind, kind.upper()):
            codes[leaf.path] = packed
    plain = {path: leaf for path, leaf in engine.flatten(template).items() if path not in codes}
    tree = engine.to_tree(tensors, engine.unflatten(plain), place=lambda _, tensor: tensor)
    tree = engine.unflatten(engine.flatten(tree) | codes)
    chunks = None
    if mesh is not None:
        shapes = {path: packed.map(_shape) for path, packed in codes.items()}
        template = engine.unflatten(plain | shapes)
        chunks = _shard_shapes(network.config, template, mesh)
    return Weights("orbax", folder / PARAMS, tensors, tree, {}, chunks)


def _shape(tensor: Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)


def _plan(network: OpenNetwork, target: Target, mesh: MeshShape | None, folder: Path) -> Weights:
    if target == "orbax":
        template = abstract_params(network.config)
        tree = engine.to_tree(network.tensors, template, place=lambda _, tensor: tensor)
        chunks = _shard_shapes(network.config, template, mesh) if mesh is not None else None
        return Weights("orbax", folder / PARAMS, network.tensors, tree, {}, chunks)
    if target == "diffusers":
        tensors = network.record.restore(network.tensors, "published", fp8=False)
        path = folder / weights_stem(network.config)
        return Weights("sharded", path, dict(sorted(tensors.items())), {}, {})
    description = network_of(network.config)
    dialect = description.dialect("bfl")
    table = dialect.table(network.config)
    tensors = engine.from_published(network.tensors, table)
    tensors = network.record.restore(tensors, dialect.name, fp8=True)
    saved = {"config": config_json(network.config)}
    if network.record and network.record.dialect != dialect.name:
        saved["record"] = network.record.to_json()
    metadata = {METADATA_KEY: json.dumps(saved)}
    return Weights(
        "file", Path(network_of(network.config).file_name(network.config)), tensors, {}, metadata
    )


def _shard_shapes(config: Any, template: Mapping[str, Any], mesh: MeshShape) -> dict[str, Any]:
    """The shape of each leaf's part on a device of `mesh`, of which none is needed here."""
    sizes = (mesh.data or 1, mesh.fsdp, mesh.tensor, mesh.sequence)
    shardings = param_shardings(config, template, AbstractMesh(sizes, AXES))
    return jax.tree.map(
        lambda leaf, sharding: sharding.shard_shape(leaf.shape), template, shardings
    )


def json_files(networks: Mapping[str, OpenNetwork], target: Target) -> dict[Path, dict[str, Any]]:
    """config.json of each network, and what going back to its source must know."""
    files: dict[Path, dict[str, Any]] = {}
    for name, network in networks.items():
        folder = Path(name if len(networks) > 1 else ".")
        if target == "bfl" and len(networks) == 1:
            continue  # the configuration is in the file's metadata
        files[folder / "config.json"] = config_json(network.config)
        if target != "bfl" and network.record:
            files[folder / RECORD_FILE] = network.record.to_json()
    return files
