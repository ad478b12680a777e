"""FLUX.1 pipelines, and the published presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fluxjax.config.autoencoder import AutoencoderConfig
from fluxjax.config.base import ConfigError, require
from fluxjax.config.choices import FAMILY_NAMES
from fluxjax.config.clip import CLIP_L_FILE, CLIPTextConfig
from fluxjax.config.flux import FluxConfig
from fluxjax.config.latents import PATCH
from fluxjax.config.pipeline import PipelineConfig
from fluxjax.config.scheduler import SchedulerConfig
from fluxjax.config.t5 import T5_FILE, T5Config


@dataclass(frozen=True, kw_only=True)
class FluxPipelineConfig(PipelineConfig):
    """All networks of one FLUX.1 pipeline. `guidance` is fed to the guidance embedding; models
    without one ignore it. `max_sequence_length` counts T5's tokens."""

    transformer: FluxConfig = FluxConfig()
    """The network that draws."""
    vae: AutoencoderConfig = AutoencoderConfig()
    text_encoder: CLIPTextConfig = CLIPTextConfig()
    """CLIP, whose pooled state is the transformer's text vector."""
    text_encoder_2: T5Config = T5Config()
    """T5, whose states are the transformer's text tokens."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """The noise levels of sampling."""

    embeds_guidance: ClassVar[bool] = True
    class_names: ClassVar[str] = r"Flux([A-Z]\w*)?Pipeline"
    file_family: ClassVar[str] = FAMILY_NAMES["flux"]
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder", "text_encoder_2")
    text_files: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_encoder": (CLIP_L_FILE,),
        "text_encoder_2": (T5_FILE,),
    }

    @property
    def own_sampler(self) -> str:
        return "euler"

    @property
    def unit(self) -> int:
        return PATCH * self.vae.scale

    @property
    def class_name(self) -> str:
        inputs = self.transformer.in_channels // self.transformer.out_channels
        tool = {1: "", 2: "Control"}.get(inputs, "Fill")
        return f"Flux{tool}Pipeline"

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> FluxPipelineConfig:
        transformer = parts["transformer"]
        # dev shifts by the number of tokens, schnell does not.
        dynamic = transformer.guidance_embeds
        scheduler = SchedulerConfig(use_dynamic_shifting=dynamic, shift=3.0 if dynamic else 1.0)
        return cls(**{"scheduler": scheduler, **published_defaults(transformer, name), **parts})

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        transformer = self.transformer
        tokens = 4 * self.vae.latent_channels
        tools = (2 * tokens, 2 * tokens + 4 * self.vae.scale**2)
        if not text_alone and transformer.in_channels in tools:
            tokens = transformer.in_channels
        made, decoded = transformer.out_channels // 4, self.vae.latent_channels
        require(
            made == decoded,
            f"{model}: the transformer makes {made} latent channels and the autoencoder decodes "
            f"{decoded}: it belongs to another model",
        )
        for name, reads, given in (
            ("in_channels", transformer.in_channels, tokens),
            ("joint_attention_dim", transformer.joint_attention_dim, self.text_encoder_2.d_model),
            (
                "pooled_projection_dim",
                transformer.pooled_projection_dim,
                self.text_encoder.hidden_size,
            ),
        ):
            require(
                reads == given,
                f"{model}: the transformer's {name} is {reads}, and in a text-to-image model the "
                f"other networks give {given}",
            )


def require_flux(config: PipelineConfig, model: object) -> FluxPipelineConfig:
    """`config` where it is FLUX.1's. Raises ConfigError, which names `model`, for another one."""
    if isinstance(config, FluxPipelineConfig):
        return config
    raise ConfigError(f"{model} holds {config.class_name}, and this is for FLUX.1 alone")


def published_defaults(transformer: FluxConfig, name: str) -> dict[str, Any]:
    """What differs from FLUX.1-dev in how a model is sampled: steps, guidance, text length.

    Canny and Depth are the same network: a Depth model is known by its file's or folder's `name`.
    """
    if not transformer.guidance_embeds:
        return {"max_sequence_length": 256, "steps": 4, "guidance": 0.0}
    inputs = transformer.in_channels // transformer.out_channels
    if inputs > 2:
        return {"steps": 50, "guidance": 30.0}
    return {"guidance": 10.0 if "depth" in name.lower() else 30.0} if inputs == 2 else {}


DEV = FluxPipelineConfig()
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
CONTROL = replace(DEV, transformer=replace(DEV.transformer, in_channels=128), guidance=30.0)

# The embedded model: every part of the published architecture, small, trained on drawn scenes.
TINY = FluxPipelineConfig(
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
        vocab_size=791,
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=789,
        eos_token_id=790,
        pad_token_id=790,
    ),
    text_encoder_2=T5Config(
        vocab_size=188, d_model=128, d_kv=32, d_ff=320, num_layers=3, num_heads=4
    ),
    max_sequence_length=32,
    steps=20,
    guidance=3.5,
    width=96,
    height=96,
)
