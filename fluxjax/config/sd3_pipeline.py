"""Stable Diffusion 3 and 3.5 pipelines, and the published presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fluxjax.config.autoencoder import AutoencoderConfig
from fluxjax.config.base import ConfigError, require
from fluxjax.config.clip import CLIP_BIGG_TEXT, CLIP_L_TEXT, CLIPTextConfig
from fluxjax.config.pipeline import PipelineConfig
from fluxjax.config.sampler import SamplerConfig
from fluxjax.config.sd3 import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Config
from fluxjax.config.stable_diffusion import INPAINTING
from fluxjax.config.t5 import T5Config

_EULER = SamplerConfig(
    sampler="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0
)
_TURBO = {"steps": 4, "guidance": 1.0}


@dataclass(frozen=True, kw_only=True)
class SD3PipelineConfig(PipelineConfig):
    """All networks of one pipeline of Stable Diffusion 3. `guidance` is the scale of
    classifier-free guidance, which is on above 1; `max_sequence_length` counts T5's tokens."""

    transformer: SD3Config = SD3_MEDIUM
    """The network that draws."""
    vae: AutoencoderConfig = AutoencoderConfig(scaling_factor=1.5305, shift_factor=0.0609)
    text_encoder: CLIPTextConfig = replace(CLIP_L_TEXT, with_projection=True)
    """CLIP-L."""
    text_encoder_2: CLIPTextConfig = CLIP_BIGG_TEXT
    """OpenCLIP bigG."""
    text_encoder_3: T5Config | None = T5Config()
    """T5; without it the transformer hears zeros in its place."""
    scheduler: SamplerConfig = _EULER
    max_sequence_length: int = 256
    guidance: float = 7.0

    class_names: ClassVar[str] = r"StableDiffusion3(Img2Img|Inpaint)?Pipeline"
    components: ClassVar[tuple[str, ...]] = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    )

    @property
    def own_sampler(self) -> str:
        return self.scheduler.sampler

    @property
    def unit(self) -> int:
        return self.transformer.patch_size * self.vae.scale

    @property
    def inpaints(self) -> bool:
        """Whether the transformer reads a mask and a masked picture beside its latents."""
        return self.transformer.in_channels == 2 * self.vae.latent_channels + 1

    @property
    def class_name(self) -> str:
        return f"StableDiffusion3{INPAINTING * self.inpaints}Pipeline"

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> SD3PipelineConfig:
        """The distilled 3.5 large turbo is the same network: it is known by its `name`."""
        vae = parts.get("vae", cls.vae)
        side = parts["transformer"].sample_size * vae.scale
        distilled = _TURBO if "turbo" in name.lower() else {}
        return cls(**{"width": side, "height": side, **distilled, **parts})

    @property
    def clips(self) -> tuple[CLIPTextConfig, CLIPTextConfig]:
        return self.text_encoder, self.text_encoder_2

    def require_clip_skip(self, count: int) -> None:
        layers = min(clip.num_hidden_layers for clip in self.clips)
        require(0 <= count < layers, f"clip_skip must be below CLIP's {layers} layers, got {count}")

    def require_skip_layers(self, layers: tuple[int, ...]) -> None:
        count = self.transformer.num_layers
        require(
            all(0 <= layer < count for layer in layers),
            f"skip_layers must be blocks from 0 to {count - 1}, got {layers}",
        )

    def require_size(self, width: int, height: int) -> None:
        """Also unless there are positions for a picture of that size."""
        super().require_size(width, height)
        most = self.transformer.pos_embed_max_size * self.unit
        require(
            max(width, height) <= most,
            f"this model has positions for sides of up to {most} pixels, got {width} x {height}",
        )

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        transformer, latents = self.transformer, self.vae.latent_channels
        inputs = (latents,) if text_alone else (latents, 2 * latents + 1)
        require(
            transformer.in_channels in inputs and transformer.out_channels == latents,
            f"{model}: the transformer reads {transformer.in_channels} channels and makes "
            f"{transformer.out_channels}; with an autoencoder of {latents} latent channels it "
            f"reads {' or '.join(map(str, inputs))} and makes {latents}",
        )
        states = sum(clip.hidden_size for clip in self.clips)
        reads, t5 = transformer.joint_attention_dim, self.text_encoder_3
        require(
            states <= reads and (t5 is None or t5.d_model == reads),
            f"{model}: the transformer's joint_attention_dim is {reads}, and the text encoders "
            f"give {states}" + ("" if t5 is None else f" and {t5.d_model}"),
        )
        require(
            all(clip.with_projection for clip in self.clips),
            f"{model}: a CLIP text encoder has no text_projection",
        )
        pooled = sum(clip.projection_dim for clip in self.clips)
        require(
            transformer.pooled_projection_dim == pooled,
            f"{model}: the transformer's pooled_projection_dim is "
            f"{transformer.pooled_projection_dim}, and the CLIP text encoders give {pooled}",
        )
        if not self.scheduler.is_flow:
            raise ConfigError(f"{model}: {self.scheduler.sampler} samples no flow, and this is one")


SD3 = SD3PipelineConfig()
SD35_MEDIUM_PIPELINE = SD3PipelineConfig(transformer=SD35_MEDIUM)
SD35_LARGE_PIPELINE = SD3PipelineConfig(transformer=SD35_LARGE)
SD35_LARGE_TURBO = replace(SD35_LARGE_PIPELINE, **_TURBO)
