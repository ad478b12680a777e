"""The settings of one picture: everything that decides about its pixels besides the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fluxjax.config import ConfigError
from fluxjax.config.base import MOST_LAYERS
from fluxjax.config.choices import (
    CONTROL_MODES,
    CONTROLS,
    IP_IMAGES,
    MAX_FPS,
    MAX_FRAMES,
    MAX_STEPS,
    TOLD_PAIRS,
    Respacing,
    Spacing,
)

if TYPE_CHECKING:
    from fluxjax.families.family import Guidance, SkipLayers, Steps, Told

Rounding = Literal["diffusers", "bfl", "none"]
Noise = Literal["torch", "jax"]
VideoKind = Literal["v2v_head", "v2v_tail", "v2v_head_easy", "v2v_tail_easy"]
Dtype = Literal["float32", "bfloat16"]
MAX_SEQUENCE_LENGTH = 512
SEED_LIMIT = 2**64
MAX_SKIP = 10  # a CLIP-L that is left two layers
MAX_SIDE = 16384  # pixels; one million tokens, more than any of these models can draw
MAX_GUIDANCE = 1000.0
MAX_SHIFT = 1000.0
MAX_SCALE = 100.0  # of what a ControlNet adds
MAX_THRESHOLD = 10_000  # of Canny's gradients, which are below
TASK_PICTURES = ("reference", "image", "mask", *CONTROLS, "last", "video")
CLIP_FIELDS = ("frames", "fps", "motion", "image_guidance", "oscillation", "loop", "video_kind")
"""Settings of clips alone."""
GUIDED_FIELDS = (
    "guidance_rescale",
    "negative_original_size",
    "negative_crop",
    "negative_target_size",
    "negative_aesthetic_score",
)
"""Settings of classifier-free guidance alone."""
PICTURES = (*TASK_PICTURES, *IP_IMAGES, "negative_ip_image")
ALPHA = "alpha"  # the mask that is the image's own transparency


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Raises ConfigError for values that no picture can be made with.

    `guidance` feeds the guidance embedding of distilled models. True classifier-free guidance is on
    with a `negative_prompt` and `true_cfg` above 1. `rounding` names the code whose rounding is
    followed: of timesteps in bfloat16, of the state between steps, and of the pixels (diffusers
    rounds them, bfl truncates), and what else differs between their tools; "none" avoids rounding
    wherever it can. PICTURES are files; with a `_sha256` it must still be the file with that hash.
    """

    prompt: str = ""
    prompt_2: str | None = None
    negative_prompt: str | None = None
    true_cfg: float = 1.0
    steps: int = 28
    guidance: float = 3.5
    width: int = 1024
    height: int = 1024
    seed: int = 0
    noise: Noise = "torch"
    rounding: Rounding = "diffusers"
    max_sequence_length: int = 512
    sampler: str | None = None
    """Of `fluxjax.schedules.samplers`; None: the model's own."""
    spacing: Spacing | None = None
    """How timesteps are spaced; None: as the model has it."""
    sigmas: Respacing | None = None
    """How noise levels are spaced; None: as the model has it."""
    eta: float = 0.0
    """How much noise DDIM adds: 0 none, 1 DDPM's."""
    flow_shift: float | None = None
    """How far a flow's noise levels are moved towards noise; None: as the model has it."""
    frames: int = 1
    """Of a clip; 1: a picture."""
    fps: int = 24
    """Frames a second of a clip."""
    motion: int = 4
    """How much is said to move in it, 1 (nothing) to 7; 0: nothing is said."""
    image_guidance: float = 3.0
    """The scale of guidance by the frames that a clip is given."""
    oscillation: bool = True
    """Whether every second step of a clip, but for the first ones, is not guided."""
    guidance_rescale: float = 0.0
    """How far classifier-free guidance is brought back to the spread of what it guides, 0 to 1."""
    clip_skip: int = 0
    """How many of CLIP's last layers are left out."""
    size_bins: bool = True
    """Whether PixArt draws in the nearest size of its training, and what comes is resized."""
    clean_caption: bool = False
    """Whether PixArt's prompts are cleaned as the captions of its training were."""
    prompt_3: str | None = None
    """What a third text encoder reads (T5 of Stable Diffusion 3); None: the prompt."""
    skip_layers: tuple[int, ...] | None = None
    """Blocks without which Stable Diffusion 3 draws what it is guided away from besides."""
    skip_layer_scale: float = 2.8
    """How far."""
    skip_layer_range: tuple[float, ...] = (0.01, 0.2)
    """Between which parts of the run, 0 to 1."""
    original_size: tuple[int, int] | None = None
    """(width, height) that the picture is said to have had (Stable Diffusion XL); None: its own."""
    crop: tuple[int, int] | None = None
    """(left, top) where it is said to have been cropped; None: nowhere."""
    target_size: tuple[int, int] | None = None
    """(width, height) that it is said to be wanted in; None: its own."""
    negative_original_size: tuple[int, int] | None = None
    """Likewise of what the negative prompt describes, here and below: both sizes together. None:
    the picture's, or beside them a crop nowhere."""
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    """How beautiful it is said to be (the refiner of XL), 1 to 10."""
    negative_aesthetic_score: float = 2.5
    """Likewise what the negative prompt describes."""
    reference: str | None = None
    reference_sha256: str | None = None
    last: str | None = None
    """The last frame of a clip, whose first one is the reference."""
    last_sha256: str | None = None
    loop: bool = False
    """Whether the reference is its last frame too."""
    video: str | None = None
    """A clip that is gone on with, or led up to."""
    video_sha256: str | None = None
    video_kind: VideoKind = "v2v_head"
    """Which part of the new clip it is: its first or last frames, 33 or ("easy") 65 of them."""
    image: str | None = None
    image_sha256: str | None = None
    mask: str | None = None
    """White is painted anew; "alpha": where the image is transparent."""
    mask_sha256: str | None = None
    control: str | None = None
    control_sha256: str | None = None
    control_2: str | None = None
    """The second ControlNet's own; without it all see the first."""
    control_2_sha256: str | None = None
    control_3: str | None = None
    control_3_sha256: str | None = None
    control_mode: tuple[str, ...] | None = None
    """What kind of picture each union ControlNet sees, see `fluxjax.config.CONTROL_MODES`."""
    control_scale: tuple[float, ...] | None = None
    """How strong each ControlNet is, or all; None: as they were loaded."""
    control_range: tuple[float, ...] | None = None
    """Between which parts of the run (0 to 1) each ControlNet counts, or all: (start, end, ...)."""
    ip_image: str | None = None
    """What an IP-Adapter sees; of several the other two below."""
    ip_image_sha256: str | None = None
    ip_image_2: str | None = None
    ip_image_2_sha256: str | None = None
    ip_image_3: str | None = None
    ip_image_3_sha256: str | None = None
    negative_ip_image: str | None = None
    """What it sees in the pass that is guided away from; None: black."""
    negative_ip_image_sha256: str | None = None
    ip_scale: tuple[float, ...] | None = None
    """How strong it is, in all blocks or in each; None: as it was loaded."""
    strength: float | None = None
    """How much of its steps image to image runs; None: the task's own."""
    refiner_start: float | None = None
    """After which part of the run a refiner takes over, 0 to 1; None: there is none, or at 0.8."""
    mask_crop: int | None = None
    """Only the surroundings of the mask are drawn, with a margin of so many pixels."""
    soft_mask: bool = False
    """Grey in the mask is painted in the later steps only."""
    noise_mask: bool = False
    """A model that reads a mask keeps what lies outside of it, latents by latents, as the
    autoencoder has it."""
    expand: tuple[int, int, int, int] | None = None
    """A border of so many pixels (left, top, right, bottom) round the image, painted anew."""
    canny: tuple[int, int] | None = None
    """The control's edges are drawn, found with these two thresholds."""

    def __post_init__(self) -> None:
        for name in _LISTS:
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("guidance", "true_cfg", "image_guidance"):
            value, most = getattr(self, name), MAX_GUIDANCE
            _require(math.isfinite(value), name, "a number", self)
            _require(abs(value) <= most, name, f"from {-most:g} to {most:g}", self)
        for name in ("width", "height"):
            _require(1 <= getattr(self, name) <= MAX_SIDE, name, f"from 1 to {MAX_SIDE}", self)
        if self.strength is not None:
            _require(0 < self.strength <= 1, "strength", "above 0 and at most 1", self)
        if self.refiner_start is not None:
            _require(0 < self.refiner_start < 1, "refiner_start", "above 0 and below 1", self)
        if self.mask_crop is not None:
            _require(0 <= self.mask_crop <= MAX_SIDE, "mask_crop", f"from 0 to {MAX_SIDE}", self)
        if self.expand is not None:
            fits = len(self.expand) == 4 and all(0 <= side <= MAX_SIDE for side in self.expand)
            wanted = f"four numbers of pixels from 0 to {MAX_SIDE}, not all of them 0"
            _require(fits and any(self.expand), "expand", wanted, self)
        if self.canny is not None:
            fits = len(self.canny) == 2 and 0 <= self.canny[0] <= self.canny[1] <= MAX_THRESHOLD
            wanted = f"two thresholds from 0 to {MAX_THRESHOLD}, the lower one first"
            _require(fits, "canny", wanted, self)
        self._check_controls()
        self._check_skip_layers()
        if self.sampler is not None:
            from fluxjax.schedules.samplers import NAMES

            _require(self.sampler in NAMES, "sampler", f"one of {', '.join(NAMES)}", self)
        for name in TOLD_PAIRS:
            if (pair := getattr(self, name)) is not None:
                fits = len(pair) == 2 and all(0 <= side <= MAX_SIDE for side in pair)
                _require(fits, name, f"two numbers of pixels from 0 to {MAX_SIDE}", self)
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            _require(0 <= getattr(self, name) <= 100, name, "from 0 to 100", self)
        if self.flow_shift is not None:
            _require(
                0 < self.flow_shift <= MAX_SHIFT,
                "flow_shift",
                f"above 0 and at most {MAX_SHIFT:g}",
                self,
            )
        for name, most in (("frames", MAX_FRAMES), ("fps", MAX_FPS)):
            _require(1 <= getattr(self, name) <= most, name, f"from 1 to {most}", self)
        _require(0 <= self.motion <= 7, "motion", "from 1 (nothing moves) to 7, or 0", self)
        for name in ("eta", "guidance_rescale"):
            _require(0 <= getattr(self, name) <= 1, name, "from 0 to 1", self)
        _require(0 <= self.clip_skip <= MAX_SKIP, "clip_skip", f"from 0 to {MAX_SKIP}", self)
        for name in TEXTS:
            check_text(name, getattr(self, name) or "")
        _require(1 <= self.steps <= MAX_STEPS, "steps", f"from 1 to {MAX_STEPS}", self)
        _require(0 <= self.seed < SEED_LIMIT, "seed", "from 0 to 2**64 - 1", self)
        _require(
            1 <= self.max_sequence_length <= MAX_SEQUENCE_LENGTH,
            "max_sequence_length",
            f"from 1 to {MAX_SEQUENCE_LENGTH}",
            self,
        )

    def _check_controls(self) -> None:
        most = len(CONTROLS)
        if (modes := self.control_mode) is not None:
            fits = 0 < len(modes) <= most and all(map(_is_mode, modes))
            known = ", ".join(CONTROL_MODES)
            _require(fits, "control_mode", f"one of {known} or a number, for each", self)
        if (scales := self.control_scale) is not None:
            fits = 0 < len(scales) <= most and all(abs(scale) <= MAX_SCALE for scale in scales)
            _require(fits, "control_scale", f"from {-MAX_SCALE:g} to {MAX_SCALE:g}, for each", self)
        if (each := self.ip_scale) is not None:
            fits = len(each) > 0 and all(abs(scale) <= MAX_SCALE for scale in each)
            _require(fits, "ip_scale", f"from {-MAX_SCALE:g} to {MAX_SCALE:g}", self)
        if (ends := self.control_range) is not None:
            pairs = list(zip(ends[::2], ends[1::2], strict=False))
            fits = 0 < len(ends) <= 2 * most and 2 * len(pairs) == len(ends)
            fits = fits and all(0 <= start < end <= 1 for start, end in pairs)
            _require(fits, "control_range", "a start and a later end from 0 to 1, for each", self)

    def _check_skip_layers(self) -> None:
        if (layers := self.skip_layers) is not None:
            fits = 0 < len(layers) <= MOST_LAYERS and all(0 <= i < MOST_LAYERS for i in layers)
            _require(fits, "skip_layers", "numbers of blocks from 0, such as 7,8,9", self)
        fits = abs(self.skip_layer_scale) <= MAX_SCALE
        _require(fits, "skip_layer_scale", f"from {-MAX_SCALE:g} to {MAX_SCALE:g}", self)
        ends = self.skip_layer_range
        fits = len(ends) == 2 and 0 <= ends[0] < ends[1] <= 1
        _require(fits, "skip_layer_range", "a start and a later end from 0 to 1", self)
        for field in dataclasses.fields(self):
            if field.name in ("skip_layer_scale", "skip_layer_range") and self.skip_layers is None:
                given = getattr(self, field.name) != field.default
                _require(not given, field.name, "given with skip_layers, such as 7,8,9", self)

    @property
    def asked_skip_layers(self) -> SkipLayers | None:
        from fluxjax.families.family import SkipLayers

        if self.skip_layers is None:
            return None
        return SkipLayers(self.skip_layers, self.skip_layer_scale, *self.skip_layer_range)

    def course(self, first_step: Callable[..., int], *, paints: bool = False) -> Steps:
        """How the run goes; `first_step` is the family's. `paints`: whether there is a mask, which
        need not be a file."""
        from fluxjax.families.family import Steps

        strength = 1.0 if self.strength is None else self.strength
        first = first_step(self.steps, strength, rounding=self.rounding)
        spaced = self.sampler, self.spacing, self.sigmas
        given = self.steps, first, *spaced, self.eta, self.flow_shift
        paints = paints or self.mask is not None
        return Steps(*given, end=self.refiner_start, strength=strength, paints=paints)

    @property
    def asked_guidance(self) -> Guidance:
        from fluxjax.families.family import Guidance

        clip = self.image_guidance, self.oscillation, self.frames
        return Guidance(self.guidance, self.true_cfg, self.negative_prompt, *clip)

    def told(self, *, negative: bool, changed: bool = False) -> Told:
        """What the model is told of the picture, or of what it is not to be like; `changed`: which
        is an image drawn anew."""
        from fluxjax.families.family import Told

        score = self.negative_aesthetic_score if negative else self.aesthetic_score
        return Told(
            (self.width, self.height),
            **{name: getattr(self, name) for name in TOLD_PAIRS},
            aesthetic_score=score,
            fps=self.fps,
            motion=self.motion,
            clean=self.clean_caption,
            negative=negative,
            changed=changed,
        )


def _is_mode(mode: str) -> bool:
    return mode in CONTROL_MODES or (mode.isdecimal() and len(mode) < 4)


def _require(condition: bool, name: str, wanted: str, settings: Settings) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {wanted}, got {brief(getattr(settings, name))}")


def brief(value: Any) -> str:
    """A value of a stranger as a message shows it: at most a line of it."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


def check_text(name: str, text: str) -> None:
    """Raises ConfigError for bytes that were no UTF-8 and for halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise ConfigError(
            f"{name} is not Unicode text: {what} at character {error.start + 1}; texts are UTF-8"
        ) from None


_LISTS = (
    "expand",
    "canny",
    *TOLD_PAIRS,
    "control_mode",
    "control_scale",
    "control_range",
    "ip_scale",
    "skip_layers",
    "skip_layer_range",
)
TEXTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt")
FIELDS = tuple(field.name for field in dataclasses.fields(Settings))
