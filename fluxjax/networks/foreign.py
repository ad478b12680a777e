"""Kinds of weights that are known by their names and cannot be read yet.

Many share names with those that can. Each is told by names that only it has, so that it is called
what it is and never taken for another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fluxjax.networks.network import Shapes


@dataclass(frozen=True)
class Foreign:
    """`signature`: regular expressions, each of which fits a name of such a file."""

    words: str
    signature: tuple[str, ...]
    variant: Callable[[Shapes], str] = lambda shapes: ""
    """Shapes -> what `words` leaves open, put in its place {}."""


# What stands before the names in single files, pickles' contents and exports of trainers.
_PREFIX = r"(?:.*\.)?"
_LONGEST = 256  # no real name is longer, and expressions take the square of the time


FOREIGN = (
    Foreign(
        "a LoRA, which only changes a model and is none itself",
        (r".*(lora_(A|B|down|up)|lokr_w1|hada_w1_a).*",),
    ),
    Foreign(
        "a ControlNet of Stable Diffusion",
        (
            r"controlnet_(cond_embedding|down_blocks|mid_block)\..*|.*zero_convs\.0\..*"
            r"|pos_embed_input\.proj\..*",
        ),
    ),
    # Transformers of the FLUX kind.
    Foreign("Chroma's transformer", (r"distilled_guidance_layer\..*",)),
    Foreign(
        "FLUX.2's transformer",
        (r"(double_stream_modulation_img|single_stream_modulation)\..*",),
    ),
    Foreign("Qwen-Image's transformer", (r"transformer_blocks\.0\.img_mod\.1\.weight",)),
    Foreign("HiDream's transformer", (r"double_stream_blocks\.0\..*",)),
    # Transformers of the Stable Diffusion 3 kind, and those with cross attention.
    Foreign("AuraFlow's transformer", (r"register_tokens", r"joint_transformer_blocks\..*")),
    Foreign("LTX-Video's transformer", (r"patchify_proj\.weight",)),
    Foreign("LTX-Video's transformer", (r"proj_in\.weight", r"caption_projection\..*")),
    Foreign("Sana's transformer", (r".*\.ff\.conv_depth\.weight", r"caption_projection\..*")),
    Foreign(
        "a PixArt-Sigma transformer with compressed keys and values",
        (r"blocks\.\d+\.attn\.sr\.weight", r"t_block\.1\.weight"),
    ),
    Foreign("Wan's transformer", (r"condition_embedder\..*", r"blocks\.0\.attn1\..*")),
    Foreign("Wan's transformer", (r"text_embedding\.0\..*", r"blocks\.0\.self_attn\..*")),
    Foreign("CogVideoX's transformer", (r"patch_embed\.(text_)?proj\.weight", r"norm_final\..*")),
    Foreign("Lumina 2's or Z-Image's transformer", (r"cap_embedder\..*", r"noise_refiner\..*")),
    # UNets are read by themselves.
    Foreign(
        "a whole Stable Diffusion checkpoint, in its original names",
        (r"model\.diffusion_model\.input_blocks\.0\.0\.weight",),
    ),
    # Autoencoders.
    Foreign(
        "HunyuanVideo 1.5's autoencoder",
        (r"encoder\.conv_in\.conv\.weight", r"encoder\.down_blocks\.0\.resnets\.0\.norm1\.gamma"),
    ),
    Foreign("FLUX.2's autoencoder", (r"bn\.running_mean", r"encoder\.(down|down_blocks)\.0\..*")),
    Foreign(
        "a deep-compression autoencoder of pictures (DC-AE, as Sana has)",
        (r"encoder\.(stages|down_blocks)\.\d+\.\d+\..*", r"decoder\..*"),
    ),
    Foreign(
        "a video autoencoder of the Wan kind",
        (r"(encoder\.conv1|encoder\.conv_in)\.weight", r"decoder\.(middle|mid_block)\..*gamma"),
    ),
    Foreign(
        "a vector-quantised autoencoder",
        (r"quantize\.embedding\.weight", r"encoder\.conv_in\.weight"),
    ),
    Foreign(
        "a tiny autoencoder (TAESD)", (r"encoder\.layers\.0\.weight", r"decoder\.layers\.1\.weight")
    ),
    # Text and image encoders.
    Foreign(
        "a whole OpenCLIP, in its own names",
        (r"(model\.)?visual\.transformer\.resblocks\.0\.attn\.in_proj_weight",),
    ),
    Foreign("a whole SigLIP, of which only the vision encoder is read", (r"logit_bias",)),
    Foreign(
        "a multilingual T5 (UMT5)",
        (r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",),
    ),
)


def foreign_words(shapes: Shapes) -> str:
    """What these tensors are, in words, if a kind above has their names; else ""."""
    text = "\n".join(name for name in shapes if len(name) <= _LONGEST)
    for kind in FOREIGN:
        if all(re.search(rf"^{_PREFIX}(?:{part})$", text, re.M) for part in kind.signature):
            return kind.words.format(kind.variant(shapes))
    return ""
