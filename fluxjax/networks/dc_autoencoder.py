"""The deep-compression autoencoder of clips (DC-AE), in Open-Sora's names: there are no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fluxjax.config import ConfigError, DCAutoencoderConfig
from fluxjax.config.dc_autoencoder import DC_AUTOENCODERS
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Role, Shapes, count
from fluxjax.networks.tables import Table

PUBLISHED = Table("deep-compression autoencoder of clips", identity=True)


def _infer(shapes: Shapes, family: str) -> DCAutoencoderConfig:
    first = shapes["encoder.project_in.conv.weight"]
    if len(first) != 5:
        raise ConfigError(
            "this is a deep-compression autoencoder of pictures, as Sana has, which fluxjax cannot "
            "read; those of clips have convolutions of five axes"
        )
    stages = count(shapes, r"encoder\.stages\.(\d+)\.")
    known = {len(config.width_list) for config in DC_AUTOENCODERS.values()}
    if stages not in known:
        raise ConfigError(
            f"which of this autoencoder's {stages} stages halve frames cannot be told from shapes "
            f"(the published ones have {' or '.join(map(str, sorted(known)))}); give its "
            "config.json with --config"
        )

    def blocks(side: str, stage: int) -> int:
        return count(shapes, rf"{side}\.stages\.{stage}\.op_list\.(\d+)\.") - (stage < stages - 1)

    attention = [
        stage
        for stage in range(stages)
        if f"encoder.stages.{stage}.op_list.0.context_module.main.qkv.conv.weight" in shapes
    ]
    downs = [blocks("encoder", stage) for stage in range(stages)]
    wider = [
        shapes[f"encoder.stages.{stage}.op_list.{depth}.main.conv.weight"][0]
        for stage, depth in enumerate(downs[:-1])
    ]
    return DCAutoencoderConfig(
        in_channels=first[1],
        latent_channels=shapes["decoder.project_in.main.conv.weight"][1],
        width_list=(first[0], *wider),
        encoder_depth_list=tuple(downs),
        decoder_depth_list=tuple(blocks("decoder", stage) for stage in range(stages)),
        first_attention_stage=min(attention, default=stages),
    )


def _from_original(values: Mapping[str, Any]) -> DCAutoencoderConfig:
    """Open-Sora's configurations are names, and the scale of the latents where it is given."""
    name = values["model_name"]
    if name not in DC_AUTOENCODERS:
        raise ConfigError(
            f"model_name={str(name)[:60]!r} is no deep-compression autoencoder of clips: those are "
            f"{', '.join(DC_AUTOENCODERS)}"
        )
    config = DC_AUTOENCODERS[name]
    given = values.get("scaling_factor")
    return config if given is None else replace(config, scaling_factor=given)


def _write(config: DCAutoencoderConfig, values: dict[str, Any]) -> dict[str, Any]:
    """With Open-Sora's name, by which its own class opens the folder, where it has one."""
    for name, known in DC_AUTOENCODERS.items():
        if replace(known, scaling_factor=config.scaling_factor) == config:
            return values | {"model_name": name}
    return values


def _inputs(config: DCAutoencoderConfig) -> Arrays:
    random = np.random.default_rng(0)
    t, h, w = 2, 2, 1
    space, time = config.spatial_compression_ratio, config.temporal_compression_ratio
    clip = random.uniform(-1, 1, (1, t * time, h * space, w * space, config.in_channels))
    latents = random.standard_normal((1, t, h, w, config.latent_channels))
    return {"clip": clip.astype(np.float32), "latents": latents.astype(np.float32)}


def _both_ways(module: Any, clip: Any, latents: Any) -> tuple[Any, Any]:
    return module.encode(clip), module.decode(latents)


def _describe(config: DCAutoencoderConfig) -> str:
    time, space = config.temporal_compression_ratio, config.spatial_compression_ratio
    return (
        f"deep-compression autoencoder of clips, {config.latent_channels} latent channels, "
        f"{time} x {space}^2 smaller"
    )


def _module() -> type:
    from fluxjax.models.dc_autoencoder import DCAutoencoder

    return DCAutoencoder


_ROLES: dict[str, Role] = {
    "conv": "convolution_3d",
    "aggreg_0_0": "convolution_3d",
    "aggreg_0_1": "convolution_3d",
    "norm": "copied",
    "project_out/op_list_0": "copied",
}

DC_AUTOENCODER = Network(
    config=DCAutoencoderConfig,
    component="vae",
    words="deep-compression autoencoder of clips",
    describe=_describe,
    module=_module,
    inputs=_inputs,
    outputs=lambda returned: dict(zip(("latents", "decoded"), returned, strict=True)),
    # Open-Sora's class is opened from model.safetensors beside config.json, as transformers' are.
    json=JsonForm("transformers", ("DCAE_HF",), model_types=("dc_ae",), write=_write),
    dialects=(
        Dialect(
            "published",
            (
                r"encoder\.project_in\.conv\.weight",
                r"encoder\.stages\.0\.op_list\.0\.main\.conv1\.conv\.weight",
                r"decoder\.project_in\.main\.conv\.weight",
            ),
            lambda config: PUBLISHED,
            _infer,
            "model_name",
            _from_original,
        ),
    ),
    roles=_ROLES,
    file_name=lambda config: "dc_ae.safetensors",
    method=_both_ways,
)
