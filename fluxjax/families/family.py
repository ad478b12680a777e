"""What a family is: how its networks make a picture. Sampling, training and diff know only this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.config.choices import TOLD_PAIRS, Respacing, Spacing
from fluxjax.families.noise_path import NoisePath
from fluxjax.models.transformer_blocks import ImagePrompt
from fluxjax.schedules.step_table import Run
from fluxjax.shapes import Params

AnyArray = Array | np.ndarray
Apply = Callable[..., Any]
"""`flax.linen.Module.apply`, or what takes its place on a mesh (`parallel.apply.apply_on`)."""


class Conditioning(NamedTuple):
    """What a transformer hears of each prompt. `mask` is 1 at the tokens that it attends to, None
    where it attends to all, as FLUX does."""

    sequence: Float[AnyArray, "b text d"]
    mask: Int[AnyArray, "b text"] | None
    vector: Float[AnyArray, "b p"] | None
    sizes: Float[AnyArray, "b numbers"] | None = None
    """What a picture is said to be like besides: its sizes and its crop."""


class Tokens(NamedTuple):
    """Latents as a network takes them, channels last: a sequence, with where each token stands, or
    rows and columns, or frames, rows and columns."""

    values: Float[AnyArray, "b *image d"]
    positions: Num[AnyArray, "*image axes"] | None


class Steps(NamedTuple):
    """How a run goes from noise to a picture."""

    count: int | Sequence[float]
    """How many, or their own levels where a family takes them."""
    first: int = 0
    """The first that is run, for image to image."""
    sampler: str | None = None
    """Of `fluxjax.schedules.samplers`; None here and below: as the model has it."""
    spacing: Spacing | None = None
    """How the timesteps are spaced."""
    sigmas: Respacing | None = None
    """How the noise levels are spaced."""
    eta: float = 0.0
    """How much noise DDIM adds."""
    shift: float | None = None
    """How far a flow's levels are moved towards noise."""
    begin: float | None = None
    """Where another model hands over its latents, in place of `first`: part of the timesteps of
    training, from noise on."""
    end: float | None = None
    """Where they are handed over."""
    strength: float = 1.0
    """How much of an image is drawn anew, which `first` follows from."""
    paints: bool = False
    """Whether that is where its mask is white."""


class Guidance(NamedTuple):
    """What is asked for of guidance."""

    guidance: float
    """What diffusers calls guidance_scale."""
    true_cfg: float = 1.0
    """What it calls true_cfg_scale, beside embedded guidance."""
    negative_prompt: str | None = None
    image: float = 3.0
    """The scale of guidance by the frames that a clip is given."""
    oscillates: bool = True
    """Whether every second step of a clip, but for the first ones, is not guided."""
    frames: int = 1
    """Of the clip."""
    pictures: frozenset[str] = frozenset()
    """What is given, as a Task names it."""


class SkipLayers(NamedTuple):
    """What is asked for of skip-layer guidance, away from what a network is without some blocks."""

    blocks: tuple[int, ...]
    scale: float
    start: float
    """Part of the run, 0 to 1, after which it begins."""
    stop: float
    """Before which it ends."""


class LeftOut(NamedTuple):
    """Skip-layer guidance in a `forward`, or in each step of a run."""

    blocks: Bool[AnyArray, "*steps layers"]
    """Those that a third pass leaves out, of the first pass's text."""
    weight: Float[AnyArray, "*steps"]
    """Times which the first pass moves away from that one; where it is 0 nothing is computed."""


class Told(NamedTuple):
    """What a model may be told of a picture besides its prompt; sizes are (width, height)."""

    size: tuple[int, int]
    """That it is drawn in."""
    original_size: tuple[int, int] | None = None
    """That it had before it was cropped."""
    crop: tuple[int, int] | None = None
    """(left, top) of where it was cropped."""
    target_size: tuple[int, int] | None = None
    """That it was to have."""
    aesthetic_score: float = 6.0
    """How beautiful it is, 1 to 10."""
    fps: int = 24
    """Frames a second of a clip."""
    motion: int = 4
    """How much moves in it, 1 to 7; 0: it is not told."""
    clean: bool = False
    """Whether its prompt is cleaned as captions of the web are."""
    negative: bool = False
    """Whether all this is what the picture is not to be like, of which it has these sizes where
    they are told:"""
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    changed: bool = False
    """Whether an image is drawn anew."""


class Control(NamedTuple):
    """A ControlNet and what it sees. Of several passes it hears the first; all take its samples."""

    module: Any
    variables: Params
    picture: (
        Float[AnyArray, "b c h w"]
        | Float[AnyArray, "b image packed"]
        | Float[AnyArray, "b height width 3"]
    )
    """Latents, packed or not, or the pixels in [-1, 1] where the network has convolutions of its
    own."""
    scale: Float[AnyArray, "*steps"]
    """Of its samples, in a `forward` or in each step of a run; where it is 0 nothing is computed.
    """
    mode: Int[AnyArray, " b"] | None = None
    """The kind of control picture, for networks that know several."""
    heard: Conditioning | None = None
    """Of the first pass, where that is not among those of this forward."""


class Extras(NamedTuple):
    """What a forward is given besides state, times and text."""

    positions: Num[AnyArray, "*image axes"] | None
    """Of the state's tokens."""
    guidance: Float[AnyArray, " b"] | None = None
    """For the guidance embedding; models without one ignore it."""
    tokens: Tokens | None = None
    """More tokens, free of noise, after the state's (FLUX.1 Kontext's reference)."""
    channels: Float[AnyArray, "b *image c"] | None = None
    """More channels of the state's tokens, after its own (FLUX.1 Fill and Control)."""
    controls: tuple[Control, ...] = ()
    """What ControlNets add to the state's tokens, one after the other."""
    image_prompts: tuple[ImagePrompt, ...] = ()
    """What each IP-Adapter has them attend to beside, in each block."""
    left_out: LeftOut | None = None
    """Of two passes that are stacked in the batch."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one of diffusers' pipeline classes draws from besides text.

    Pictures are a `reference` (seen beside the new picture; of a clip its first frame), the `last`
    frame of a clip, a `video` that is a part of it, an `image` (what the new one starts
    from), its `mask` (white is painted anew) and a `control` (what the new one is shaped like).
    `masked` is the image with its mask cut out.
    """

    pictures: frozenset[str] = frozenset()
    draws: tuple[str, ...] = ("noise",)
    """What noise is drawn for, one after the other from one generator: `noise` and controls for
    each new picture, `image` and `masked` once for all. Of what is not here the posterior's mean is
    taken."""
    channels: tuple[str, ...] = ()
    """What is joined to the state's channels, in this order."""
    from_noise: bool = False
    """Whether a strength of 1 starts from noise alone, with no image encoded for it."""
    keeps: bool = False
    """Whether the image is put back after each step where the mask is black: where it is joined to
    the channels too, its posterior's mean, for which nothing is drawn."""
    strength: float | None = None
    """Of its image, unless told; None where there is none."""
    heard: bool = False
    """Whether a text encoder sees the reference beside the prompt."""
    stretched: bool = False
    """Of a clip: whether its first frame is stretched to its size, or fills it and loses the rest.
    """
    begins: bool = False
    """Of a clip: whether there is something of its first frame in what the run starts from."""

    bfl_text: int | None = None
    """The text length of BFL's own tool, where it is not the model's."""

    @property
    def reads_mask(self) -> bool:
        """Whether the network sees the mask, and paints the whole picture."""
        return "mask" in self.channels

    def with_noise_mask(self) -> Task:
        """And the rest is kept. Raises ConfigError where that would change nothing."""
        if not self.reads_mask:
            raise ConfigError(
                "noise_mask is for models that read a mask and draw the whole picture, such as "
                "FLUX.1 Fill and tiny-fill; others keep what lies outside of a mask without it"
            )
        return replace(self, keeps=True)

    def starts_from(self, strength: float | None) -> bool:
        """Whether there is something of the image in what the run starts from."""
        return "image" in self.pictures and not (self.from_noise and strength == 1)

    def drawn(self, strength: float | None) -> tuple[str, ...]:
        """`draws` of a run with this strength."""
        needed = (self.keeps and not self.reads_mask) or self.starts_from(strength)
        return tuple(draw for draw in self.draws if needed or draw != "image")

    def row_count(self, draw: str, count: int) -> int:
        """Rows of noise that are drawn for `count` pictures from one seed."""
        return count if draw == "noise" or draw.startswith("control") else 1


def second_prompts(
    prompts: Sequence[str], prompts_2: Sequence[str] | None, *, empty: bool = False
) -> Sequence[str]:
    """What another text encoder than the first reads. An empty text is as none, so that the prompt
    is read, as in diffusers, unless `empty` ones count. Raises ValueError where the numbers of
    prompts differ."""
    second = prompts if prompts_2 is None else prompts_2
    if len(second) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts, but {len(second)} second prompts")
    return second if empty else [a or b for a, b in zip(second, prompts, strict=True)]


def _as_written(prompt: str, told: Told) -> str:
    if told.clean:
        raise ConfigError("clean_caption is for PixArt, whose captions of training were cleaned so")
    return prompt


def _no_masks(*arguments: Any) -> Any:
    raise ConfigError("this model reads no mask")


def no_sizes(config: PipelineConfig, told: Told) -> None:
    """Raises ConfigError where a picture is said to be like what only one family hears of."""
    for name in TOLD_PAIRS:
        if getattr(told, name) is not None:
            raise ConfigError(f"{name} is told to Stable Diffusion XL alone")


def hear_anew(
    encode: Callable[..., Conditioning],
    encoders: Mapping[str, Any],
    params: Mapping[str, Params],
    ids: Any,
    heard: Conditioning,
    **options: Any,
) -> Conditioning:
    """`heard`, with what all text encoders of a family, which are of one kind, say now."""
    every = tuple(params[name] for name in encoders)
    return encode(tuple(encoders.values()), every, ids, **options)._replace(sizes=heard.sizes)


@dataclass(frozen=True, eq=False)
class Family:
    """Module-level functions, so that programs are compiled once; their types are those of FLUX's
    (`fluxjax.families.flux`), which say what each one does.

    `forward` is what a network predicts, for sampling, training, validation and diff alike; `hoist`
    is the same for a whole run, taken apart into what is done once and what each step does.
    """

    tasks: Mapping[str, Task]
    """By the class names in model_index.json."""
    tasks_of: Callable[..., list[Task]]
    joined: Callable[..., int]
    tokenize: Callable[..., tuple[Any, list[str]]]
    encode: Callable[..., Conditioning]
    text_shapes: Callable[..., tuple[Any, Conditioning]]
    scale: Callable[..., Any]
    networks: Callable[..., tuple[Any, tuple[Any, ...]]]
    state_shape: Callable[..., tuple[int, ...]]
    pack: Callable[..., Tokens]
    unpack: Callable[..., Float[AnyArray, "n c *size"]]
    run: Callable[..., Run]
    first_step: Callable[..., int]
    started: Callable[..., Float[AnyArray, "n c *size"]]
    passes: Callable[..., Float[np.ndarray, "steps differences *frames"]]
    forward: Callable[..., Any]
    hoist: Callable[..., tuple[Any, Callable[[Any, Any], Any]]]
    path: Callable[[Any], NoisePath]
    """What is trained: how pictures become noise, and what of that is predicted."""
    prompt_of: Callable[[str, Told], str] = _as_written
    mask_channels: Callable[..., Float[np.ndarray, "n c rows columns"]] = _no_masks
    sizes: Callable[..., Float[np.ndarray, " numbers"] | None] = no_sizes
    widened: Callable[..., Any] = lambda config, given: config
    shift: Callable[..., float] = lambda config, *size: 0.0
    """The logarithm by which noise levels of a picture or clip of so many latents are moved."""
    encode_anew: Callable[..., Conditioning] | None = None
    """What is heard where text encoders, by component, learn; None where they never do."""
    counted: Callable[..., Float[Array, "b *#image"]] | None = None
    """What each squared error is multiplied with where some of the state is given."""
    silenced: Callable[..., Conditioning] | None = None
    """What is heard where of single text encoders the empty prompt is, or nothing."""

    def shape_of(
        self, config: PipelineConfig, width: int, height: int, frames: int = 1
    ) -> tuple[int, ...]:
        """`state_shape` of a picture, or of a clip. Raises ConfigError for a size, or a number of
        frames, that the model does not draw."""
        config.require_frames(frames)
        clip = () if config.tiling is None else (frames,)
        return self.state_shape(config, width, height, *clip)

    def find_task(
        self, config: PipelineConfig, given: Iterable[str], *, noise_mask: bool = False
    ) -> Task:
        """The task of a model that is given these pictures, see `Task.with_noise_mask`.

        Raises ConfigError, which says what the model takes, if there is none.
        """
        given = frozenset(given)
        mine = self.tasks_of(config)
        for task in mine:
            if task.pictures == given:
                return task.with_noise_mask() if noise_mask else task
        takes = [_in_words(task.pictures) for task in mine]
        raise ConfigError(
            f"this model draws from {', or from '.join(takes)}; it was given {_in_words(given)}"
        )


def _in_words(pictures: Iterable[str]) -> str:
    words = {
        "reference": "a reference",
        "last": "a last frame",
        "video": "a video",
        "control": "a control",
        "image": "an image",
        "mask": "a mask",
    }
    names = [said for name, said in words.items() if name in pictures]
    if not names:
        return "text alone"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
