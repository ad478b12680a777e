"""Stable Diffusion 1, 2 and XL pipelines, and the published presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fluxjax.config.autoencoder import AutoencoderConfig
from fluxjax.config.base import ConfigError, require
from fluxjax.config.clip import CLIP_BIGG_TEXT, CLIP_H_TEXT, CLIP_L_TEXT, CLIPTextConfig
from fluxjax.config.flux_pipeline import TINY
from fluxjax.config.pipeline import PipelineConfig
from fluxjax.config.sampler import SamplerConfig
from fluxjax.config.unet import (
    LCM_UNET,
    SD15_UNET,
    SD21_UNET,
    SDXL_REFINER_UNET,
    SDXL_UNET,
    TINY_UNET,
    UNetConfig,
)

INPAINTING = "Inpaint"
SD_VAE = AutoencoderConfig(
    latent_channels=4,
    scaling_factor=0.18215,
    shift_factor=0.0,
    use_quant_conv=True,
    use_post_quant_conv=True,
)
_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}
PNDM = SamplerConfig(sampler="PNDMScheduler", **_NOISE)
DDIM = SamplerConfig(sampler="DDIMScheduler", **_NOISE)
EULER = SamplerConfig(
    sampler="EulerDiscreteScheduler",
    timestep_spacing="leading",
    prediction_type="epsilon",
    interpolation_type="linear",
    use_karras_sigmas=False,
    sample_max_value=1.0,
    **_NOISE,
)
LCM = SamplerConfig(
    sampler="LCMScheduler",
    timestep_spacing="leading",
    original_inference_steps=50,
    timestep_scaling=10.0,
    **{**_NOISE, "steps_offset": 0, "set_alpha_to_one": True},
)


@dataclass(frozen=True, kw_only=True)
class StableDiffusionConfig(PipelineConfig):
    """All networks of one pipeline of Stable Diffusion 1 or 2. `guidance` is the scale of
    classifier-free guidance, which is on above 1."""

    unet: UNetConfig = SD15_UNET
    """The network that draws."""
    vae: AutoencoderConfig = SD_VAE
    text_encoder: CLIPTextConfig = CLIP_L_TEXT
    """CLIP, whose states the UNet attends to."""
    scheduler: SamplerConfig = PNDM
    max_sequence_length: int = 77
    steps: int = 50
    guidance: float = 7.5
    width: int = 512
    height: int = 512

    class_names: ClassVar[str] = r"StableDiffusion(Img2Img|Inpaint)?Pipeline"
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    paints_without_runge_kutta: ClassVar[bool] = True

    @property
    def own_sampler(self) -> str:
        return self.scheduler.sampler

    @property
    def inpaints(self) -> bool:
        """Whether the UNet reads a mask and a masked picture beside its latents."""
        return self.unet.in_channels == 2 * self.vae.latent_channels + 1

    @property
    def class_name(self) -> str:
        return f"StableDiffusion{INPAINTING * self.inpaints}Pipeline"

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> StableDiffusionConfig:
        """Without a scheduler that which such models were published with: those of 2, whose text
        encoder is OpenCLIP's, predict v at 768 pixels; those that hear their guidance draw by LCM.
        """
        unet, vae = parts["unet"], parts["vae"]
        if "scheduler" not in parts and unet.time_cond_proj_dim is not None:
            parts = {**parts, "scheduler": LCM}
            if cls is StableDiffusionConfig and unet.in_channels == vae.latent_channels:
                return LatentConsistencyConfig.published(parts, name)
        side = unet.sample_size * vae.scale
        first = parts.get("text_encoder")
        if "scheduler" not in parts and first is not None and first.hidden_act == "gelu":
            v = unet.sample_size > 64 and unet.in_channels == vae.latent_channels
            kind: Any = "v_prediction" if v else "epsilon"
            parts = {**parts, "scheduler": replace(DDIM, prediction_type=kind)}
        # diffusers' classes of this family read no shift of latents: a file that has one is drawn
        # without it.
        unmoved = {"vae": replace(vae, shift_factor=0.0)}
        config = cls(**{"width": side, "height": side, **parts, **unmoved})
        return replace(config, scheduler=config.corrected(config.scheduler))

    def corrected(self, scheduler: SamplerConfig) -> SamplerConfig:
        """As diffusers' pipelines of this family read it: whatever a file says, timesteps have an
        offset of 1, and pictures are not clamped or, in inpainting models, PNDM does not start with
        Runge-Kutta."""
        name, value = ("skip_prk_steps", True) if self.inpaints else ("clip_sample", False)
        said = scheduler.given(name)
        other = {} if said is None else {name: value}
        return replace(scheduler, steps_offset=1, **other)

    @property
    def text_width(self) -> int:
        """Of the states that the UNet attends to."""
        return sum(self.networks[name].hidden_size for name in self.text_encoders)

    def require_clip_skip(self, count: int) -> None:
        layers = min(self.networks[name].num_hidden_layers for name in self.text_encoders)
        require(0 <= count < layers, f"clip_skip must be below CLIP's {layers} layers, got {count}")

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        unet, latents = self.unet, self.vae.latent_channels
        inputs = (latents,) if text_alone else (latents, 2 * latents + 1)
        require(
            unet.in_channels in inputs and unet.out_channels == latents,
            f"{model}: the UNet reads {unet.in_channels} channels and makes {unet.out_channels}; "
            f"with an autoencoder of {latents} latent channels it reads "
            f"{' or '.join(map(str, inputs))} and makes {latents}",
        )
        require(
            unet.cross_attention_dim == self.text_width,
            f"{model}: the UNet's cross_attention_dim is {unet.cross_attention_dim}, and the text "
            f"encoders give {self.text_width}",
        )
        longest = min(self.networks[n].max_position_embeddings for n in self.text_encoders)
        require(
            self.max_sequence_length <= longest,
            f"{model}: CLIP reads {longest} tokens, not max_sequence_length="
            f"{self.max_sequence_length}",
        )
        if self.scheduler.is_flow:
            raise ConfigError(f"{model}: {self.scheduler.sampler} samples a flow, not a UNet")


@dataclass(frozen=True, kw_only=True)
class LatentConsistencyConfig(StableDiffusionConfig):
    """Stable Diffusion 1, distilled to draw in a few steps and to hear the guidance scale."""

    unet: UNetConfig = LCM_UNET
    scheduler: SamplerConfig = LCM
    steps: int = 4
    guidance: float = 8.5
    width: int = 768
    height: int = 768

    class_names: ClassVar[str] = r"LatentConsistencyModel(Img2Img)?Pipeline"
    all_steps: ClassVar[bool] = True

    @property
    def class_name(self) -> str:
        return "LatentConsistencyModelPipeline"

    def corrected(self, scheduler: SamplerConfig) -> SamplerConfig:
        return scheduler

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        require(
            self.unet.time_cond_proj_dim is not None,
            f"{model}: a latent consistency model hears its guidance, and the UNet has no "
            "time_cond_proj_dim",
        )
        super().require_whole(model, text_alone=True)


@dataclass(frozen=True, kw_only=True)
class StableDiffusionXLConfig(StableDiffusionConfig):
    """Stable Diffusion XL, base, refiner or inpainting. The last text encoder that there is gives
    the pooled text."""

    unet: UNetConfig = SDXL_UNET
    vae: AutoencoderConfig = replace(SD_VAE, scaling_factor=0.13025)
    text_encoder: CLIPTextConfig | None = CLIP_L_TEXT
    """CLIP-L; None in a refiner."""
    text_encoder_2: CLIPTextConfig | None = CLIP_BIGG_TEXT
    """OpenCLIP bigG, whose states join those of the first."""
    scheduler: SamplerConfig = EULER
    guidance: float = 5.0
    width: int = 1024
    height: int = 1024
    force_zeros_for_empty_prompt: bool = True
    """Whether no negative prompt is heard as zeros, and not as an empty text."""
    requires_aesthetics_score: bool = False
    """Whether the UNet is told a score in place of the size that is wished for."""

    class_names: ClassVar[str] = r"StableDiffusionXL(Img2Img|Inpaint)?Pipeline"
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "text_encoder_2")
    paints_without_runge_kutta: ClassVar[bool] = False
    index_fields: ClassVar[tuple[str, ...]] = (
        "force_zeros_for_empty_prompt",
        "requires_aesthetics_score",
    )

    @property
    def class_name(self) -> str:
        kind = "Img2Img" * self.requires_aesthetics_score or INPAINTING * self.inpaints
        return f"StableDiffusionXL{kind}Pipeline"

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> StableDiffusionConfig:
        """Without an index the refiner is known by its text encoder, which is bigG alone.
        Inpainting models are guided as diffusers guides them."""
        if "requires_aesthetics_score" not in parts and "scheduler" not in parts:
            refines = parts.get("text_encoder") is None
            told = {"force_zeros_for_empty_prompt": not refines, "text_encoder": None}
            parts = {**told, "requires_aesthetics_score": refines, **parts}
        if parts["unet"].in_channels > parts["vae"].latent_channels:
            parts = {"guidance": 7.5, **parts}
        return super().published(parts, name)

    def corrected(self, scheduler: SamplerConfig) -> SamplerConfig:
        return scheduler

    @property
    def size_numbers(self) -> int:
        """How many numbers the UNet is told of a picture's sizes."""
        return 5 if self.requires_aesthetics_score else 6

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        require(bool(self.text_encoders), f"{model}: there is no text encoder")
        super().require_whole(model, text_alone=text_alone)
        last = self.networks[self.text_encoders[-1]]
        require(last.with_projection, f"{model}: the last text encoder has no text_projection")
        given = last.projection_dim + self.size_numbers * self.unet.addition_time_embed_dim
        reads = self.unet.projection_class_embeddings_input_dim
        require(
            self.unet.addition_embed_type is not None and reads == given,
            f"{model}: the UNet's projection_class_embeddings_input_dim is {reads}, and pooled "
            f"text with {self.size_numbers} sizes gives {given}",
        )

    def require_refiner(self, refiner: PipelineConfig, model: object) -> None:
        require(
            isinstance(refiner, StableDiffusionXLConfig),
            f"{model}: a refiner of Stable Diffusion XL is one itself, not {refiner.class_name}",
        )
        for one, which in ((self, "the base model"), (refiner, "its refiner")):
            inpaints = isinstance(one, StableDiffusionXLConfig) and one.inpaints
            require(not inpaints, f"{model}: {which} paints masks anew, and latents have none")
        for name in ("latent_channels", "scale", "scaling_factor"):
            own, others = getattr(self.vae, name), getattr(refiner.vae, name)
            require(
                own == others,
                f"{model}: a refiner reads the base model's latents; its autoencoder's {name} is "
                f"{others}, and the base model's {own}",
            )


SD15 = StableDiffusionConfig()
SD21 = StableDiffusionConfig(
    unet=SD21_UNET,
    text_encoder=CLIP_H_TEXT,
    scheduler=replace(DDIM, prediction_type="v_prediction"),
    width=768,
    height=768,
)
SDXL = StableDiffusionXLConfig()
SDXL_REFINER = StableDiffusionXLConfig(
    unet=SDXL_REFINER_UNET,
    text_encoder=None,
    force_zeros_for_empty_prompt=False,
    requires_aesthetics_score=True,
)

# The embedded UNet, beside the autoencoder and CLIP of TINY. Its betas are those of Ho et al. 2020:
# with those of the published models the last timestep still shows what so few latents are like.
TINY_SD = StableDiffusionConfig(
    unet=TINY_UNET,
    vae=replace(TINY.vae, shift_factor=0.0),
    text_encoder=TINY.text_encoder,
    scheduler=SamplerConfig(
        sampler="DDIMScheduler",
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    ),
    steps=20,
    guidance=2.0,
    width=96,
    height=96,
)
