"""Networks of FLUX.1's tools that a plan counts beside the pipeline's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fluxjax.checkpoint.component_json import read_config_json
from fluxjax.config import (
    CONTROLS,
    IP_ADAPTER,
    IP_IMAGES,
    REDUX,
    SIGLIP_SO400M,
    UNION,
    UNION_2,
    XLABS,
    CLIPVisionConfig,
    ConfigError,
    ControlNetConfig,
    FluxPipelineConfig,
    IPAdapterConfig,
    ReduxConfig,
    SiglipVisionConfig,
)
from fluxjax.config.flux_pipeline import require_flux
from fluxjax.hub import find

CONTROLNETS = {"union": UNION, "union-2": UNION_2, "xlabs": XLABS}
REDUXES = {"dev": (SIGLIP_SO400M, REDUX)}
IP_ADAPTERS = {"xlabs": IP_ADAPTER, "xlabs-2": IPAdapterConfig(num_tokens=16)}
CLIP = CLIPVisionConfig(with_projection=True)


class Tools(NamedTuple):
    """`redux`: SigLIP and the projector. `ip_adapters`: CLIP's vision encoder and the adapters,
    which see one picture each."""

    controlnets: tuple[ControlNetConfig, ...] = ()
    redux: tuple[SiglipVisionConfig, ReduxConfig] | None = None
    ip_adapters: tuple[CLIPVisionConfig, tuple[IPAdapterConfig, ...]] | None = None


def read_tools(
    config: Any,
    model: str,
    controlnets: tuple[str, ...],
    redux: str | None,
    ip_adapters: tuple[str, ...],
    image_encoder: str | None,
) -> Tools:
    """Of names of published ones, or of folders, of which the configurations do.

    Raises ConfigError, OSError for what is none, or of another model than `config`.
    """
    if not (controlnets or redux or ip_adapters or image_encoder):
        return Tools()
    flux = require_flux(config, model)
    if len(controlnets) > len(CONTROLS):
        raise ConfigError(f"at most {len(CONTROLS)} ControlNets go together")
    if len(ip_adapters) > len(IP_IMAGES):
        raise ConfigError(f"at most {len(IP_IMAGES)} IP-Adapters go together")
    nets = tuple(_controlnet(name, flux) for name in controlnets)
    if image_encoder and not ip_adapters:
        raise ConfigError("an image encoder sees for an IP-Adapter: name one too")
    return Tools(
        nets,
        _redux(redux, flux) if redux else None,
        _ip_adapters(ip_adapters, image_encoder, flux) if ip_adapters else None,
    )


def _controlnet(name: str, config: FluxPipelineConfig) -> ControlNetConfig:
    net = CONTROLNETS.get(name) or _read(name, "", ControlNetConfig, CONTROLNETS)
    net.require_same_model(name, config.transformer)
    return net


def _redux(name: str, config: FluxPipelineConfig) -> tuple[SiglipVisionConfig, ReduxConfig]:
    found = REDUXES.get(name) or (
        _read(name, "image_encoder", SiglipVisionConfig, REDUXES),
        _read(name, "image_embedder", ReduxConfig, REDUXES),
    )
    found[1].require_same_model(name, found[0].hidden_size, config.text_encoder_2.d_model)
    return found


def _ip_adapters(
    names: tuple[str, ...], image_encoder: str | None, config: FluxPipelineConfig
) -> tuple[CLIPVisionConfig, tuple[IPAdapterConfig, ...]]:
    adapters, encoder = tuple(map(_ip_adapter, names)), CLIP
    if image_encoder is not None:
        encoder = _read(image_encoder, "image_encoder", CLIPVisionConfig, {})
    for name, adapter in zip(names, adapters, strict=True):
        seen_by = image_encoder or "CLIP ViT-L/14"
        adapter.require_same_model(name, config.transformer, encoder, seen_by)
    return encoder, adapters


def _ip_adapter(name: str) -> IPAdapterConfig:
    if name in IP_ADAPTERS:
        return IP_ADAPTERS[name]
    # Published without a configuration: its tensors tell.
    from fluxjax.checkpoint.source import open_network

    path = find(name, "checkpoint")
    if not path.exists():
        raise _unknown(name, IP_ADAPTERS)
    return open_network(path, "ip_adapter").config


def _read(name: str, part: str, cls: type, known: Any) -> Any:
    """The configuration in a network's folder, or in `part` of a pipeline's."""
    folder = find(name, "configuration")
    for file in (folder / part / "config.json", folder / "config.json"):
        if file.is_file():
            return read_config_json(cls, Path(file))
    raise _unknown(name, known)


def _unknown(name: str, known: Any) -> ConfigError:
    listed = f" is neither one of {', '.join(known)} nor" if known else " is not"
    return ConfigError(f"{name!r}{listed} a folder here with a config.json")
