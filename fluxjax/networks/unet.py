"""The UNet of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.config.unet import UNetConfig
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Role, Shapes, count
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table("diffusers UNet", identity=True)
LEAST_OLD_SIZE = 64
"""Latents of a side, of models that a diffusers before 0.9 saved."""
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_BLOCK = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1",
    "norm2",
    "norm3",
)


def ldm(config: UNetConfig) -> Table:
    """CompVis' and Stability's names."""
    down = [kind == "CrossAttnDownBlock2D" for kind in config.down_block_types]
    up = [kind == "CrossAttnUpBlock2D" for kind in config.up_block_types]
    return Table("ldm UNet", _ldm_rules(config.layers_per_block, down, up))


def _adapter_rules(shapes: Shapes) -> tuple[Rule, ...]:
    """Adapters may have these names too."""
    layers = count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")
    down, up = (
        [f"{name}.{i}.attentions.0.norm.weight" in shapes for i in range(_levels(shapes))]
        for name in ("down_blocks", "up_blocks")
    )
    return _ldm_rules(layers, down, up)


def _levels(shapes: Shapes) -> int:
    return count(shapes, r"down_blocks\.(\d+)\.")


def _ldm_rules(layers: int, down: list[bool], up: list[bool]) -> tuple[Rule, ...]:
    """Blocks are counted through, with what ends a resolution; `down` and `up`: which resolutions
    have attention."""
    rules = [
        Rule(theirs, (ours,))
        for theirs, ours in (
            ("time_embed.0", "time_embedding.linear_1"),
            ("time_embed.2", "time_embedding.linear_2"),
            ("time_embed.cond_proj", "time_embedding.cond_proj"),
            ("label_emb.0.0", "add_embedding.linear_1"),
            ("label_emb.0.2", "add_embedding.linear_2"),
            ("input_blocks.0.0", "conv_in"),
            ("out.0", "conv_norm_out"),
            ("out.2", "conv_out"),
        )
    ]

    def resnet(theirs: str, ours: str) -> None:
        rules.extend(Rule(f"{theirs}.{a}", (f"{ours}.{b}",)) for a, b in _RESNET)

    def transformer(theirs: str, ours: str) -> None:
        names = ("norm", "proj_in", "proj_out", *(f"transformer_blocks.{{}}.{n}" for n in _BLOCK))
        rules.extend(Rule(f"{theirs}.{name}", (f"{ours}.{name}",)) for name in names)

    for i, attends in enumerate(down):
        for j in range(layers):
            theirs = f"input_blocks.{1 + (layers + 1) * i + j}"
            resnet(f"{theirs}.0", f"down_blocks.{i}.resnets.{j}")
            if attends:
                transformer(f"{theirs}.1", f"down_blocks.{i}.attentions.{j}")
        theirs = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
        rules.append(Rule(theirs, (f"down_blocks.{i}.downsamplers.0.conv",)))
    for i, attends in enumerate(up):
        for j in range(layers + 1):
            theirs = f"output_blocks.{(layers + 1) * i + j}"
            resnet(f"{theirs}.0", f"up_blocks.{i}.resnets.{j}")
            if attends:
                transformer(f"{theirs}.1", f"up_blocks.{i}.attentions.{j}")
        theirs = f"output_blocks.{(layers + 1) * i + layers}.{2 if attends else 1}.conv"
        rules.append(Rule(theirs, (f"up_blocks.{i}.upsamplers.0.conv",)))
    resnet("middle_block.0", "mid_block.resnets.0")
    transformer("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    return tuple(rules)


def _infer_published(shapes: Shapes, family: str) -> UNetConfig:
    levels = _levels(shapes)
    layers = count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")
    return _infer(
        shapes,
        ends=("conv_in", "conv_out", "add_embedding.linear_1", "time_embedding.cond_proj"),
        widths=[shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        layers=layers,
        down=[f"down_blocks.{i}.attentions.0" for i in range(levels)],
        up=[f"up_blocks.{i}.attentions.0" for i in range(levels)],
        middle="mid_block.attentions.0",
    )


def _infer_ldm(shapes: Shapes, family: str) -> UNetConfig:
    # A convolution ends each resolution but the last.
    ends = [i for i in range(1, 99) if f"input_blocks.{i}.0.op.weight" in shapes]
    blocks = count(shapes, r"input_blocks\.(\d+)\.")
    levels = len(ends) + 1
    layers = (ends[0] if ends else blocks) - 1
    first = [1 + (layers + 1) * i for i in range(levels)]
    return _infer(
        shapes,
        ends=("input_blocks.0.0", "out.2", "label_emb.0.0", "time_embed.cond_proj"),
        widths=[shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0] for i in first],
        layers=layers,
        down=[f"input_blocks.{i}.1" for i in first],
        up=[f"output_blocks.{(layers + 1) * i}.1" for i in range(levels)],
        middle="middle_block.1",
    )


def _infer(
    shapes: Shapes,
    *,
    ends: tuple[str, ...],
    widths: list[int],
    layers: int,
    down: list[str],
    up: list[str],
    middle: str,
) -> UNetConfig:
    first, last, added, told = (f"{name}.weight" for name in ends)
    text = shapes[f"{middle}.transformer_blocks.0.attn2.to_k.weight"][1]
    linear = len(shapes[f"{middle}.proj_in.weight"]) == 2
    depths = [
        count(shapes, rf"{name.replace('.', chr(92) + '.')}\.transformer_blocks\.(\d+)\.")
        for name in (*down, middle)
    ]
    # A resolution without transformers has no depth of its own: published files repeat that of the
    # others, or where these differ say 1.
    same = set(depths) - {0}
    found = [depth or (min(same) if len(same) == 1 else 1) for depth in depths[:-1]]
    found[-1] = depths[-1]
    if (not linear and widths[0] % 8) or (linear and any(width % 64 for width in widths)):
        raise ConfigError(
            f"the heads of a UNet of widths {widths} cannot be told from shapes (published ones "
            "have 8, or heads of 64 channels); give the network's config.json with --config"
        )
    heads = [width // 64 if linear else 8 for width in widths]
    sizes = {768: 64, 1024: 96}.get(text, 128)
    return UNetConfig(
        sample_size=sizes if shapes[first][1] == 4 or sizes == 128 else 64,
        in_channels=shapes[first][1],
        out_channels=shapes[last][0],
        block_out_channels=tuple(widths),
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if f"{name}.norm.weight" in shapes else "DownBlock2D"
            for name in down
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if f"{name}.norm.weight" in shapes else "UpBlock2D" for name in up
        ),
        layers_per_block=layers,
        transformer_layers_per_block=tuple(found),
        attention_head_dim=tuple(heads),
        cross_attention_dim=text,
        use_linear_projection=linear,
        addition_embed_type="text_time" if added in shapes else None,
        projection_class_embeddings_input_dim=shapes.get(added, (0, 2816))[1],
        time_cond_proj_dim=shapes[told][1] if told in shapes else None,
    )


def _read(values: dict[str, Any]) -> dict[str, Any]:
    widths = values.get("block_out_channels")
    levels = len(widths) if isinstance(widths, list | tuple) else 4

    def each(name: str) -> list[Any]:
        value = values.get(name)
        return list(value) if isinstance(value, list | tuple) else [value] * levels

    found = {
        **values,
        "attention_head_dim": each("attention_head_dim"),
        "transformer_layers_per_block": each("transformer_layers_per_block"),
    }
    # diffusers' pipelines say that a smaller size in so old a file is an error of its writer.
    old = re.match(r"0\.[0-8]\.", str(values.get("_diffusers_version")))
    size = values.get("sample_size")
    if old and isinstance(size, int) and size < LEAST_OLD_SIZE:
        found["sample_size"] = LEAST_OLD_SIZE
    layers = values.get("layers_per_block")
    if isinstance(layers, list | tuple) and len(set(layers)) == 1:
        found["layers_per_block"] = layers[0]
    return found


def _write(config: UNetConfig, values: dict[str, Any]) -> dict[str, Any]:
    values = {
        **values,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
    }
    if config.addition_embed_type is None:
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            values[name] = None
    return values


def _inputs(config: UNetConfig) -> Arrays:
    # Sides that do not halve without rest: what is doubled on the way up must be cut.
    random, rows = np.random.default_rng(0), 2
    inputs = {
        "sample": random.standard_normal((rows, 12, 18, config.in_channels)),
        # Exact in bfloat16.
        "timestep": np.array([961.0, 81.0]) - 1,
        "encoder_hidden_states": random.standard_normal((rows, 7, config.cross_attention_dim)),
    }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = random.standard_normal((rows, config.time_cond_proj_dim))
    if config.addition_embed_type is not None:
        joined = config.projection_class_embeddings_input_dim
        # Six sizes, or five where what is left would be no width of a text encoder.
        ids = 6 if (joined - 6 * config.addition_time_embed_dim) % 64 == 0 else 5
        ids = 5 if joined == 2560 and config.addition_time_embed_dim == 256 else ids
        pooled = joined - ids * config.addition_time_embed_dim
        inputs["text_embeds"] = random.standard_normal((rows, pooled))
        inputs["time_ids"] = random.integers(0, 128, (rows, ids)) * 8
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def _module() -> type:
    from fluxjax.models.unet import UNet

    return UNet


def model_name(config: UNetConfig) -> str:
    """Which Stable Diffusion it is of, by the width of the text."""
    known = {
        768: "Stable Diffusion 1",
        1024: "Stable Diffusion 2",
        2048: "Stable Diffusion XL",
        1280: "Stable Diffusion XL's refiner",
    }
    return known.get(config.cross_attention_dim, "Stable Diffusion")


_ROLES: dict[str, Role] = {
    "conv_in": "convolution",
    "conv_out": "convolution",
    "conv1": "convolution",
    "conv2": "convolution",
    "conv_shortcut": "convolution",
    "conv": "convolution",
    "linear_1": "whole",
    "linear_2": "whole",
    "cond_proj": "whole",
    "time_emb_proj": "whole",
    # Convolutions in 1.x, linear in the others: a thirtieth of the weights.
    "proj_in": "copied",
    "proj_out": "copied",
    "to_q": "whole",
    "to_k": "whole",
    "to_v": "whole",
    "to_out_0": "whole",
    "net_0/proj": "whole",
    "net_2": "whole",
    "norm": "copied",
    "norm1": "copied",
    "norm2": "copied",
    "norm3": "copied",
    "conv_norm_out": "copied",
}


def _held(config: UNetConfig, latents: int, text_tokens: int) -> int:
    """Of one resolution: in an MLP its input and eight widths, or, where there is none, in the last
    residual block what was skipped beside what comes, and what they become."""
    kinds = zip(config.block_out_channels, config.down_block_types, strict=True)
    return max(
        (9 if kind == "CrossAttnDownBlock2D" else 3) * width * latents // 4**level
        for level, (width, kind) in enumerate(kinds)
    )


UNET = Network(
    config=UNetConfig,
    component="unet",
    words="UNet",
    describe=lambda config: (
        f"{model_name(config)}'s UNet{', inpainting' if config.in_channels == 9 else ''}, "
        f"{len(config.block_out_channels)} resolutions from {config.block_out_channels[0]} channels"
    ),
    module=_module,
    inputs=_inputs,
    outputs=lambda sample: {"sample": sample},
    json=JsonForm(
        "diffusers",
        ("UNet2DConditionModel",),
        defaults={
            "cross_attention_dim": 1280,
            "attention_head_dim": 8,
            "transformer_layers_per_block": 1,
        },
        required={
            "act_fn": "silu",
            "center_input_sample": False,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "only_cross_attention": False,
            "dual_cross_attention": False,
            "class_embed_type": None,
            "num_class_embeds": None,
            "encoder_hid_dim": None,
            "encoder_hid_dim_type": None,
            "num_attention_heads": None,
            "resnet_time_scale_shift": "default",
            "resnet_skip_time_act": False,
            "resnet_out_scale_factor": 1.0,
            "time_embedding_type": "positional",
            "time_embedding_dim": None,
            "time_embedding_act_fn": None,
            "timestep_post_act": None,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "class_embeddings_concat": False,
            "mid_block_only_cross_attention": None,
            "cross_attention_norm": None,
            "attention_type": "default",
            "reverse_transformer_layers_per_block": None,
        },
        read=_read,
        write=_write,
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"time_embedding\.linear_1\.weight",
                r"down_blocks\.0\.resnets\.0\.time_emb_proj\.weight",
                r"up_blocks\.0\.resnets\.0\.conv1\.weight",
            ),
            lambda config: PUBLISHED,
            _infer_published,
        ),
        Dialect(
            "bfl",
            (r"input_blocks\.0\.0\.weight", r"output_blocks\.0\.0\.in_layers\.0\.weight"),
            ldm,
            _infer_ldm,
        ),
    ),
    roles=_ROLES,
    held=_held,
    file_name=lambda config: "unet.safetensors",
    gguf_architecture=lambda config: "sdxl" if config.addition_embed_type else "sd1",
    quantised=r".*\.transformer_blocks\.\d+\.(attn|ff).*\.weight",
    adapter_prefixes=(
        "model.diffusion_model.",
        "diffusion_model.",
        "base_model.model.",
        "unet.",
        "lora_unet_",
        "lycoris_",
        "",
    ),
    adapter_rules=_adapter_rules,
    adapter_dialect=lambda config, naming: (
        "bfl" if naming == "comfy" or config.addition_embed_type else "published"
    ),
)
