"""ControlNets of FLUX.1: in diffusers' names (InstantX, Shakker) and in XLabs'."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fluxjax.config import ConfigError, ControlNetConfig
from fluxjax.config.latents import PATCH
from fluxjax.networks import flux
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Role, Shapes
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table("diffusers FLUX ControlNet", identity=True)
_OWN = ("controlnet_blocks.{}", "controlnet_single_blocks.{}", "controlnet_mode_embedder")
XLABS = Table(
    "XLabs FLUX ControlNet",
    (
        *(rule for rule in flux.BFL.rules if not rule.theirs.startswith("final_layer")),
        Rule("pos_embed_input", ("controlnet_x_embedder",)),
        *(Rule(name, (name,)) for name in _OWN),
        Rule("input_hint_block.0", ("input_hint_block.conv_in",)),
        *(
            Rule(f"input_hint_block.{2 + 2 * i}", (f"input_hint_block.blocks.{i}",))
            for i in range(6)
        ),
        Rule("input_hint_block.14", ("input_hint_block.conv_out",)),
    ),
)


def _infer_published(shapes: Shapes, family: str) -> ControlNetConfig:
    return _with_control(flux.infer_published(shapes, ""), shapes, "conv_out")


def _infer_xlabs(shapes: Shapes, family: str) -> ControlNetConfig:
    return _with_control(flux.infer_bfl(shapes, ""), shapes, "14")


def _with_control(blocks: Any, shapes: Shapes, last: str) -> ControlNetConfig:
    modes = shapes.get("controlnet_mode_embedder.weight", (0,))[0]
    hints = shapes.get(f"input_hint_block.{last}.weight", (0,))[0]
    fields = {field.name: getattr(blocks, field.name) for field in dataclasses.fields(blocks)}
    return ControlNetConfig(**fields, num_mode=modes, conditioning_embedding_channels=hints)


def _read(values: dict[str, Any]) -> dict[str, Any]:
    # Only pixels are packed by the network itself; latents come packed, and this is not read.
    patch = values.get("patch_size", 1)
    if values.get("conditioning_embedding_channels") and patch != 2:
        raise ConfigError(
            f"patch_size={patch!r} is not supported for a control picture that comes as pixels, "
            "only 2"
        )
    return {**values, "out_channels": values.get("in_channels", 64)}


def _write(config: ControlNetConfig, values: dict[str, Any]) -> dict[str, Any]:
    values = flux.FLUX.json.write(config, values)
    del values["out_channels"]
    for name in ("num_mode", "conditioning_embedding_channels"):
        values[name] = values[name] or None
    return {**values, "patch_size": 2 if config.sees_pixels else 1}


def _inputs(config: ControlNetConfig, rows: int = 6, columns: int = 5) -> Arrays:
    random = np.random.default_rng(1)
    inputs = flux.inputs(config, rows, columns)
    shape = inputs["hidden_states"].shape
    if config.sees_pixels:
        shape = (2, 16 * rows, 16 * columns, 3)
    inputs["controlnet_cond"] = random.uniform(-1, 1, shape).astype(np.float32)
    if config.num_mode:
        inputs["controlnet_mode"] = np.arange(2, dtype=np.int32) % config.num_mode
    return inputs


def _outputs(samples: Any) -> dict[str, Any]:
    return {
        f"{kind} sample {i}": sample
        for kind, group in (("double", samples.double), ("single", samples.single))
        if group is not None
        for i, sample in enumerate(group)
    }


def _describe(config: ControlNetConfig) -> str:
    kind = "union ControlNet" if config.num_mode else "ControlNet"
    seen = ", which sees pixels" if config.sees_pixels else ""
    blocks = f"{config.num_layers} + {config.num_single_layers} blocks"
    return f"FLUX.1 {kind}, {blocks} of width {config.inner_dim}{seen}"


def _module() -> type:
    from fluxjax.models.controlnet import FluxControlNet

    return FluxControlNet


def _flops(config: ControlNetConfig, image_tokens: int, text_tokens: int) -> float:
    """The blocks and embedders, and a linear layer after each block; not the control picture's own
    embedding, which a run computes once."""
    d, ends = config.inner_dim, config.num_layers + config.num_single_layers
    without_end = dataclasses.replace(config, out_channels=1)
    blocks = flux.flops(without_end, image_tokens, text_tokens + bool(config.num_mode))
    end = 2.0 * (image_tokens * d + 2 * d * d)  # of the transformer: final layer and modulation
    return blocks - end + 2.0 * ends * image_tokens * d * d


def _held(config: ControlNetConfig, latents: int, text_tokens: int) -> int:
    """Its samples, which stay while the transformer runs."""
    layers = config.num_layers + config.num_single_layers
    return latents // PATCH**2 * config.inner_dim * layers


_ENDS = ("proj_out", "norm_out/linear")  # of the transformer alone
_ROLES: dict[str, Role] = {
    **{
        name: role
        for name, role in flux.ROLES.items()
        if name not in ("proj_out", "norm_out/linear")
    },
    "controlnet_x_embedder": "whole",
    "controlnet_mode_embedder": "whole",
    "controlnet_blocks": "whole",
    "controlnet_single_blocks": "whole",
    "input_hint_block/conv_in": "convolution",
    "input_hint_block/conv_out": "convolution",
    **dict.fromkeys((f"input_hint_block/blocks_{i}" for i in range(6)), "convolution"),
}

CONTROLNET = Network(
    config=ControlNetConfig,
    component="controlnet",
    words="FLUX ControlNet",
    describe=_describe,
    module=_module,
    inputs=_inputs,
    outputs=_outputs,
    json=JsonForm(
        "diffusers",
        ("FluxControlNetModel",),
        defaults={"num_layers": 19, "num_single_layers": 38, "guidance_embeds": False},
        read=_read,
        write=_write,
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"controlnet_x_embedder\.weight",
                r"time_text_embed\.timestep_embedder\.linear_1\.weight",
            ),
            lambda config: PUBLISHED,
            _infer_published,
        ),
        Dialect(
            "bfl",
            (
                r"pos_embed_input\.weight",
                r"(double|single)_blocks\.0\.(img_attn\.qkv|linear1)\.weight",
            ),
            lambda config: XLABS,
            _infer_xlabs,
        ),
    ),
    roles=_ROLES,
    file_name=lambda config: "controlnet.safetensors",
    scanned=(
        "transformer_blocks",
        "single_transformer_blocks",
        "controlnet_blocks",
        "controlnet_single_blocks",
    ),
    held=_held,
    flops=_flops,
)
