"""The files of a model that draws, opened: a folder, or one file and what is given beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fluxjax.checkpoint.opened_network import OpenNetwork, scheduler_of
from fluxjax.checkpoint.pipeline_folder import assembled, file_family, read_config
from fluxjax.checkpoint.source import (
    open_beside,
    open_component,
    open_file,
    open_folder,
    open_text_encoder,
)
from fluxjax.checkpoint.weights_location import text_files
from fluxjax.config import PIPELINES, ConfigError, FluxPipelineConfig, PipelineConfig
from fluxjax.config.base import kinds_of
from fluxjax.config.choices import FAMILY_NAMES, FileFamily
from fluxjax.families import Family, family_of
from fluxjax.hub import find
from fluxjax.json_input import read_json
from fluxjax.networks import network_of
from fluxjax.networks.whole_files import WholeFile, whole_file_of


class ModelFiles(NamedTuple):
    """Networks by component; `texts` is the folder where tokenizers are looked for, if any."""

    family: Family
    networks: dict[str, OpenNetwork]
    config: PipelineConfig
    texts: Path | None


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
    path: Path,
    text_encoders: str | Path | None,
    vae: str | Path | None,
    told: FileFamily | None = None,
) -> ModelFiles:
    """Of a transformer (FLUX's, Open-Sora's, HunyuanVideo's, ComfyUI's with what it holds besides),
    a UNet, or a whole Stable Diffusion. Raises FileNotFoundError, ConfigError."""
    if told is not None and told not in FAMILY_NAMES:  # a picture may say anything
        raise ConfigError(f"family must be one of {', '.join(FAMILY_NAMES)}, got {told[:40]!r}")
    family = FAMILY_NAMES[told] if told else _family_beside(text_encoders)
    # First, since it may be no model at all.
    networks: dict[str, OpenNetwork] = dict(open_file(path, family=family))
    whole = whole_file_of(_configs(networks))
    if whole is not None:
        return _of_whole_file(path, whole, networks, text_encoders, vae)
    folder = _texts_folder(text_encoders)
    if folder is None and not {"text_encoder", "text_encoder_2"} <= networks.keys():
        raise ConfigError(
            f"{path} needs text encoders: a folder with text_encoder, "
            "text_encoder_2, tokenizer and tokenizer_2"
        )
    denoiser = networks.get("transformer") or networks.get("unet")
    if denoiser is None:
        raise ConfigError(f"{path} holds no transformer but {', '.join(networks)}")
    if vae is not None:
        networks["vae"] = _open_vae(find(vae, "vae"), networks.get("vae"))
    if "vae" not in networks:
        raise ConfigError(
            f"{path} needs a vae: a diffusers autoencoder's folder or the original file, such as "
            "ae.safetensors"
        )
    beside, files = {}, {}
    if folder is not None:
        patterns = _text_patterns(denoiser, family)
        files = {name: text_files(folder, name, called) for name, called in patterns.items()}
        beside = _text_encoders(folder, patterns, files, networks, family)
    networks |= beside
    config = assembled(_configs(networks), path.name)
    if config is None:
        words = ", ".join(network_of(part).words for part in _configs(networks).values())
        raise ConfigError(f"{path} with what is given beside it is no model that draws: {words}")
    for component, network in beside.items():
        # Of a text encoder the pipeline tells which layer is the last that is read.
        if folder is not None and config.networks[component] != network.config:
            own = config.networks[component]
            alone = files.get(component, [])
            networks[component] = open_text_encoder(folder, component, alone, own, family)
    return ModelFiles(family_of(config.class_name), networks, config, folder)


def _texts_folder(given: str | Path | None) -> Path | None:
    folder = None if given is None else find(given, "text encoders")
    if folder is not None and not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise FileNotFoundError(f"text encoders are a folder, and {folder} {what}")
    return folder


def _text_patterns(denoiser: OpenNetwork, family: str) -> Mapping[str, tuple[str, ...]]:
    """What the files of its text encoders are called, as ComfyUI keeps them beside others'."""
    fits = [c for c in PIPELINES if type(denoiser.config) in kinds_of(c, c.components[0])[0]]
    return next((c for c in fits if c.file_family == family), fits[0]).text_files


def _text_encoders(
    folder: Path,
    patterns: Mapping[str, tuple[str, ...]],
    files: Mapping[str, list[Path]],
    own: Mapping[str, OpenNetwork],
    family: str,
) -> dict[str, OpenNetwork]:
    """Those of a folder, which may lack what the model has of its `own`; where they have no
    `patterns`, as Stable Diffusion's, all that have folders there."""
    folders = sorted(part.name for part in folder.glob("text_encoder*") if part.is_dir())
    found = {}
    for component in patterns or folders:
        try:
            alone = files.get(component, [])
            found[component] = open_text_encoder(folder, component, alone, family=family)
        except FileNotFoundError as error:
            if component in own:
                continue
            if (folder / component).exists():
                raise
            called = " with ".join(patterns[component])
            raise FileNotFoundError(
                f"{folder} has neither a folder {component} nor a file {called}"
            ) from error
    return found


def _family_beside(text_encoders: str | Path | None) -> str:
    """Whose transformer is drawn with these text encoders, where its shapes do not tell it."""
    folder, first = _texts_folder(text_encoders), "text_encoder"
    if folder is None:
        return FluxPipelineConfig.file_family
    own = [c for c in PIPELINES if c.file_family and c.text_files and c is not FluxPipelineConfig]
    files = {c.file_family: len(text_files(folder, first, c.text_files[first])) for c in own}
    if any(files.values()):
        return max(files, key=files.__getitem__)
    try:
        network = open_component(folder, first, family=FluxPipelineConfig.file_family)
    except FileNotFoundError:  # tokenizers alone are enough for some files
        return FluxPipelineConfig.file_family
    return file_family({first: network.config}) or FluxPipelineConfig.file_family


def _of_whole_file(
    path: Path,
    whole: WholeFile,
    networks: dict[str, OpenNetwork],
    text_encoders: str | Path | None,
    vae: str | Path | None,
) -> ModelFiles:
    """Text encoders that it lacks are those of the folder, which may have tokenizers too."""
    folder = _texts_folder(text_encoders)
    if vae is not None:
        networks["vae"] = _open_vae(find(vae, "vae"), networks.get("vae"))
    if folder is not None:
        lacking = whole.parts.keys() - networks.keys()
        found = {component: open_beside(folder, component, whole) for component in lacking}
        networks |= {component: network for component, network in found.items() if network}
    config = assembled(_configs(networks), path.name, scheduler_of(networks))
    if config is None:
        beside = "no folder with them is given" if folder is None else f"so does {folder}"
        raise ConfigError(f"{path} lacks text encoders, and {beside} (--text-encoders)")
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
