"""One table per family: how a published checkpoint's names map onto the reference names.

Reference names are those of diffusers (transformer, vae) and transformers (text encoders); our
parameter trees mirror them mechanically (see `engine`), so a checkpoint with reference names
needs no rules. A rule names modules; `.weight` and `.bias` follow. `{}` stands for a number.
The tables lie on this floor, below the verbs, because sampling and the diff load through them too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One module of theirs = the rows of `ours`, one after the other.

    `swap_halves`: the two halves of the rows are exchanged. `conv1x1`: theirs is a 1 x 1
    convolution (out, in, 1, 1) where the reference has a linear layer (out, in).
    `leaves`: their parameters' names -> the reference's.
    """

    theirs: str
    ours: tuple[str, ...]
    swap_halves: bool = False
    conv1x1: bool = False
    leaves: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))


_SCALE = (("scale", "weight"),)


@dataclass(frozen=True)
class Table:
    """`identity`: a name that no rule matches is a reference name already.

    `ignored`: regular expressions of buffers that carry no parameter.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    identity: bool = False
    ignored: tuple[str, ...] = ()


FLUX = Table("diffusers FLUX transformer", identity=True)
VAE = Table(
    "diffusers autoencoder",
    # Files older than diffusers 0.18 name the attention of the middle block this way.
    rules=tuple(
        Rule(f"{attention}.{old}", (f"{attention}.{new}",))
        for attention in ("encoder.mid_block.attentions.{}", "decoder.mid_block.attentions.{}")
        for old, new in (
            ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"),
        )
    ),
    identity=True,
)  # fmt: skip
T5 = Table(
    "T5 encoder",
    rules=(Rule("encoder.embed_tokens", ("shared",)),),
    identity=True,
    ignored=(r"decoder\..*", r"lm_head\..*", "logit_scale"),
)
_CLIP_LAYERS = tuple(
    f"encoder.layers.{{}}.{name}"
    for name in (
        "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.q_proj",
        "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    )
)  # fmt: skip
CLIP_TEXT = Table(
    "CLIP text encoder",
    # transformers 5 writes a CLIPTextModel without the prefix that published files have.
    rules=tuple(
        Rule(name, (f"text_model.{name}",))
        for name in (
            "embeddings.token_embedding",
            "embeddings.position_embedding",
            "final_layer_norm",
            *_CLIP_LAYERS,
        )
    ),
    identity=True,
    ignored=(r".*position_ids", r"vision_model\..*", r"visual_projection\..*", "logit_scale"),
)
CLIP_VISION = Table(
    "CLIP vision encoder",
    identity=True,
    rules=tuple(
        Rule(name, (f"vision_model.{name}",), leaves=leaves)
        for name, leaves in (
            ("embeddings", (("class_embedding", "class_embedding"),)),
            *(
                (name, (("weight", "weight"), ("bias", "bias")))
                for name in (
                    "embeddings.patch_embedding", "embeddings.position_embedding",
                    "pre_layrnorm", "post_layernorm", *_CLIP_LAYERS,
                )
            ),
        )
    ),
    ignored=(r".*position_ids", r"text_model\..*", r"text_projection\..*", "logit_scale"),
)  # fmt: skip
# A CLIPModel: both encoders, their projections and the temperature.
CLIP = Table("CLIP", identity=True, ignored=(r".*position_ids",))


def _bfl_flux() -> Table:
    rules = [
        Rule("img_in", ("x_embedder",)),
        Rule("txt_in", ("context_embedder",)),
        Rule("final_layer.linear", ("proj_out",)),
        # BFL (shift, scale), diffusers (scale, shift).
        Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    ]
    for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        embedder = f"time_text_embed.{ours}_embedder"
        rules += [
            Rule(f"{theirs}_in.in_layer", (f"{embedder}.linear_1",)),
            Rule(f"{theirs}_in.out_layer", (f"{embedder}.linear_2",)),
        ]
    block, attn = "transformer_blocks.{}", "transformer_blocks.{}.attn"
    for theirs, norm, qkv, out, ff, added in (
        ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff", ""),
        (
            "txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out",
            "ff_context", "added_",
        ),
    ):  # fmt: skip
        double = f"double_blocks.{{}}.{theirs}"
        rules += [
            Rule(f"{double}_mod.lin", (f"{block}.{norm}.linear",)),
            Rule(f"{double}_attn.qkv", tuple(f"{attn}.{name}" for name in qkv)),
            Rule(f"{double}_attn.norm.query_norm", (f"{attn}.norm_{added}q",), leaves=_SCALE),
            Rule(f"{double}_attn.norm.key_norm", (f"{attn}.norm_{added}k",), leaves=_SCALE),
            Rule(f"{double}_attn.proj", (f"{attn}.{out}",)),
            Rule(f"{double}_mlp.0", (f"{block}.{ff}.net.0.proj",)),
            Rule(f"{double}_mlp.2", (f"{block}.{ff}.net.2",)),
        ]
    single = "single_transformer_blocks.{}"
    rules += [
        Rule("single_blocks.{}.modulation.lin", (f"{single}.norm.linear",)),
        Rule(
            "single_blocks.{}.linear1",
            (f"{single}.attn.to_q", f"{single}.attn.to_k", f"{single}.attn.to_v",
             f"{single}.proj_mlp"),
        ),
        Rule("single_blocks.{}.linear2", (f"{single}.proj_out",)),
        Rule("single_blocks.{}.norm.query_norm", (f"{single}.attn.norm_q",), leaves=_SCALE),
        Rule("single_blocks.{}.norm.key_norm", (f"{single}.attn.norm_k",), leaves=_SCALE),
    ]  # fmt: skip
    return Table("BFL FLUX transformer", tuple(rules))


BFL_FLUX = _bfl_flux()


def bfl_autoencoder(levels: int) -> Table:
    """BFL's ae.safetensors with `levels` resolutions; its decoder counts levels from the finest."""
    resnet = ("norm1", "conv1", "norm2", "conv2")
    rules: list[Rule] = []

    def block(theirs: str, ours: str, shortcut: bool = True) -> None:
        rules.extend(Rule(f"{theirs}.{name}", (f"{ours}.{name}",)) for name in resnet)
        if shortcut:
            rules.append(Rule(f"{theirs}.nin_shortcut", (f"{ours}.conv_shortcut",)))

    for level in range(levels):
        reverse = levels - 1 - level
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        block(f"encoder.down.{level}.block.{{}}", f"{down}.resnets.{{}}")
        block(f"decoder.up.{reverse}.block.{{}}", f"{up}.resnets.{{}}")
        rules += [
            Rule(f"encoder.down.{level}.downsample.conv", (f"{down}.downsamplers.0.conv",)),
            Rule(f"decoder.up.{reverse}.upsample.conv", (f"{up}.upsamplers.0.conv",)),
        ]
    for side in ("encoder", "decoder"):
        mid = f"{side}.mid_block"
        block(f"{side}.mid.block_1", f"{mid}.resnets.0", shortcut=False)
        block(f"{side}.mid.block_2", f"{mid}.resnets.1", shortcut=False)
        rules.append(Rule(f"{side}.mid.attn_1.norm", (f"{mid}.attentions.0.group_norm",)))
        for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            rules.append(
                Rule(f"{side}.mid.attn_1.{theirs}", (f"{mid}.attentions.0.{ours}",), conv1x1=True)
            )
        rules += [
            Rule(f"{side}.conv_in", (f"{side}.conv_in",)),
            Rule(f"{side}.conv_out", (f"{side}.conv_out",)),
            Rule(f"{side}.norm_out", (f"{side}.conv_norm_out",)),
        ]
    return Table("BFL autoencoder", tuple(rules))


# component -> the table of its reference names
REFERENCE = {
    "transformer": FLUX,
    "vae": VAE,
    "text_encoder": CLIP_TEXT,
    "text_encoder_2": T5,
    "image_encoder": CLIP_VISION,
    "clip": CLIP,
}


def bfl_table(component: str, levels: int = 4) -> Table | None:
    """None for the text encoders, which BFL takes with the reference's names."""
    if component == "vae":
        return bfl_autoencoder(levels)
    return BFL_FLUX if component == "transformer" else None
