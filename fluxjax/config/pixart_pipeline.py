"""PixArt-alpha and PixArt-Sigma pipelines, the sizes that they draw in, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fluxjax.config.autoencoder import AutoencoderConfig
from fluxjax.config.base import ConfigError, require
from fluxjax.config.flux_pipeline import TINY
from fluxjax.config.pipeline import PipelineConfig
from fluxjax.config.pixart import PIXART_ALPHA, PIXART_SIGMA, PixArtConfig
from fluxjax.config.sampler import SamplerConfig
from fluxjax.config.stable_diffusion import SD_VAE
from fluxjax.config.t5 import T5Config

_DPM = SamplerConfig(
    sampler="DPMSolverMultistepScheduler",
    num_train_timesteps=1000,
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    prediction_type="epsilon",
    timestep_spacing="linspace",
    steps_offset=0,
    thresholding=False,
    dynamic_thresholding_ratio=0.995,
    sample_max_value=1.0,
    solver_order=2,
    solver_type="midpoint",
    algorithm_type="dpmsolver++",
    lower_order_final=True,
    euler_at_final=False,
    use_karras_sigmas=False,
    use_lu_lambdas=False,
    final_sigmas_type="zero",
)
_BINS = (
    "8x32 8x29 9x28 9x27 9x26 10x25 10x24 11x23 11x22 11x21 12x21 12x20 13x19 13x18 14x18"
    " 14x17 15x17 15x16 16x16 16x15 17x15 17x14 18x14 18x13 19x13 20x12 21x12 22x11 23x11"
    " 24x10 25x10 27x9 32x8"
)
"""Heights and widths of training, in 16ths of the side of a square picture."""
_LARGEST = "8x31 8x30 26x9 28x9 29x8 30x8 31x8"
"""Of models of 2048 pixels alone."""


@dataclass(frozen=True, kw_only=True)
class PixArtAlphaPipelineConfig(PipelineConfig):
    """All networks of one pipeline of PixArt-alpha. `guidance` is the scale of classifier-free
    guidance, which is on above 1."""

    transformer: PixArtConfig = PIXART_ALPHA
    """The network that draws."""
    vae: AutoencoderConfig = SD_VAE
    text_encoder: T5Config = T5Config()
    """T5."""
    scheduler: SamplerConfig = _DPM
    max_sequence_length: int = 120
    steps: int = 20
    guidance: float = 4.5

    has_size_bins: ClassVar[bool] = True
    class_names: ClassVar[str] = r"PixArtAlphaPipeline"
    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "text_encoder")

    @property
    def class_name(self) -> str:
        return "PixArtAlphaPipeline"

    @property
    def own_sampler(self) -> str:
        return self.scheduler.sampler

    @property
    def unit(self) -> int:
        return self.transformer.patch_size * self.vae.scale

    @classmethod
    def published(cls, parts: dict[str, Any], name: str) -> PixArtAlphaPipelineConfig:
        vae = parts.get("vae", cls.vae)
        side = parts["transformer"].sample_size * vae.scale
        # diffusers' classes of this family read no shift of latents: a file that has one is drawn
        # without it.
        unmoved = {"vae": replace(vae, shift_factor=0.0)}
        return cls(**{"width": side, "height": side, **parts, **unmoved})

    def drawn_size(self, width: int, height: int) -> tuple[int, int]:
        """Of the sizes of training that with the nearest ratio of height to width; the same for a
        model of another size than those are known of."""
        side = 8 * self.transformer.sample_size  # whatever the autoencoder, as diffusers
        if self.transformer.sample_size not in (32, 64, 128, 256):
            return width, height
        bins = f"{_BINS} {_LARGEST}" if self.transformer.sample_size == 256 else _BINS
        sizes = [tuple(map(int, size.split("x"))) for size in bins.split()]
        high, wide = min(
            sorted(sizes, key=_ratio), key=lambda one: abs(_ratio(one) - height / width)
        )
        return wide * side // 16, high * side // 16

    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        transformer, latents = self.transformer, self.vae.latent_channels
        require(
            transformer.in_channels == latents
            and transformer.out_channels in (latents, 2 * latents),
            f"{model}: the transformer reads {transformer.in_channels} channels and makes "
            f"{transformer.out_channels}; with an autoencoder of {latents} latent channels it "
            f"reads {latents} and makes as many, or twice as many",
        )
        require(
            transformer.caption_channels == self.text_encoder.d_model,
            f"{model}: the transformer's caption_channels is {transformer.caption_channels}, and "
            f"the text encoder gives {self.text_encoder.d_model}",
        )
        if self.scheduler.is_flow:
            raise ConfigError(f"{model}: {self.scheduler.sampler} samples a flow, not PixArt")


def _ratio(size: tuple[int, ...]) -> float:
    """Of height to width, as the published tables have it."""
    return round(size[0] / size[1], 2)


@dataclass(frozen=True, kw_only=True)
class PixArtSigmaPipelineConfig(PixArtAlphaPipelineConfig):
    """Likewise of PixArt-Sigma."""

    transformer: PixArtConfig = PIXART_SIGMA
    vae: AutoencoderConfig = replace(SD_VAE, scaling_factor=0.13025)
    max_sequence_length: int = 300

    class_names: ClassVar[str] = r"PixArtSigmaPipeline"

    @property
    def class_name(self) -> str:
        return "PixArtSigmaPipeline"


ALPHA = PixArtAlphaPipelineConfig()
SIGMA = PixArtSigmaPipelineConfig()

# The embedded transformer, beside the autoencoder and T5 of TINY, whose latents go beyond 1: other
# samplers, which read the same file, are not to clip them.
TINY_PIXART = PixArtSigmaPipelineConfig(
    transformer=PixArtConfig(
        sample_size=12,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        caption_channels=128,
        interpolation_scale=1.0,
        use_additional_conditions=False,
    ),
    vae=replace(TINY.vae, shift_factor=0.0),
    text_encoder=TINY.text_encoder_2,
    scheduler=replace(_DPM, clip_sample=False),
    max_sequence_length=32,
    steps=20,
    guidance=4.0,
    width=96,
    height=96,
)
