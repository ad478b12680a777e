"""The KL autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from fluxjax.config import AutoencoderConfig, ConfigError
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Role, Shapes, count
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table(
    "diffusers autoencoder",
    # Files older than diffusers 0.18 name the attention of the middle block this way.
    rules=tuple(
        Rule(f"{attention}.{old}", (f"{attention}.{new}",))
        for attention in ("encoder.mid_block.attentions.{}", "decoder.mid_block.attentions.{}")
        for old, new in (
            ("query", "to_q"),
            ("key", "to_k"),
            ("value", "to_v"),
            ("proj_attn", "to_out.0"),
        )
    ),
    identity=True,
)


def bfl(levels: int, convolution: str = "", axes: int = 2) -> Table:
    """BFL's ae.safetensors with `levels` resolutions; its decoder counts levels from the finest.

    `convolution`: what follows the name of one, over `axes` axes, but for the two at the latents.
    """
    resnet = ("norm1", f"conv1{convolution}", "norm2", f"conv2{convolution}")
    inner = f"conv{convolution}"
    rules: list[Rule] = [Rule(name, (name,)) for name in ("quant_conv", "post_quant_conv")]

    def block(theirs: str, ours: str, shortcut: bool = True) -> None:
        rules.extend(Rule(f"{theirs}.{name}", (f"{ours}.{name}",)) for name in resnet)
        if shortcut:
            names = f"nin_shortcut{convolution}", f"conv_shortcut{convolution}"
            rules.append(Rule(f"{theirs}.{names[0]}", (f"{ours}.{names[1]}",)))

    for level in range(levels):
        reverse = levels - 1 - level
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        block(f"encoder.down.{level}.block.{{}}", f"{down}.resnets.{{}}")
        block(f"decoder.up.{reverse}.block.{{}}", f"{up}.resnets.{{}}")
        rules += [
            Rule(f"encoder.down.{level}.downsample.{inner}", (f"{down}.downsamplers.0.{inner}",)),
            Rule(f"decoder.up.{reverse}.upsample.{inner}", (f"{up}.upsamplers.0.{inner}",)),
        ]
    for side in ("encoder", "decoder"):
        mid = f"{side}.mid_block"
        block(f"{side}.mid.block_1", f"{mid}.resnets.0", shortcut=False)
        block(f"{side}.mid.block_2", f"{mid}.resnets.1", shortcut=False)
        rules.append(Rule(f"{side}.mid.attn_1.norm", (f"{mid}.attentions.0.group_norm",)))
        for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            attention = f"{mid}.attentions.0.{ours}"
            rules.append(Rule(f"{side}.mid.attn_1.{theirs}", (attention,), pointwise=axes))
        for end in ("conv_in", "conv_out"):
            rules.append(Rule(f"{side}.{end}{convolution}", (f"{side}.{end}{convolution}",)))
        rules.append(Rule(f"{side}.norm_out", (f"{side}.conv_norm_out",)))
    return Table("BFL autoencoder", tuple(rules))


# Latent channels, scale and shift.
_KNOWN = {
    "FLUX.1": (16, 0.3611, 0.1159),
    "Stable Diffusion 3": (16, 1.5305, 0.0609),
    **dict.fromkeys(
        (
            "Stable Diffusion",
            "Stable Diffusion 2 of 512 pixels",
            "Stable Diffusion 2 of 768 pixels",
        ),
        (4, 0.18215, 0.0),
    ),
    "Stable Diffusion XL": (4, 0.13025, 0.0),
}


def _infer(level: str, block: str, shapes: Shapes, family: str) -> AutoencoderConfig:
    latent = shapes["decoder.conv_in.weight"][1]
    known = _KNOWN.get(family)
    if known is not None and known[0] != latent:
        others = ", as Stable Diffusion's 1, 2 and XL have" if latent == 4 else ""
        raise ConfigError(
            f"this autoencoder has {latent} latent channels{others}; {family} needs its own, of "
            f"{known[0]}"
        )
    if known is None:
        twins = {
            4: " (Stable Diffusion 1 and 2 have 0.18215, XL 0.13025)",
            16: " (FLUX.1 and Stable Diffusion 3 have the same names and shapes, but the scales "
            "0.3611 and 1.5305)",
        }.get(latent, "")
        raise ConfigError(
            f"the scale of this autoencoder's {latent} latent channels cannot be told from "
            f"shapes{twins}; give the network's config.json with --config, or say whose it is with "
            "--family"
        )
    levels = count(shapes, rf"encoder\.{level}\.(\d+)\.")
    return AutoencoderConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=latent,
        block_out_channels=tuple(
            shapes[f"encoder.{level}.{i}.{block}.0.conv1.weight"][0] for i in range(levels)
        ),
        layers_per_block=count(shapes, rf"encoder\.{level}\.0\.{block}\.(\d+)\."),
        scaling_factor=known[1],
        shift_factor=known[2],
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )


def _from_bfl(params: Mapping[str, Any]) -> AutoencoderConfig:
    """BFL's AutoEncoderParams."""
    return AutoencoderConfig(
        in_channels=params["in_channels"],
        out_channels=params["out_ch"],
        latent_channels=params["z_channels"],
        block_out_channels=tuple(params["ch"] * mult for mult in params["ch_mult"]),
        layers_per_block=params["num_res_blocks"],
        scaling_factor=params["scale_factor"],
        shift_factor=params["shift_factor"],
    )


def _write(config: AutoencoderConfig, values: dict[str, Any]) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return values | {
        "act_fn": "silu",
        "force_upcast": True,
        "mid_block_add_attention": True,
        "sample_size": 1024,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _inputs(config: AutoencoderConfig) -> Arrays:
    random = np.random.default_rng(0)
    h, w = 8, 12
    image = random.uniform(-1, 1, (2, h * config.scale, w * config.scale, config.in_channels))
    latents = random.standard_normal((2, h, w, config.latent_channels))
    return {"image": image.astype(np.float32), "latents": latents.astype(np.float32)}


def _both_ways(module: Any, image: Any, latents: Any) -> tuple[Any, Any, Any]:
    posterior = module.encode(image)
    return posterior.mean, posterior.logvar, module.decode(latents)


def _describe(config: AutoencoderConfig) -> str:
    of = {
        0.3611: "FLUX autoencoder",
        1.5305: "Stable Diffusion 3's autoencoder",
        0.18215: "Stable Diffusion's autoencoder",
        0.13025: "Stable Diffusion XL's autoencoder",
    }.get(config.scaling_factor, "KL autoencoder")
    return f"{of}, {config.latent_channels} latent channels"


def _module() -> type:
    from fluxjax.models.autoencoder import Autoencoder

    return Autoencoder


SMALL_ROLES: dict[str, Role] = {
    "norm1": "copied",
    "norm2": "copied",
    "group_norm": "copied",
    "conv_norm_out": "copied",
    # One head in the middle, which cannot be shared out.
    **{f"attentions_0/to_{name}": "whole" for name in ("q", "k", "v", "out_0")},
}
"""Of all but the convolutions."""
_ROLES: dict[str, Role] = {
    **SMALL_ROLES,
    "conv": "convolution",
    "conv1": "convolution",
    "conv2": "convolution",
    "conv_in": "convolution",
    "conv_out": "convolution",
    "conv_shortcut": "convolution",
    "quant_conv": "convolution",
    "post_quant_conv": "convolution",
}

AUTOENCODER = Network(
    config=AutoencoderConfig,
    component="vae",
    words="autoencoder",
    describe=_describe,
    module=_module,
    inputs=_inputs,
    outputs=lambda returned: dict(zip(("mean", "logvar", "decoded"), returned, strict=True)),
    json=JsonForm(
        "diffusers",
        ("AutoencoderKL",),
        defaults={
            "block_out_channels": [64],
            "layers_per_block": 1,
            "latent_channels": 4,
            "scaling_factor": 0.18215,
            "shift_factor": 0.0,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
        },
        # Means and deviations of each channel: Playground's autoencoders, in XL's pipelines.
        required={
            "act_fn": "silu",
            "mid_block_add_attention": True,
            "latents_mean": None,
            "latents_std": None,
        },
        unread={"sample_size": int, "force_upcast": bool},
        write=_write,
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"encoder\.down_blocks\.0\.resnets\.0\.norm1\.weight",
                r"encoder\.conv_in\.weight",
                r"decoder\.conv_in\.weight",
            ),
            lambda config: PUBLISHED,
            partial(_infer, "down_blocks", "resnets"),
        ),
        Dialect(
            "bfl",
            (
                r"encoder\.down\.0\.block\.0\.norm1\.weight",
                r"encoder\.conv_in\.weight",
                r"decoder\.conv_in\.weight",
            ),
            lambda config: bfl(len(config.block_out_channels)),
            partial(_infer, "down", "block"),
            "ch_mult",
            _from_bfl,
        ),
    ),
    roles=_ROLES,
    prefixes=("first_stage_model.", "vae."),
    files="ae.safetensors",
    file_name=lambda config: "ae.safetensors",
    method=_both_ways,
)
