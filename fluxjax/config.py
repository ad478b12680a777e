"""Frozen configurations of every network, and the published presets.

Field names are those of the diffusers and transformers `config.json` files, so that reading and
writing a configuration is the identity on names. No arrays, keys, devices or environment here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Literal

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu"]


class ConfigError(ValueError):
    """A configuration that no network can be built from; the message names the values."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The FLUX transformer (MMDiT). Defaults are FLUX.1-dev."""

    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    rope_theta: float = 10000.0
    mlp_ratio: float = 4.0
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        _positive(
            self, "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
            "joint_attention_dim", "pooled_projection_dim", "rope_theta", "mlp_ratio",
        )  # fmt: skip
        _require(
            self.num_layers >= 0 and self.num_single_layers >= 0,
            f"FluxConfig needs block counts >= 0, got num_layers={self.num_layers}, "
            f"num_single_layers={self.num_single_layers}",
        )
        _require(
            sum(self.axes_dims_rope) == self.attention_head_dim
            and all(axis % 2 == 0 for axis in self.axes_dims_rope),
            f"FluxConfig.axes_dims_rope must be even numbers that sum to attention_head_dim="
            f"{self.attention_head_dim}, got {self.axes_dims_rope}",
        )

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.inner_dim * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The KL autoencoder. Defaults are FLUX.1's: 16 channels, 8 x smaller, no quant layers."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    def __post_init__(self) -> None:
        _positive(
            self, "in_channels", "out_channels", "latent_channels", "layers_per_block",
            "norm_num_groups", "scaling_factor",
        )  # fmt: skip
        _require(
            len(self.block_out_channels) > 0
            and all(c % self.norm_num_groups == 0 for c in self.block_out_channels),
            f"AutoencoderConfig.block_out_channels must each divide by norm_num_groups="
            f"{self.norm_num_groups}, got {self.block_out_channels}",
        )

    @property
    def scale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The T5 encoder. Defaults are T5 v1.1 XXL, FLUX's second text encoder."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    is_gated_act: bool = True
    dense_act_fn: Activation = "gelu_pytorch_tanh"
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        _positive(
            self, "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
            "relative_attention_num_buckets", "relative_attention_max_distance",
        )  # fmt: skip
        _require(
            self.dense_act_fn in ("relu", "gelu_new", "gelu_pytorch_tanh"),
            f"T5Config.dense_act_fn must be relu, gelu_new or gelu_pytorch_tanh, "
            f"got {self.dense_act_fn!r}",
        )


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The CLIP text encoder. Defaults are CLIP ViT-L/14, FLUX's first text encoder."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 0
    eos_token_id: int = 2
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        _positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "projection_dim",
            "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        )  # fmt: skip
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"CLIPTextConfig.hidden_size={self.hidden_size} must divide by "
            f"num_attention_heads={self.num_attention_heads}",
        )


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """The CLIP vision encoder (ViT). Defaults are CLIP ViT-L/14."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    projection_dim: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _positive(
            self, "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
            "num_attention_heads", "num_channels", "image_size", "patch_size",
        )  # fmt: skip
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"CLIPVisionConfig.hidden_size={self.hidden_size} must divide by "
            f"num_attention_heads={self.num_attention_heads}",
        )
        _require(
            self.image_size % self.patch_size == 0,
            f"CLIPVisionConfig.image_size={self.image_size} must divide by "
            f"patch_size={self.patch_size}",
        )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Flow-matching Euler schedule. Defaults are FLUX.1-dev's."""

    num_train_timesteps: int = 1000
    shift: float = 3.0
    use_dynamic_shifting: bool = True
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self) -> None:
        _positive(self, "num_train_timesteps", "shift", "base_image_seq_len", "max_image_seq_len")
        _require(
            self.max_image_seq_len > self.base_image_seq_len,
            f"SchedulerConfig.max_image_seq_len={self.max_image_seq_len} must exceed "
            f"base_image_seq_len={self.base_image_seq_len}",
        )

    def mu(self, image_tokens: int) -> float:
        """Log of the shift of a picture of `image_tokens`, for times and sigmas alike.

        With dynamic shifting it lies on the line through the two published lengths.
        """
        if not self.use_dynamic_shifting:
            return math.log(self.shift)
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """All networks of one FLUX pipeline and the defaults it is sampled with.

    `max_sequence_length` is the T5 length. `guidance` is fed to the guidance embedding and ignored
    by models without one.
    """

    transformer: FluxConfig = FluxConfig()
    vae: AutoencoderConfig = AutoencoderConfig()
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    text_encoder_2: T5Config = T5Config()
    scheduler: SchedulerConfig = SchedulerConfig()
    max_sequence_length: int = 512
    steps: int = 28
    guidance: float = 3.5
    width: int = 1024
    height: int = 1024


DEV = PipelineConfig()
SCHNELL = replace(
    DEV,
    transformer=replace(DEV.transformer, guidance_embeds=False),
    scheduler=replace(DEV.scheduler, use_dynamic_shifting=False, shift=1.0),
    max_sequence_length=256,
    steps=4,
    guidance=0.0,
)
KONTEXT = DEV
FILL = replace(DEV, transformer=replace(DEV.transformer, in_channels=384), steps=50, guidance=30.0)
CONTROL = replace(DEV, transformer=replace(DEV.transformer, in_channels=128))

# The embedded model: every part of the published architecture, small, trained on drawn scenes.
TINY = PipelineConfig(
    transformer=FluxConfig(
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 12, 12),
    ),
    vae=AutoencoderConfig(
        block_out_channels=(16, 24, 64, 64), layers_per_block=1, norm_num_groups=4
    ),
    text_encoder=CLIPTextConfig(
        vocab_size=745,
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=743,
        eos_token_id=744,
        pad_token_id=744,
    ),
    text_encoder_2=T5Config(
        vocab_size=220, d_model=128, d_kv=32, d_ff=320, num_layers=3, num_heads=4
    ),
    max_sequence_length=32,
    steps=20,
    guidance=3.5,
    width=96,
    height=96,
)

PRESETS: dict[str, PipelineConfig] = {
    "dev": DEV,
    "schnell": SCHNELL,
    "kontext": KONTEXT,
    "fill": FILL,
    "control": CONTROL,
    "tiny": TINY,
}

T5_XXL = T5Config()
T5_SMALL = T5Config(
    d_model=512,
    d_ff=2048,
    num_layers=6,
    num_heads=8,
    is_gated_act=False,
    dense_act_fn="relu",
)
CLIP_L_TEXT = CLIPTextConfig()
CLIP_BASE_TEXT = CLIPTextConfig(
    hidden_size=512, intermediate_size=2048, projection_dim=512, num_attention_heads=8
)
CLIP_L_VISION = CLIPVisionConfig()
CLIP_BASE_VISION = CLIPVisionConfig(
    hidden_size=768,
    intermediate_size=3072,
    projection_dim=512,
    num_hidden_layers=12,
    num_attention_heads=12,
    patch_size=32,
)


def from_dict(cls: type, values: dict, /):
    """Build `cls` from a `config.json` dictionary; keys that are not fields are left aside."""
    fields = {field.name for field in dataclasses.fields(cls)}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in fields}
    return cls(**{k: v for k, v in known.items() if v is not None})
