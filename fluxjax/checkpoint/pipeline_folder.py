"""The diffusers pipeline folder: configurations and weights of a whole FLUX pipeline.

model_index.json, one folder per component with config.json and safetensors under PyTorch names
(one file or shards with an index), and fluxjax.json beside with the sampling defaults. JAX is
imported only for weights: options are checked before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.checkpoint.component_json import (
    config_json,
    pipeline_class,
    read_config_json,
    write_json,
)
from fluxjax.config import (
    DEV,
    ConfigError,
    FluxConfig,
    PipelineConfig,
    SchedulerConfig,
    published_defaults,
)
from fluxjax.json_input import read_json
from fluxjax.networks import Config, network_of

_DEFAULTS_FILE = "fluxjax.json"
DEFAULTS_KEY = "sampling_defaults"
"""Of an adapter's metadata: what fluxjax.json is to a folder."""
_DEFAULTS = ("max_sequence_length", "steps", "guidance", "width", "height")


def weights_stem(config: Config) -> str:
    """diffusers' and transformers' names for the weights file."""
    library = network_of(config).json.library
    return "diffusion_pytorch_model" if library == "diffusers" else "model"


def model_index(networks: Mapping[str, Config]) -> dict[str, Any]:
    """model_index.json of a FLUX pipeline of these networks, by component."""
    transformer: Any = networks.get("transformer")
    inputs = 1 if transformer is None else transformer.in_channels // transformer.out_channels
    tool = {1: "", 2: "Control"}.get(inputs, "Fill")
    forms = {name: (network_of(config).json, config) for name, config in networks.items()}
    return {
        "_class_name": f"Flux{tool}Pipeline",
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        **{name: [form.library, form.class_name(config)] for name, (form, config) in forms.items()},
    }


def scheduler_of(transformer: FluxConfig) -> dict[str, Any]:
    """scheduler_config.json as published: dev shifts by the number of tokens, schnell does not."""
    dynamic = transformer.guidance_embeds
    scheduler = SchedulerConfig(use_dynamic_shifting=dynamic, shift=3.0 if dynamic else 1.0)
    return config_json(scheduler)


def read_config(folder: Path) -> PipelineConfig:
    """The configuration of a pipeline folder.

    Raises FileNotFoundError naming the missing file, ConfigError for what is not FLUX.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}")
    _present(folder, "model_index.json")
    pipeline_class(folder)
    parts: dict[str, Any] = {
        component: read_config_json(type(config), _present(folder, f"{component}/config.json"))
        for component, config in DEV.networks.items()
    }
    parts["scheduler"] = read_config_json(
        SchedulerConfig, _present(folder, "scheduler/scheduler_config.json")
    )
    if (folder / _DEFAULTS_FILE).is_file():
        parts |= saved_defaults(read_json(folder / _DEFAULTS_FILE))
    else:
        place = folder.absolute()
        name = place.parent.parent.name if place.parent.name == "snapshots" else place.name
        parts |= published_defaults(parts["transformer"], name)
    try:
        return PipelineConfig(**parts)
    except ConfigError as error:
        raise ConfigError(f"{folder / _DEFAULTS_FILE}: {error}") from None


def write_config(folder: Path, config: PipelineConfig) -> None:
    """Every JSON file but the tokenizers', as diffusers reads them, and fluxjax.json."""
    folder = Path(folder)
    write_json(folder / "model_index.json", model_index(config.networks))
    for component, network in config.networks.items():
        # diffusers computes in float32 unless told, transformers in the stored type: a pipeline
        # opened without a dtype would mix the two.
        values = config_json(network, "float32")
        write_json(folder / component / "config.json", values)
    write_json(folder / "scheduler" / "scheduler_config.json", config_json(config.scheduler))
    write_json(folder / _DEFAULTS_FILE, sampling_defaults(config))


def sampling_defaults(config: PipelineConfig) -> dict[str, Any]:
    """Steps, guidance, sizes: what fluxjax.json holds."""
    return {key: getattr(config, key) for key in _DEFAULTS}


def saved_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of what fluxjax.json or an adapter's metadata holds, what is known here."""
    return {key: values[key] for key in _DEFAULTS if key in values}


def _present(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} is not a whole model folder: {name} is missing")
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
