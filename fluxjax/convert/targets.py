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
from fluxjax.checkpoint.pipeline_folder import weights_stem
from fluxjax.checkpoint.source import METADATA_KEY, PARAMS, RECORD_FILE, OpenNetwork
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.networks import network_of
from fluxjax.parallel.mesh_shape import AXES, MeshShape
from fluxjax.parallel.rules import param_shardings

Target = Literal["diffusers", "bfl", "orbax"]


@dataclass(frozen=True)
class Weights:
    """One set of weights to write. `path` is relative to the destination.

    kind "file": a single safetensors file. "sharded": `path` is the stem of one file or of shards.
    "orbax": `path` is a folder and `tree` its parameters, `chunks` the shapes they are stored in.
    """

    kind: Literal["file", "sharded", "orbax"]
    path: Path
    tensors: dict[str, Tensor]
    tree: dict[str, Any]
    metadata: dict[str, str]
    chunks: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_weights(
    networks: Mapping[str, OpenNetwork], target: Target, mesh: MeshShape | None = None
) -> list[Weights]:
    """One network goes into the destination itself, several into one folder each.

    For BFL all are single files: flux1-*.safetensors, ae.safetensors, and with the reference's
    names, as ComfyUI has them, clip_l.safetensors and t5xxl.safetensors. `mesh` is for Orbax.
    """
    return [
        _plan(network, target, mesh, Path(name if len(networks) > 1 else "."))
        for name, network in networks.items()
    ]


def _plan(network: OpenNetwork, target: Target, mesh: MeshShape | None, folder: Path) -> Weights:
    if target == "orbax":
        template = abstract_params(network.config)
        tree = engine.to_tree(network.tensors, template, place=lambda _, tensor: tensor)
        chunks = _shard_shapes(network.config, template, mesh) if mesh is not None else None
        return Weights("orbax", folder / PARAMS, network.tensors, tree, {}, chunks)
    if target == "diffusers":
        tensors = network.record.restore(network.tensors, "reference", fp8=False)
        path = folder / weights_stem(network.config)
        return Weights("sharded", path, dict(sorted(tensors.items())), {}, {})
    description = network_of(network.config)
    dialect = description.dialect("bfl")
    table = dialect.table(network.config)
    tensors = engine.from_reference(network.tensors, table)
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
