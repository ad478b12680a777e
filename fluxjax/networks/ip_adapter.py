"""XLabs' IP-Adapter for FLUX.1, in diffusers' names and in XLabs'."""

from __future__ import annotations

import numpy as np

from fluxjax.config import IPAdapterConfig
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Shapes, count
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table("diffusers FLUX IP-Adapter", identity=True)
_STREAM = "double_blocks.{}.processor.ip_adapter_double_stream"
XLABS = Table(
    "XLabs FLUX IP-Adapter",
    (
        Rule("ip_adapter_proj_model.proj", ("image_proj.proj",)),
        Rule("ip_adapter_proj_model.norm", ("image_proj.norm",)),
        Rule(f"{_STREAM}_k_proj", ("ip_adapter.{}.to_k_ip",)),
        Rule(f"{_STREAM}_v_proj", ("ip_adapter.{}.to_v_ip",)),
    ),
)


def _infer_published(shapes: Shapes, family: str) -> IPAdapterConfig:
    return _infer(shapes, "image_proj", "ip_adapter.0.to_k_ip", r"ip_adapter\.(\d+)\.")


def _infer_xlabs(shapes: Shapes, family: str) -> IPAdapterConfig:
    keys = f"{_STREAM.format(0)}_k_proj"
    return _infer(shapes, "ip_adapter_proj_model", keys, r"double_blocks\.(\d+)\.")


def _infer(shapes: Shapes, projection: str, keys: str, blocks: str) -> IPAdapterConfig:
    rows, embed = shapes[f"{projection}.proj.weight"]
    inner, context = shapes[f"{keys}.weight"]
    return IPAdapterConfig(
        num_layers=count(shapes, blocks),
        inner_dim=inner,
        cross_attention_dim=context,
        image_embed_dim=embed,
        num_tokens=rows // context,
    )


def _inputs(config: IPAdapterConfig) -> Arrays:
    embeds = np.random.default_rng(0).standard_normal((2, config.image_embed_dim))
    return {"image_embeds": embeds.astype(np.float32)}


def _module() -> type:
    from fluxjax.models.ip_adapter import IPAdapter

    return IPAdapter


IP_ADAPTER = Network(
    config=IPAdapterConfig,
    component="ip_adapter",
    words="FLUX IP-Adapter",
    describe=lambda config: (
        f"FLUX.1 IP-Adapter, {config.num_tokens} tokens for {config.num_layers} blocks of width "
        f"{config.inner_dim}"
    ),
    module=_module,
    inputs=_inputs,
    outputs=lambda returned: dict(zip(("keys", "values"), returned, strict=True)),
    # Only files of it are published, without a configuration: the name of the class is ours.
    json=JsonForm("diffusers", ("FluxIPAdapter",)),
    dialects=(
        Dialect(
            "published",
            (r"image_proj\.proj\.weight", r"ip_adapter\.0\.to_k_ip\.weight"),
            lambda config: PUBLISHED,
            _infer_published,
        ),
        Dialect(
            "bfl",
            (r"ip_adapter_proj_model\.proj\.weight", r"double_blocks\.0\.processor\..*"),
            lambda config: XLABS,
            _infer_xlabs,
        ),
    ),
    roles={
        "image_proj/proj": "whole",
        "image_proj/norm": "copied",
        "to_k_ip": "columns",
        "to_v_ip": "columns",
    },
    file_name=lambda config: "ip_adapter.safetensors",
    scanned=("ip_adapter",),
)
