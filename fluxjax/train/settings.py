"""The parts of a recipe: what is minimised, by what, and how it is judged. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from fluxjax.config import ConfigError
from fluxjax.config.choices import CONTROL_MODES

Density = Literal["auto", "flux_shift", "uniform", "logit_normal", "sigmoid", "shift", "mode"]
Weight = Literal["none", "sigma_sqrt", "cosmap"]
Prediction = Literal["auto", "epsilon", "v_prediction"]
Optimizer = Literal["adamw", "adafactor", "lion", "prodigy", "muon"]
Schedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class ControlNetSettings:
    """Of a ControlNet that is trained. It begins as a copy of the model's first blocks, which adds
    nothing yet."""

    layers: int = 4
    """Double blocks that are copied."""
    single_layers: int = 4
    """Single blocks, which may be none."""
    start: str = ""
    """A ControlNet's folder or file to go on from instead, which sees latents."""
    mode: str = ""
    """The kind of the control pictures, canny, depth ... or a number: one of those of a union,
    which learns the others in other runs. A new ControlNet is a union if this is given."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.single_layers < 0:
            raise ConfigError(
                "a ControlNet has at least 1 double block and 0 single ones, got layers "
                f"{self.layers} and single_layers {self.single_layers}"
            )
        if self.mode and self.mode not in CONTROL_MODES and not self.mode.isdecimal():
            raise ConfigError(
                f"controlnet.mode must be {', '.join(CONTROL_MODES)} or a number, got {self.mode!r}"
            )


@dataclass(frozen=True, kw_only=True)
class ConditionKinds:
    """How often each kind of condition is drawn for a clip, relative to each other; by default as
    Open-Sora's second stage draws them. 0 is never."""

    t2v: float = 1.0
    """Nothing is given."""
    i2v_head: float = 5.0
    """The first frame."""
    i2v_loop: float = 1.0
    """The first and the last frame."""
    i2v_tail: float = 1.0
    """The last frame."""
    v2v_head: float = 0.0
    """The first 33 frames, of clips that are longer."""
    v2v_tail: float = 0.0
    v2v_head_easy: float = 0.0
    """The first 65 frames, of clips that are longer."""
    v2v_tail_easy: float = 0.0

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ConfigError("kinds must not be negative, and one of them must be above 0")

    @property
    def weights(self) -> dict[str, float]:
        """By name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which times are drawn, how their errors weigh, what is left out; of a flow (FLUX, Stable
    Diffusion 3) or of a diffusion model, which predicts noise or v."""

    density: Density = "auto"
    """flux_shift: sigmoid of a normal, shifted by the picture's size as in sampling; auto: that for
    flows, uniform for diffusion models."""
    mean: float = 0.0
    """Of logit_normal."""
    std: float = 1.0
    """Of logit_normal."""
    shift: float = 3.1582
    """Of the density shift."""
    mode_scale: float = 1.29
    """Of the density mode."""
    weight: Weight = "none"
    """Of each row's squared error: none, 1 / t^2 (sigma_sqrt) or 2 / (pi (1 - 2t + 2t^2)); for
    flows."""
    min_snr: float = 0.0
    """Of diffusion models: a row's squared error weighs as if its signal-to-noise ratio were at
    most this (5 is usual); 0 weighs all timesteps alike."""
    debiased: bool = False
    """Of diffusion models, instead of min_snr: a squared error of noise is divided by the root of
    the signal-to-noise ratio, so that early steps, which decide the layout, count more."""
    noise_offset: float = 0.0
    """Of diffusion models: so much noise that is the same for all latents of a channel is added."""
    prediction: Prediction = "auto"
    """Of diffusion models: what a model that is trained whole learns to predict; auto: as before.
    """
    zero_snr: bool = False
    """Of diffusion models that are trained whole: the last timestep becomes noise alone, in the
    pipeline too. For v_prediction."""
    unmasked_weight: float = 0.0
    """Of the error where a mask is black; where it is white the weight is 1."""
    guidance: float = 1.0
    """Fed to the guidance embedding; models without one ignore it."""
    caption_dropout: float = 0.1
    """Share of the captions that are replaced by the empty one."""
    encoder_dropout: float = 0.0
    """Of Stable Diffusion 3: besides, each text encoder by itself is not heard in this share of the
    rows (0.464 in its training), so that it may be left out. Of Open-Sora: CLIP and T5 hear the
    empty caption, each by itself (0.316 in its training, where caption_dropout is 0)."""
    from_reference: float = 0.0
    """Of flows with references: in this share of the rows the noisy latents are the reference's,
    and the way from there to the picture is learnt. For edits that leave nothing to chance: noisy
    latents of the picture show what becomes of it, so that captions are hardly listened to."""
    kinds: ConditionKinds = field(default_factory=ConditionKinds)
    """Of Open-Sora: which frames of a clip are given, drawn for each clip. HunyuanVideo's image to
    video is given the first."""

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "encoder_dropout", "unmasked_weight", "from_reference"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("min_snr", "noise_offset"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.debiased and self.min_snr:
            raise ConfigError("debiased and min_snr are two ways to weigh errors: leave out one")
        for name in ("std", "shift"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How gradients become updates."""

    name: Optimizer = "adamw"
    learning_rate: float | None = None
    """By default that of the method: LoRA 1e-4, full 1e-5; Lion a third of it, Prodigy 1."""
    text_encoder_learning_rate: float | None = None
    """Of the text encoders that learn (`lora.text_encoders`); by default `learning_rate`."""
    schedule: Schedule = "constant"
    """After the warm-up: constant, or down to `final` of the learning rate at the last step."""
    warmup: int = 100
    """Steps in which the learning rate rises from 0, at most a tenth of the run."""
    final: float = 0.0
    """Share of the learning rate at the last step of cosine and linear."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Decoupled, on matrices alone."""
    clip: float = 1.0
    """Global norm to which gradients are clipped; 0 does not clip."""

    def __post_init__(self) -> None:
        rates = "learning_rate", "text_encoder_learning_rate"
        for name in (*rates, "warmup", "final", "weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must not be negative, got {value}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Pictures or clips of fixed prompts and seeds, and the loss on fixed timesteps and noise."""

    every: int = 500
    """Steps between validations; 0 validates never."""
    prompts: tuple[str, ...] = ()
    """A row of pictures each; without prompts only the loss is measured."""
    references: tuple[str, ...] = ()
    """Training to edit: for each prompt the file of the picture that it edits, cut to the size; of
    clips that of the first frame."""
    images: tuple[str, ...] = ()
    """Training to fill: likewise what is filled, with `masks`."""
    masks: tuple[str, ...] = ()
    """White is painted anew."""
    controls: tuple[str, ...] = ()
    """Training to follow: likewise; with data.controls = "canny" their edges are followed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A column of pictures each."""
    width: int | None = None
    """Of the pictures, in pixels; by default the model's own, as the next four."""
    height: int | None = None
    frames: int | None = None
    """Of clips, which are written beside the sheet of their middle frames."""
    steps: int | None = None
    guidance: float | None = None
    batches: int = 4
    """Batches whose loss is measured."""
    source: str = ""
    """A source like that of the data, of pictures that are not trained on; by default the loss is
    measured on the first batches of the training data."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.batches < 0:
            raise ConfigError(
                f"every and batches must not be negative, got {self.every}, {self.batches}"
            )
        if self.prompts and not self.seeds:
            raise ConfigError("prompts need at least one seed")
        for name, files in self.pictures.items():
            if files and len(files) != len(self.prompts):
                raise ConfigError(
                    f"there are {len(self.prompts)} prompts and {len(files)} {name}s: each prompt "
                    "has one"
                )
        if bool(self.images) != bool(self.masks):
            raise ConfigError("images and masks belong together: a mask says what of one is filled")

    @property
    def pictures(self) -> dict[str, tuple[str, ...]]:
        """Files by what they are to a task (`families.Task`), one for each prompt or none."""
        return {
            "reference": self.references,
            "image": self.images,
            "mask": self.masks,
            "control": self.controls,
        }
