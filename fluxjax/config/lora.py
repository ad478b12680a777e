"""A LoRA (or DoRA, or LoKr) that is trained: its rank, and the layers that it adapts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from fluxjax.config.base import ConfigError
from fluxjax.config.clip import CLIPTextConfig
from fluxjax.config.pipeline import PipelineConfig
from fluxjax.config.t5 import T5Config

Kind = Literal["lora", "dora", "lokr"]
TextEncoder = Literal["clip", "t5"]
# What diffusers' FLUX scripts adapt: attention and feed-forward of the double blocks, and queries,
# keys and values of the single blocks.
TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
_TEXT_ENCODERS: dict[type, TextEncoder] = {CLIPTextConfig: "clip", T5Config: "t5"}
# What kohya's scripts adapt of each: all of its layers.
_TEXT_TARGETS: dict[TextEncoder, tuple[str, ...]] = {
    "clip": ("[qkv]_proj", "out_proj", "fc[12]"),
    "t5": ("SelfAttention.[qkvo]", "DenseReluDense.w[io].*"),
}
_MOST_RANK = 2**16  # beyond the width of every layer


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """`targets` are published module names, their last parts, or regular expressions of them.

    The adapter's output is multiplied by `alpha / rank`.
    """

    kind: Kind = "lora"
    """lora; dora, which also trains the norm of each row of a weight; lokr, a Kronecker product."""
    rank: int = 16
    """Of the two factors of an update."""
    alpha: float = 16.0
    """Updates are scaled by alpha / rank."""
    targets: tuple[str, ...] = TARGETS
    factor: int = -1
    """Of lokr: how many blocks the first of the two matrices has on each side, where that divides
    the weight's; -1: about as many as each block has rows. A second matrix of less than twice the
    rank is whole, and alpha counts for nothing."""
    text_encoders: tuple[TextEncoder, ...] = ()
    """Those that learn too, clip (all that the model has), t5 or both, in all their layers. They
    then run in every step, over captions of that step; what does not learn is encoded once."""
    text_encoder_rank: int | None = None
    """Of the text encoders; by default `rank`."""
    text_encoder_alpha: float | None = None
    """Of the text encoders; by default their rank."""

    def __post_init__(self) -> None:
        if self.factor < 1 and self.factor != -1:
            raise ConfigError(f"the LoKr's factor must be at least 1, or -1, got {self.factor}")
        if not 1 <= self.rank <= _MOST_RANK:
            raise ConfigError(f"the LoRA's rank must be from 1 to {_MOST_RANK}, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"the LoRA's alpha must be a positive number, got {self.alpha}")
        rank = self.text_encoder_rank
        if rank is not None and not 1 <= rank <= _MOST_RANK:
            raise ConfigError(f"text_encoder_rank must be from 1 to {_MOST_RANK}, got {rank}")
        alpha = self.text_encoder_alpha
        if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
            raise ConfigError(f"text_encoder_alpha must be a positive number, got {alpha}")
        if len({*self.text_encoders}) != len(self.text_encoders):
            raise ConfigError(
                f"text_encoders names one of them twice: {', '.join(self.text_encoders)}"
            )
        if not self.targets:
            raise ConfigError("the LoRA's targets are empty: name at least one module")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ConfigError(f"the LoRA's target {target!r} is no pattern: {error}") from None

    def components_of(self, config: PipelineConfig) -> Mapping[str, LoraConfig]:
        """What is trained, by the folder of a pipeline, each with `targets` and `rank` of its own;
        the network that draws first. Raises ConfigError for a text encoder that it has not."""
        rank = self.text_encoder_rank or self.rank
        alpha = self.text_encoder_alpha or float(rank)
        heard = components_of(self.text_encoders, config, "lora.text_encoders")
        return {config.denoiser: self} | {
            component: dataclasses.replace(
                self, rank=rank, alpha=alpha, targets=_TEXT_TARGETS[kind], text_encoders=()
            )
            for component, kind in heard.items()
        }


def components_of(
    kinds: Collection[TextEncoder], config: PipelineConfig, key: str
) -> dict[str, TextEncoder]:
    """Text encoders of these `kinds`, by the folder of a pipeline. Raises ConfigError, which begins
    with a recipe's `key`, for one that it has not."""
    found: dict[str, TextEncoder] = {}
    for name in config.text_encoders:
        kind = _TEXT_ENCODERS.get(type(config.networks[name]))
        if kind is not None and kind in kinds:
            found[name] = kind
    for kind in kinds:
        if kind not in found.values():
            raise ConfigError(f"{key}: {config.class_name} has no {kind}")
    return found
