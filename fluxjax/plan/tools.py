"""Networks of FLUX.1's tools that a plan counts beside the pipeline's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fluxjax.checkpoint.component_json import read_config_json
from fluxjax.config import (
    CONTROLS,
    IP_ADAPTER,
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
    """`redux`: SigLIP and the projector. `ip_adapter`: CLIP's vision encoder and the adapter, which
    see one picture."""

    controlnets: tuple[ControlNetConfig, ...] = ()
    redux: tuple[SiglipVisionConfig, ReduxConfig] | None = None
    ip_adapter: tuple[CLIPVisionConfig, IPAdapterConfig] | None = None


def read_tools(
    config: Any,
    model: str,
    controlnets: tuple[str, ...],
    redux: str | None,
    ip_adapter: str | None,
    image_encoder: str | None,
) -> Tools:
    """Of names of published ones, or of folders, of which the configurations do.

    Raises ConfigError, OSError for what is none, or of another model than `config`.
    """
    if not (controlnets or redux or ip_adapter or image_encoder):
        return Tools()
    flux = require_flux(config, model)
    if len(controlnets) > len(CONTROLS):
        raise ConfigError(f"at most {len(CONTROLS)} ControlNets go together")
    nets = tuple(_controlnet(name, flux) for name in controlnets)
    if image_encoder and not ip_adapter:
        raise ConfigError("an image encoder sees for an IP-Adapter: name one too")
    return Tools(
        nets,
        _redux(redux, flux) if redux else None,
        _ip_adapter(ip_adapter, image_encoder, flux) if ip_adapter else None,
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


def _ip_adapter(
    name: str, image_encoder: str | None, config: FluxPipelineConfig
) -> tuple[CLIPVisionConfig, IPAdapterConfig]:
    adapter = IP_ADAPTERS.get(name)
    if adapter is None:
        # Published without a configuration: its tensors tell.
        from fluxjax.checkpoint.source import open_network

        path = find(name, "checkpoint")
        if not path.exists():
            raise _unknown(name, IP_ADAPTERS)
        adapter = open_network(path, "ip_adapter").config
    encoder = CLIP
    if image_encoder is not None:
        encoder = _read(image_encoder, "image_encoder", CLIPVisionConfig, {})
    adapter.require_same_model(name, config.transformer, encoder, image_encoder or "CLIP ViT-L/14")
    return encoder, adapter


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
