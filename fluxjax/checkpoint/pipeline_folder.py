"""The diffusers pipeline folder: configurations and weights of a whole pipeline.

model_index.json, one folder per component with config.json and safetensors under PyTorch names
(one file or shards with an index), and fluxjax.json beside with the sampling defaults. JAX is
imported only for weights: options are checked before that.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.checkpoint.component_json import (
    config_json,
    pipeline_class,
    read_config_json,
    write_json,
)
from fluxjax.config import PIPELINES, ConfigError, FluxPipelineConfig, PipelineConfig
from fluxjax.config.base import kinds_of
from fluxjax.config.flux_pipeline import require_flux
from fluxjax.config.sampler import SamplerConfig
from fluxjax.json_input import parse_json, read_json
from fluxjax.networks import Config, network_of

DEFAULTS_FILE = "fluxjax.json"
DEFAULTS_KEY = "sampling_defaults"
"""Of an adapter's metadata: what fluxjax.json is to a folder."""


def weights_stem(config: Config) -> str:
    """diffusers' and transformers' names for the weights file."""
    library = network_of(config).json.library
    return "diffusion_pytorch_model" if library == "diffusers" else "model"


def model_index(config: PipelineConfig, networks: Iterable[str] | None = None) -> dict[str, Any]:
    """model_index.json of a pipeline, or of these networks of it."""
    named = config.networks if networks is None else networks
    forms = {name: (network_of(part).json, part) for name, part in config.networks.items()}
    tokenizers = {
        tokenizer_of(name): ["transformers", network_of(config.networks[name]).tokenizer]
        for name in config.text_encoders
    }
    return {
        "_class_name": config.class_name,
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", config_json(config.scheduler)["_class_name"]],
        **tokenizers,
        **{
            name: [form.library, form.class_name(part)]
            for name, (form, part) in forms.items()
            if name in named
        },
        **{name: getattr(config, name) for name in config.index_fields},
    }


def tokenizer_of(text_encoder: str) -> str:
    """The folder of the tokenizer of what lies in the folder `text_encoder`."""
    return text_encoder.replace("text_encoder", "tokenizer")


def tokenizer_folder(folder: Path, text_encoder: str) -> Path:
    """Where that tokenizer is: in its own folder, or beside the weights, as the text encoders of
    HunyuanVideo lie in Tencent's."""
    own, beside = folder / tokenizer_of(text_encoder), folder / text_encoder
    files = ("tokenizer.json", "vocab.json", "spiece.model")
    return beside if not own.is_dir() and any((beside / f).is_file() for f in files) else own


def require_folder(path: Path) -> None:
    """Raises FileNotFoundError, NotADirectoryError for a single file, which may be a model."""
    if path.is_file():
        raise NotADirectoryError(
            f"{path} is a file, and this takes a folder: `fluxjax convert {path} FOLDER` makes one"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"there is no model folder {path}")


def read_config(folder: Path, **instead: Any) -> PipelineConfig:
    """The configuration of a pipeline folder; `instead`: of networks in place of its own.

    Raises FileNotFoundError naming the missing file, NotADirectoryError for a single file,
    ConfigError for what is of no family of ours.
    """
    folder = Path(folder)
    require_folder(folder)
    _present(folder, "model_index.json")
    cls, index = pipeline_class(folder), read_json(folder / "model_index.json")
    parts: dict[str, Any] = {name: index[name] for name in cls.index_fields if name in index}
    for component in cls.components:
        kinds, optional = kinds_of(cls, component)
        if component in instead:
            parts[component] = instead[component]
        elif optional and index.get(component) in (None, [None, None]):
            parts[component] = None
        else:
            path = _present(folder, f"{component}/config.json")
            parts[component] = read_config_json(kinds, path)
    path = _present(folder, "scheduler/scheduler_config.json")
    parts["scheduler"] = read_config_json(kinds_of(cls, "scheduler")[0], path)
    if (folder / DEFAULTS_FILE).is_file():
        parts |= saved_defaults(read_json(folder / DEFAULTS_FILE), cls)
    place = folder.absolute()
    name = place.parent.parent.name if place.parent.name == "snapshots" else place.name
    try:
        return cls.published(parts, name)
    except ConfigError as error:
        raise ConfigError(f"{folder / DEFAULTS_FILE}: {error}") from None


def assembled(
    parts: Mapping[str, Any], name: str = "", scheduler: SamplerConfig | None = None
) -> PipelineConfig | None:
    """The pipeline that networks of these configurations, by component, make up with its published
    defaults, but for a `scheduler` that is told; of networks that have files of their own some may
    lack. None where there is none."""
    for cls in PIPELINES:
        kinds = {component: kinds_of(cls, component) for component in cls.components}
        if not all(n in kinds and type(part) in kinds[n][0] for n, part in parts.items()):
            continue
        lacking = [n for n, (_, optional) in kinds.items() if n not in parts and not optional]
        apart = all(network_of(part).files for part in parts.values())
        if cls.components[0] in parts and (not lacking or apart):
            absent = {n: None for n, (_, optional) in kinds.items() if optional}
            found = cls.published({**absent, **parts}, name)
            return found if scheduler is None else replace(found, scheduler=scheduler)
    return None


def file_family(parts: Mapping[str, Any]) -> str:
    """Whose files lie beside networks of these configurations, by component, as `open_file` takes
    it; "" where that tells nothing."""
    for cls in PIPELINES:
        kinds = {name: kinds_of(cls, name)[0] for name in cls.components}
        if all(type(part) in kinds.get(name, ()) for name, part in parts.items()):
            return cls.file_family
    return ""


def read_flux(folder: Path) -> FluxPipelineConfig:
    """`read_config` where it must be FLUX.1. Raises ConfigError for another family."""
    return require_flux(read_config(folder), folder)


def write_config(
    folder: Path, config: PipelineConfig, networks: Iterable[str] | None = None
) -> None:
    """Every JSON file but the tokenizers', as diffusers reads them, and fluxjax.json. `networks`:
    whose, by default of all."""
    folder = Path(folder)
    write_json(folder / "model_index.json", model_index(config))
    for component in config.networks if networks is None else networks:
        network = config.networks[component]
        # diffusers computes in float32 unless told, transformers in the stored type: a pipeline
        # opened without a dtype would mix the two.
        values = config_json(network, "float32")
        write_json(folder / component / "config.json", values)
    write_json(folder / "scheduler" / "scheduler_config.json", config_json(config.scheduler))
    write_json(folder / DEFAULTS_FILE, sampling_defaults(config))


def sampling_defaults(config: PipelineConfig) -> dict[str, Any]:
    """Steps, guidance, sizes: what fluxjax.json holds."""
    return {key: getattr(config, key) for key in config.sampling_fields}


def saved_defaults(
    values: Mapping[str, Any], pipeline: type[PipelineConfig] = PipelineConfig
) -> dict[str, Any]:
    """Of what fluxjax.json or an adapter's metadata holds, what the pipeline has."""
    return {key: values[key] for key in pipeline.sampling_fields if key in values}


def adapter_defaults(file: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """How the metadata of an adapter's file say that it is sampled. Raises ConfigError."""
    try:
        return saved_defaults(parse_json(metadata.get(DEFAULTS_KEY, "{}")))
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(f"{file}: {DEFAULTS_KEY} in its metadata is not JSON") from None


def _present(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        files = sorted(p for end in ("safetensors", "gguf") for p in folder.glob(f"*.{end}"))
        alone = f" (its files are given one by one, as --model {files[0]})" if files else ""
        raise FileNotFoundError(f"{folder} is not a whole model folder: {name} is missing{alone}")
    return folder / name


def load_params(
    folder: Path,
    component: str,
    config: Any,
    *,
    stacked: bool,
    dtype: Any = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """One component's parameters as JAX arrays, read one tensor at a time.

    The weights are safetensors or Orbax in the component's folder, or BFL's files beside it.
    `config` is the component's. `dtype` None keeps the stored one. `shardings`: a tree (or one
    sharding for all) into which each leaf is placed; a device then receives only what it holds.
    Raises engine.MappingError listing every tensor that does not fit, ConfigError naming one with
    NaN or infinite values.
    """
    from fluxjax.checkpoint.source import open_component

    network = open_component(Path(folder), component, config)
    return network.params(stacked=stacked, dtype=dtype, shardings=shardings)


def save_params(
    folder: Path, component: str, params: Mapping[str, Any], config: Any, dtype: Any
) -> None:
    """Write one component's weights with PyTorch names, and its config.json.

    `params` stacked or per layer; `dtype` None keeps each leaf's own.
    Raises engine.MappingError if the tree is not that of `config`.
    """
    from fluxjax.checkpoint import engine, tensors
    from fluxjax.checkpoint.sharded import write_sharded
    from fluxjax.checkpoint.source_record import RECORD_FILE
    from fluxjax.checkpoint.templates import abstract_params

    folder = Path(folder) / component
    published = engine.from_tree(params)
    leaves = engine.published_leaves(abstract_params(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    table = network_of(config).dialect("published").table(config)
    published = engine.to_published(published, table, shapes)
    if dtype is not None:
        published = {k: tensors.astype(v, np.dtype(dtype)) for k, v in published.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_FILE).unlink(missing_ok=True)  # of other weights than these
    name = None if dtype is None else np.dtype(dtype).name
    write_json(folder / "config.json", config_json(config, name))
    write_sharded(folder, weights_stem(config), dict(sorted(published.items())))


def share_folder(source: Path, folder: Path, *, link: bool) -> None:
    """A part of another pipeline as `folder`: a relative symbolic link to it, or a copy."""
    if folder.is_symlink():
        folder.unlink()
    if link:
        folder.parent.mkdir(parents=True, exist_ok=True)
        there = os.path.relpath(source, folder.parent)
        folder.symlink_to(there, target_is_directory=True)
    else:
        shutil.copytree(source, folder, dirs_exist_ok=True)
