"""A pipeline: all networks of one, by the names of their folders, and its defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fluxjax.config.autoencoder import AutoencoderConfig
from fluxjax.config.base import check_types, in_range, multiple, require
from fluxjax.config.controlnet import ControlNetConfig
from fluxjax.config.sampler import SamplerConfig
from fluxjax.config.scheduler import SchedulerConfig
from fluxjax.config.tiling import Tiling


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(ABC):
    """What all families share. Each has a class of its own, whose fields are its networks, called
    as their folders are; None where a pipeline comes without one.
    """

    vae: Any = AutoencoderConfig()
    """Each family says of which kind."""
    scheduler: SchedulerConfig | SamplerConfig = SchedulerConfig()
    """How the model is sampled: noise levels and, of a `SamplerConfig`, the sampler."""
    controlnets: tuple[ControlNetConfig, ...] = ()
    """Networks beside the pipeline's own that see control pictures."""
    max_sequence_length: int = 512
    """Tokens of a prompt, padding included."""
    steps: int = 28
    """Times that noise is taken away."""
    guidance: float = 3.5
    """What diffusers calls guidance_scale in this family."""
    width: int = 1024
    """Pixels."""
    height: int = 1024
    """Pixels."""
    noise_mask: bool = False
    """Whether a model that reads a mask keeps what lies outside of it."""

    class_names: ClassVar[str] = ""
    """diffusers' classes of the family, as a regular expression."""
    file_family: ClassVar[str] = ""
    """Whose its single files are, of `choices.FAMILY_NAMES`, where shapes may not tell it."""
    components: ClassVar[tuple[str, ...]] = ()
    """The networks that there may be, the one that draws first."""
    text_files: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Of text encoders the patterns of the files that they lie in, beside each other in a folder as
    ComfyUI keeps them; {}: in folders alone."""
    index_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that model_index.json keeps."""
    force_zeros_for_empty_prompt: ClassVar[bool] = False
    """Whether no negative prompt is heard as zeros, and not as an empty text."""
    sampling_fields: ClassVar[tuple[str, ...]] = (
        "max_sequence_length",
        "steps",
        "guidance",
        "width",
        "height",
        "noise_mask",
    )
    """Fields that say how a model is sampled, which its folder keeps."""
    clip_settings: ClassVar[tuple[str, ...]] = ()
    """Settings of clips alone that the family has."""
    exact_steps: ClassVar[bool] = False
    """Whether the original code's step sizes are Python numbers, which no dtype rounds."""
    requires_aesthetics_score: ClassVar[bool] = False
    """Whether the network is told how beautiful a picture is."""
    has_size_bins: ClassVar[bool] = False
    """Whether pictures are drawn in the nearest size of training unless told otherwise."""
    all_steps: ClassVar[bool] = False
    """Whether LCM, from an image, runs all steps within the part that is drawn anew."""
    paints_without_runge_kutta: ClassVar[bool] = False
    """Whether PNDM, where a mask is painted, starts without it whatever a file says."""
    embeds_guidance: ClassVar[bool] = False
    """Whether `guidance` is told to the network, beside that of two passes."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 2**14, "max_sequence_length")
        in_range(self, 1, 10_000, "steps")
        in_range(self, 0, 1e4, "guidance")
        in_range(self, 1, 2**16, "width", "height")

    @property
    def networks(self) -> dict[str, Any]:
        """The configurations of the networks that there are."""
        each = {name: getattr(self, name) for name in self.components}
        return {name: config for name, config in each.items() if config is not None}

    def of(self, component: str) -> tuple[Any, ...]:
        """The configurations of a component: of the `controlnets` each one, else one."""
        found = getattr(self, component)
        return found if isinstance(found, tuple) else (found,)

    @property
    def denoiser(self) -> str:
        """The network that draws."""
        return self.components[0]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(name for name in self.networks if name.startswith("text_encoder"))

    @property
    @abstractmethod
    def own_sampler(self) -> str:
        """A name of `fluxjax.schedules.samplers`, or of diffusers."""

    @property
    def tiling(self) -> Tiling | None:
        """How clips are cut for the autoencoder; None where pictures are drawn."""
        return None

    @property
    def dropped_frames(self) -> int:
        """Of a clip that is drawn the first ones, which are not shown."""
        return 0

    @property
    def unit(self) -> int:
        """Pixels that widths and heights are multiples of."""
        return self.vae.scale

    def require_clip_skip(self, count: int) -> None:
        """Raises ConfigError if so many of CLIP's last layers cannot be left out."""
        require(
            count == 0, f"clip_skip leaves out layers whose states {self.class_name} never sees"
        )

    def require_frames(self, frames: int) -> None:
        """Raises ConfigError for a number of frames that is not drawn."""
        require(
            frames == 1,
            f"frames are those of a clip, and {self.class_name} draws pictures: got {frames}",
        )

    def latent_frames(self, frames: int) -> int:
        """Latents of so many frames. Raises ConfigError for a number that is not drawn."""
        self.require_frames(frames)
        return 1

    def frames_of(self, latents: int) -> int:
        """Frames that so many latents stand for."""
        return 1

    def require_third_prompt(self) -> None:
        """Raises ConfigError unless a third text encoder reads it."""
        count = len(self.text_encoders)
        require(count > 2, f"prompt_3 is for a third text encoder, and this model has {count}")

    def require_skip_layers(self, layers: tuple[int, ...]) -> None:
        """Raises ConfigError if these blocks cannot be left out of a pass."""
        require(not layers, "skip_layers guides Stable Diffusion 3 alone")

    def require_refiner(self, refiner: PipelineConfig, model: object) -> None:
        """Raises ConfigError, which names its `model`, unless a refiner goes on with the latents of
        this one."""
        require(
            False,
            f"{model}: a refiner goes on with what Stable Diffusion XL draws, and "
            f"{self.class_name} is another model",
        )

    def require_size(self, width: int, height: int) -> None:
        """Raises ConfigError unless both are positive multiples of `unit`."""
        multiple("width", width, self.unit)
        multiple("height", height, self.unit)

    def drawn_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in which a picture is drawn that is to have these."""
        return width, height

    @property
    @abstractmethod
    def class_name(self) -> str:
        """The class that model_index.json names."""

    @classmethod
    @abstractmethod
    def published(cls, parts: dict[str, Any], name: str) -> PipelineConfig:
        """Of these networks and this scheduler, with their published defaults; `name` is that of
        the folder or file."""

    @abstractmethod
    def require_whole(self, model: object, *, text_alone: bool = False) -> None:
        """Raises ConfigError, which names `model`, unless the networks belong together;
        `text_alone`: and need no picture besides text and noise."""
