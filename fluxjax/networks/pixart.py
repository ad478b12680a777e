"""The transformer of PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from typing import Any

import numpy as np

from fluxjax.config import ConfigError
from fluxjax.config.pixart import PixArtConfig
from fluxjax.networks.network import (
    TRANSFORMER_PREFIXES,
    Arrays,
    Dialect,
    JsonForm,
    Network,
    Role,
    Shapes,
    TokenSplit,
    count,
    held_by_blocks,
)
from fluxjax.networks.tables import Rule, Table

PUBLISHED = Table("diffusers PixArt transformer", identity=True)
_TABLE = (("scale_shift_table", "scale_shift_table"),)
_EMBEDDERS = (("t", "timestep"), ("csize", "resolution"), ("ar", "aspect_ratio"))


def _original() -> Table:
    block, ours = "blocks.{}", "transformer_blocks.{}"
    rules = [
        Rule("x_embedder.proj", ("pos_embed.proj",)),
        Rule("y_embedder.y_proj.fc1", ("caption_projection.linear_1",)),
        Rule("y_embedder.y_proj.fc2", ("caption_projection.linear_2",)),
        Rule("t_block.1", ("adaln_single.linear",)),
        Rule(block, (ours,), leaves=_TABLE),
        Rule(f"{block}.attn.qkv", tuple(f"{ours}.attn1.to_{name}" for name in "qkv")),
        Rule(f"{block}.attn.proj", (f"{ours}.attn1.to_out.0",)),
        Rule(f"{block}.cross_attn.q_linear", (f"{ours}.attn2.to_q",)),
        Rule(f"{block}.cross_attn.kv_linear", tuple(f"{ours}.attn2.to_{name}" for name in "kv")),
        Rule(f"{block}.cross_attn.proj", (f"{ours}.attn2.to_out.0",)),
        Rule(f"{block}.mlp.fc1", (f"{ours}.ff.net.0.proj",)),
        Rule(f"{block}.mlp.fc2", (f"{ours}.ff.net.2",)),
        Rule("final_layer.linear", ("proj_out",)),
        Rule("final_layer", ("",), leaves=_TABLE),
    ]
    for theirs, mine in _EMBEDDERS:
        for place, layer in ((0, "linear_1"), (2, "linear_2")):
            name = f"adaln_single.emb.{mine}_embedder.{layer}"
            rules.append(Rule(f"{theirs}_embedder.mlp.{place}", (name,)))
    # Positions are computed for each size; the learned empty caption is of training.
    ignored = ("pos_embed", r"y_embedder\.y_embedding")
    return Table("original PixArt transformer", tuple(rules), ignored=ignored)


ORIGINAL = _original()


def _infer_published(shapes: Shapes, family: str) -> PixArtConfig:
    return _infer(
        shapes,
        ends=("pos_embed.proj", "caption_projection.linear_1", "proj_out"),
        blocks=r"transformer_blocks\.(\d+)\.",
        sizes="adaln_single.emb.resolution_embedder.linear_1.weight",
    )


def _infer_original(shapes: Shapes, family: str) -> PixArtConfig:
    return _infer(
        shapes,
        ends=("x_embedder.proj", "y_embedder.y_proj.fc1", "final_layer.linear"),
        blocks=r"blocks\.(\d+)\.",
        sizes="csize_embedder.mlp.0.weight",
    )


def _infer(shapes: Shapes, *, ends: tuple[str, str, str], blocks: str, sizes: str) -> PixArtConfig:
    image, text, out = (shapes[f"{name}.weight"] for name in ends)
    width, channels, patch = image[0], image[1], image[2]
    # Original files hold the positions of the size of training; with sizes there is one such.
    positions = shapes.get("pos_embed", (1, 4096 if sizes in shapes else 0))[1]
    if width != 1152 or positions == 0:
        what = "heads" if width != 1152 else "size of picture"
        raise ConfigError(
            f"the {what} of this PixArt transformer cannot be told from shapes (models of 256 to "
            "2048 pixels have the same); give the network's config.json with --config"
        )
    sample_size = patch * round(positions**0.5)
    return PixArtConfig(
        sample_size=sample_size,
        patch_size=patch,
        in_channels=channels,
        out_channels=out[0] // patch**2,
        num_layers=count(shapes, blocks),
        caption_channels=text[1],
        interpolation_scale=sample_size / 64,
        use_additional_conditions=sizes in shapes,
    )


def _read(values: dict[str, Any]) -> dict[str, Any]:
    size = values["sample_size"]
    if isinstance(size, int) and size >= 0:
        own = {
            "interpolation_scale": float(max(size // 64, 1)),
            "use_additional_conditions": size == 128,
        }
        values = {**own, **values}
    if type(values.get("interpolation_scale")) is int:
        values["interpolation_scale"] = float(values["interpolation_scale"])
    heads, each = (values[name] for name in ("num_attention_heads", "attention_head_dim"))
    text = values.get("cross_attention_dim")
    if isinstance(heads, int) and isinstance(each, int) and text != heads * each:
        raise ConfigError(
            f"cross_attention_dim={text!r} is not supported, only the transformer's own width, "
            f"num_attention_heads={heads} x attention_head_dim={each}"
        )
    if "caption_channels" not in values:
        raise ConfigError("caption_channels is missing: text of the transformer's own width")
    return {"out_channels": values["in_channels"], **values}


_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
}


def _inputs(config: PixArtConfig) -> Arrays:
    # Not square, and text that is padded in one row, so that a mix-up shows.
    random, patch = np.random.default_rng(0), config.patch_size
    mask = np.ones((2, 12), np.int32)
    mask[1, 7:] = 0
    inputs: dict[str, Any] = {
        "hidden_states": random.standard_normal((2, 6 * patch, 5 * patch, config.in_channels)),
        "encoder_hidden_states": random.standard_normal((2, 12, config.caption_channels)),
        # Exact in bfloat16.
        "timestep": np.array([960.0, 80.0]),
    }
    if config.use_additional_conditions:
        inputs["resolution"] = np.array([[1024.0, 512.0], [768.0, 1344.0]])
        inputs["aspect_ratio"] = np.array([[2.0], [0.5625]])
    found = {name: value.astype(np.float32) for name, value in inputs.items()}
    return {**found, "encoder_attention_mask": mask}


def _whole(
    run: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    timestep: Any,
    encoder_attention_mask: Any = None,
    resolution: Any = None,
    aspect_ratio: Any = None,
) -> tuple:
    return (
        run("patchify", hidden_states),
        run("positions", *hidden_states.shape[1:3]),
        run("embed_text", encoder_hidden_states),
        run("modulations", timestep, resolution, aspect_ratio),
        None if encoder_attention_mask is None else encoder_attention_mask.sum(axis=1),
    )


def _result(run: Any, patches: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
    return run("unpatchify", patches, *hidden_states.shape[1:3])


def model_name(config: PixArtConfig) -> str:
    """Which PixArt it is of, as far as the configuration tells."""
    return "PixArt-alpha" if config.use_additional_conditions else "PixArt"


def _module() -> type:
    from fluxjax.models.pixart import PixArtTransformer

    return PixArtTransformer


def flops(config: PixArtConfig, image_tokens: int, text_tokens: int) -> float:
    """FLOPs of the matrix products of one forward of one picture; a multiply-add counts two."""
    d, mlp = config.inner_dim, config.mlp_dim
    block = image_tokens * (6 * d * d + 2 * d * mlp) + text_tokens * 2 * d * d
    block += 2 * image_tokens * (image_tokens + text_tokens) * d
    pixels = config.patch_size**2 * (config.in_channels + config.out_channels)
    ends = image_tokens * pixels * d + text_tokens * (config.caption_channels * d + d * d)
    return 2.0 * (config.num_layers * block + ends + 256 * d + 7 * d * d)


_ROLES: dict[str, Role] = {
    "pos_embed/proj": "convolution",
    "proj_out": "whole",
    "scale_shift_table": "copied",
    **{f"{mine}_embedder/linear_1": "columns" for _, mine in _EMBEDDERS},
    **{f"{mine}_embedder/linear_2": "rows" for _, mine in _EMBEDDERS},
    "adaln_single/linear": "modulation",
    "caption_projection/linear_1": "columns",
    "caption_projection/linear_2": "rows",
    "to_q": "columns",
    "to_k": "columns",
    "to_v": "columns",
    "to_out_0": "rows",
    "net_0/proj": "columns",
    "net_2": "rows",
}

PIXART = Network(
    config=PixArtConfig,
    component="transformer",
    words="PixArt transformer",
    describe=lambda config: (
        f"{model_name(config)}'s transformer for {8 * config.sample_size} pixels, "
        f"{config.num_layers} blocks of width {config.inner_dim}"
    ),
    module=_module,
    inputs=_inputs,
    outputs=lambda sample: {"sample": sample},
    json=JsonForm(
        "diffusers",
        ("PixArtTransformer2DModel", "Transformer2DModel"),
        defaults={
            "sample_size": 128,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "in_channels": 4,
        },
        required=_FIXED,
        read=_read,
        write=lambda config, values: (
            {**values, **_FIXED, "cross_attention_dim": config.inner_dim}
        ),
    ),
    dialects=(
        Dialect(
            "published",
            (
                r"adaln_single\.emb\.timestep_embedder\.linear_1\.weight",
                r"caption_projection\.linear_1\.weight",
                r"pos_embed\.proj\.weight",
            ),
            lambda config: PUBLISHED,
            _infer_published,
        ),
        Dialect(
            "bfl",
            (r"t_block\.1\.weight", r"y_embedder\.y_proj\.fc1\.weight"),
            lambda config: ORIGINAL,
            _infer_original,
        ),
    ),
    roles=_ROLES,
    file_name=lambda config: "pixart_transformer.safetensors",
    quantised=r"transformer_blocks\.\d+\.(attn|ff).*\.weight",
    scanned=("transformer_blocks",),
    token_split=TokenSplit(
        "denoise",
        (("image", 1), ("image", 0), None, None, None),
        _whole,
        lambda config: config.num_attention_heads,
        result=_result,
    ),
    adapter_prefixes=TRANSFORMER_PREFIXES,
    adapter_rules=lambda shapes: tuple(rule for rule in ORIGINAL.rules if rule.leaves != _TABLE),
    held=held_by_blocks,
    flops=flops,
)
