"""The diffusers pipeline folder: configurations and weights of a whole FLUX pipeline.

model_index.json, one folder per component with config.json and safetensors under PyTorch names
(one file or shards with an index), and fluxjax.json beside with the sampling defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from fluxjax.checkpoint import engine, tables, tensors
from fluxjax.checkpoint.component_json import (
    config_json,
    read_config_json,
    read_json,
    write_json,
)
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.sharded import write_sharded
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    ConfigError,
    FluxConfig,
    PipelineConfig,
    SchedulerConfig,
    T5Config,
)

Component = Literal["transformer", "vae", "text_encoder", "text_encoder_2"]
COMPONENTS: dict[str, type] = {
    "transformer": FluxConfig,
    "vae": AutoencoderConfig,
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": T5Config,
}
COMPONENT_TABLES = {
    "transformer": tables.FLUX,
    "vae": tables.VAE,
    "text_encoder": tables.CLIP_TEXT,
    "text_encoder_2": tables.T5,
}
_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_DEFAULTS_FILE = "fluxjax.json"
_DEFAULTS = ("max_sequence_length", "steps", "guidance", "width", "height")


def weights_stem(component: str) -> str:
    """diffusers' and transformers' names for the weights file."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def read_config(folder: Path) -> PipelineConfig:
    """The configuration of a pipeline folder.

    Raises FileNotFoundError naming the missing file, ConfigError for what is not FLUX.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}")
    index = read_json(_present(folder, "model_index.json"))
    name = str(index.get("_class_name", ""))
    if not name.startswith("Flux"):
        raise ConfigError(f"{folder} holds a {name or 'nameless pipeline'}, not a FLUX pipeline")
    parts: dict[str, Any] = {
        component: read_config_json(cls, _present(folder, f"{component}/config.json"))
        for component, cls in COMPONENTS.items()
    }
    parts["scheduler"] = read_config_json(
        SchedulerConfig, _present(folder, "scheduler/scheduler_config.json")
    )
    if (folder / _DEFAULTS_FILE).is_file():
        saved = read_json(folder / _DEFAULTS_FILE)
        parts |= {key: saved[key] for key in _DEFAULTS if key in saved}
    elif not parts["transformer"].guidance_embeds:  # schnell's published defaults
        parts |= {"max_sequence_length": 256, "steps": 4, "guidance": 0.0}
    elif parts["transformer"].in_channels == 384:  # Fill's
        parts |= {"steps": 50, "guidance": 30.0}
    return PipelineConfig(**parts)


def write_config(folder: Path, config: PipelineConfig) -> None:
    """Every JSON file but the tokenizers', as diffusers reads them, and fluxjax.json."""
    folder = Path(folder)
    write_json(folder / "model_index.json", _INDEX)
    for component in COMPONENTS:
        write_json(folder / component / "config.json", config_json(getattr(config, component)))
    write_json(folder / "scheduler" / "scheduler_config.json", config_json(config.scheduler))
    defaults = dataclasses.asdict(config)
    write_json(folder / _DEFAULTS_FILE, {key: defaults[key] for key in _DEFAULTS})


def _present(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} is not a whole model folder: {name} is missing")
    return folder / name


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Lazy tensors of one component's safetensors: an index and its shards, or the one file.

    Raises FileNotFoundError for missing files, ValueError for an index that does not agree
    with its shards or names a file outside the folder, and for pickles.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1 or (not indices and len(files) > 1):
        names = ", ".join(path.name for path in indices or files)
        raise ValueError(f"{folder} holds several sets of weights, keep one of: {names}")
    if not indices:
        if files:
            return read_safetensors(files[0])[0]
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
        if pickles:
            raise ValueError(pickle_refusal(folder / pickles[0]))
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    weight_map = read_json(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{indices[0]} has no weight_map")
    shards: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{indices[0]} names {name!r}, which is no file of its own folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its index names")
        shards[name] = read_safetensors(folder / name)[0]
    held = {key: name for name, shard in shards.items() for key in shard}
    if held != weight_map:
        wrong = sorted(held.items() ^ weight_map.items())[0][0]
        raise ValueError(f"{indices[0]} and its shards disagree, first about {wrong!r}")
    return {key: shards[name][key] for key, name in weight_map.items()}


PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def pickle_refusal(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is opened, so it is refused: "
        "use the .safetensors file of the same model, or save one with safetensors.torch.save_file"
    )


def load_params(
    folder: Path,
    component: Component,
    config: Any,
    *,
    stacked: bool,
    dtype: Any = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """One component's parameters as JAX arrays, read one tensor at a time.

    `config` is the component's. `dtype` None keeps the stored one. `shardings`: a tree (or one
    sharding for all) into which each leaf is placed; a device then reads only what it holds.
    Raises engine.MappingError listing every tensor that does not fit.
    """
    source = read_weights(Path(folder) / component)
    template = abstract_params(config, stacked=stacked)
    return load_tree(
        source, COMPONENT_TABLES[component], template, dtype=dtype, shardings=shardings
    )


def load_tree(
    source: Mapping[str, Tensor], table: tables.Table, template: Mapping[str, Any], *,
    dtype: Any = None, shardings: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """`engine.to_ours` onto devices. A stacked leaf is filled one layer at a time."""
    flat = engine.flatten(shardings) if isinstance(shardings, Mapping) else None

    def place(path: tuple[str, ...], tensor: Tensor) -> jax.Array:
        sharding = flat[path] if flat is not None else shardings
        if sharding is None:
            return jax.numpy.asarray(np.ascontiguousarray(tensor.read()))
        if sharding.is_fully_replicated:
            return jax.device_put(np.ascontiguousarray(tensor.read()), sharding)
        return jax.make_array_from_callback(
            tensor.shape, sharding, lambda where: _read_slices(tensor, where)
        )

    return engine.to_ours(source, table, template, dtype=dtype, place=place)


def _read_slices(tensor: Tensor, where: tuple[slice, ...]) -> np.ndarray:
    if not where:
        return tensor.read()
    start, stop, _ = where[0].indices(tensor.shape[0])
    if len(where) < 3 or stop - start <= 1:
        return np.ascontiguousarray(tensor.rows(start, stop)[(slice(None), *where[1:])])
    # A stacked leaf: layer by layer, so that no more than one is held beside the result.
    return np.stack([tensor.rows(i, i + 1)[(0, *where[1:])] for i in range(start, stop)])


def save_params(
    folder: Path, component: Component, params: Mapping[str, Any], config: Any, dtype: Any
) -> None:
    """Write one component's weights with PyTorch names, and its config.json.

    `params` stacked or per layer; `dtype` None keeps each leaf's own.
    Raises engine.MappingError if the tree is not that of `config`.
    """
    folder = Path(folder) / component
    reference = engine.from_tree(params)
    leaves = engine.reference_leaves(abstract_params(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    table = COMPONENT_TABLES[component]
    reference = engine.to_reference(reference, table, shapes)
    if dtype is not None:
        reference = {k: tensors.astype(v, np.dtype(dtype)) for k, v in reference.items()}
    folder.mkdir(parents=True, exist_ok=True)
    name = None if dtype is None else np.dtype(dtype).name
    write_json(folder / "config.json", config_json(config, name))
    write_sharded(folder, weights_stem(component), dict(sorted(reference.items())))
