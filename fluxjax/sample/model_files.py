"""The files of a model that draws, opened: a folder, or one file and what is given beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fluxjax.checkpoint.opened_network import OpenNetwork, scheduler_of
from fluxjax.checkpoint.pipeline_folder import assembled, file_family, read_config
from fluxjax.checkpoint.source import open_component, open_file, open_folder
from fluxjax.config import ConfigError, FluxPipelineConfig, PipelineConfig
from fluxjax.families import Family, family_of
from fluxjax.hub import find
from fluxjax.json_input import read_json
from fluxjax.networks import network_of
from fluxjax.networks.whole_files import whole_file_of

_TEXT_COMPONENTS: tuple[str, ...] = ("text_encoder", "text_encoder_2")


class ModelFiles(NamedTuple):
    """Networks by component; `tokenizers` is the folder of those of the text encoders."""

    family: Family
    networks: dict[str, OpenNetwork]
    config: PipelineConfig
    tokenizers: Path


def open_model_folder(path: Path, vae: str | Path | None = None) -> ModelFiles:
    """Of diffusers, or Orbax, with another autoencoder than its own where one is given. Raises
    FileNotFoundError, ConfigError."""
    config = read_config(path)
    family = family_of(read_json(path / "model_index.json")["_class_name"])
    networks = {name: open_component(path, name, part) for name, part in config.networks.items()}
    if vae is not None:
        other = _open_vae(find(vae, "vae"), networks["vae"])
        config = read_config(path, vae=other.config)
        networks["vae"] = replace(other, config=config.vae)
    # The tensors may tell more than config.json does.
    parts: dict[str, Any] = {name: network.config for name, network in networks.items()}
    return ModelFiles(family, networks, replace(config, **parts), path)


def open_model_file(
    path: Path, text_encoders: str | Path | None, vae: str | Path | None
) -> ModelFiles:
    """Of a transformer (FLUX's, Open-Sora's, HunyuanVideo's, ComfyUI's with what it holds besides)
    or a whole Stable Diffusion. Raises FileNotFoundError, ConfigError."""
    family = _family_beside(text_encoders)
    # First, since it may be no model at all.
    networks: dict[str, OpenNetwork] = dict(open_file(path, family=family))
    if whole_file_of(_configs(networks)) is not None:
        return _of_whole_file(path, networks, text_encoders, vae)
    if text_encoders is None:
        raise ConfigError(
            f"{path} needs text encoders: a folder with text_encoder, "
            "text_encoder_2, tokenizer and tokenizer_2"
        )
    folder = find(text_encoders, "text encoders")
    if "transformer" not in networks:
        raise ConfigError(f"{path} holds no transformer but {', '.join(networks)}")
    if vae is not None:
        networks["vae"] = _open_vae(find(vae, "vae"), networks.get("vae"))
    if "vae" not in networks:
        raise ConfigError(
            f"{path} needs a vae: a diffusers autoencoder's folder or the original file, such as "
            "ae.safetensors"
        )
    for component in _TEXT_COMPONENTS:
        networks[component] = open_component(folder, component, family=family)
    config = assembled(_configs(networks), path.name)
    if config is None:
        words = ", ".join(network_of(part).words for part in _configs(networks).values())
        raise ConfigError(f"{path} with what is given beside it is no model that draws: {words}")
    for component in _TEXT_COMPONENTS:
        # Of a text encoder the pipeline tells which layer is the last that is read.
        if config.networks[component] != networks[component].config:
            networks[component] = open_component(folder, component, config.networks[component])
    return ModelFiles(family_of(config.class_name), networks, config, folder)


def _family_beside(text_encoders: str | Path | None) -> str:
    """Whose transformer is drawn with these text encoders, where its shapes do not tell it."""
    if text_encoders is None:
        return FluxPipelineConfig.file_family
    folder, first = find(text_encoders, "text encoders"), _TEXT_COMPONENTS[0]
    try:
        network = open_component(folder, first, family=FluxPipelineConfig.file_family)
    except FileNotFoundError:  # tokenizers alone are enough for some files
        return FluxPipelineConfig.file_family
    return file_family({first: network.config}) or FluxPipelineConfig.file_family


def _of_whole_file(
    path: Path,
    networks: dict[str, OpenNetwork],
    text_encoders: str | Path | None,
    vae: str | Path | None,
) -> ModelFiles:
    """Text encoders that it lacks are those of the folder of its tokenizers."""
    if text_encoders is None:
        raise ConfigError(
            f"{path} has no tokenizers: give a folder with its tokenizer (tokenizer_2, ...) as "
            "text encoders (--text-encoders)"
        )
    folder = find(text_encoders, "text encoders")
    if vae is not None:
        networks["vae"] = _open_vae(find(vae, "vae"), networks.get("vae"))
    config = assembled(_configs(networks), path.name, scheduler_of(networks))
    if config is None:
        for component in (*_TEXT_COMPONENTS, "text_encoder_3"):
            if component not in networks and (folder / component).is_dir():
                networks[component] = open_component(folder, component)
        config = assembled(_configs(networks), path.name, scheduler_of(networks))
    if config is None:
        raise ConfigError(f"{path} lacks text encoders, and so does {folder}")
    return ModelFiles(family_of(config.class_name), networks, config, folder)


def _configs(networks: dict[str, OpenNetwork]) -> dict[str, Any]:
    return {name: network.config for name, network in networks.items()}


def _open_vae(path: Path, own: OpenNetwork | None) -> OpenNetwork:
    """A file has the scale of the model's `own`, or FLUX's; a folder says its own."""
    if path.is_file():
        networks = open_file(path, own and own.config, component="vae", family="FLUX.1")
        if "vae" not in networks:
            raise ConfigError(f"{path} holds no autoencoder but {', '.join(networks)}")
        found = networks["vae"]
    elif (path / "vae").is_dir():
        found = open_component(path, "vae")
    else:
        found = open_folder(path, "vae", family="FLUX.1")
    if own is not None and _latents(found.config) != _latents(own.config):
        raise ConfigError(
            f"{path} has another autoencoder than this model needs: {_latents(found.config)}; "
            f"needed: {_latents(own.config)}"
        )
    return found


def _latents(config: Any) -> str:
    words = network_of(config).words
    return f"{words}, {config.latent_channels} latent channels at 1 / {config.scale} of the size"
