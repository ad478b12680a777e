"""What `python -m fluxjax.plan` is asked: a model, what is done with it, on which devices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.chips import CHIPS, Chip
from fluxjax.config import PRESETS, ConfigError, PipelineConfig
from fluxjax.config.choices import Remat, SequenceAttention
from fluxjax.hub import find, hub_name
from fluxjax.parallel.mesh_shape import MeshShape, parse_mesh
from fluxjax.plan.tools import Tools, read_tools
from fluxjax.quantised_kinds import DYNAMIC, LOADED, NONE
from fluxjax.sample.quantise_option import parse_quantise
from fluxjax.train.settings import Optimizer

Task = Literal["sample", "lora", "full"]
_Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
_Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
_Pictures = Annotated[
    tuple[Literal["reference", "image", "mask", "control"], ...],
    tyro.conf.arg(metavar="NAME ...", help_behavior_hint=""),
]
_Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]
_Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
_Chips = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Does it fit, and how fast can it be? Needs neither weights nor an accelerator."""

    model: _Model = "dev"
    """A preset (dev, schnell, tiny, ...), a folder with a model's config files, or a hub's name."""
    task: Task = "sample"
    """Draw pictures, train a LoRA, or train all of the transformer."""
    pictures: _Pictures = ()
    """Sampling: what is given besides text, of reference, image, mask and control; by default what
    the model needs."""
    controlnet: _Names = ()
    """Sampling: ControlNets, each union, union-2 or xlabs (the published sizes), or a folder."""
    redux: _Name = None
    """Sampling: Redux, dev or a folder of it."""
    ip_adapter: _Names = ()
    """Sampling: IP-Adapters, each of which sees one picture: xlabs, xlabs-2 (16 tokens), or files.
    """
    image_encoder: _Name = None
    """For IP-Adapters: a folder of CLIP; by default ViT-L/14."""
    mesh: str = ""
    """Such as fsdp=4,tensor=2; the rest of the devices shares out the batch."""
    devices: _Int = None
    """How many; by default as many as the mesh names."""
    batch: int = 1
    """Pictures at once, on all devices together."""
    width: _Int = None
    """Pixels; by default the model's own, as height, steps and text length."""
    height: _Int = None
    """Pixels."""
    frames: _Int = None
    """Of a clip."""
    steps: _Int = None
    """Denoising steps of a picture."""
    max_sequence_length: _Int = None
    """T5 tokens."""
    quantise: str = NONE
    """Weights in few bits: int8, nf4 or another kind of `fluxjax.sample --quantise`, for all
    networks or each, transformer=nf4,text_encoder_2=int8; of a LoRA's base."""
    offload: bool = False
    """Sampling: only the networks that are at work are on the device."""
    stream: bool = False
    """Sampling: the transformer's blocks lie in the host's memory."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and computation; what is trained is float32."""
    sequence: SequenceAttention = "auto"
    """Training: how attention works where the mesh splits the tokens of a picture."""
    remat: Remat = "full"
    """Training: the backward pass computes again nothing, all but dense layers, or every block."""
    accumulate: int = 1
    """Training: the batch is computed in so many parts."""
    optimizer: Optimizer = "adamw"
    """Training."""
    rank: int = 16
    """Training: of the LoRA."""
    ema: bool = False
    """Training: keep an average of the weights."""
    chips: _Chips = ()
    """By default all that are known, such as H100, A100, v5p."""
    json: bool = False
    """Print JSON instead of tables."""


def check(options: Options) -> None:
    """Raises ConfigError, or OSError, for what cannot be; before JAX is imported."""
    device_count(options)
    find_chips(options.chips)
    kinds = parse_quantise(options.quantise)
    if options.task == "full" and any(kind in LOADED for kind in kinds.values()):
        raise ConfigError("--quantise is for weights that are not trained: --task full trains all")
    if options.task != "sample" and (dynamic := DYNAMIC.keys() & kinds.values()):
        raise ConfigError(f"--quantise {min(dynamic)} rounds activations: it has no derivative")
    if (options.offload or options.stream) and (
        options.task != "sample" or device_count(options) > 1
    ):
        raise ConfigError("--offload and --stream are for --task sample on one device")
    if options.task != "sample" and (
        options.controlnet or options.redux or options.ip_adapter or options.pictures
    ):
        raise ConfigError("ControlNets, Redux, IP-Adapters and pictures are for --task sample")
    if options.rank < 1:
        raise ConfigError(f"rank must be at least 1, got {options.rank}")
    if hub_name(options.model) is None:  # what is to be downloaded is checked when it is there
        read_beside(options, read_model(options))


def device_count(options: Options) -> int:
    """Devices of the mesh. Raises ConfigError if `--devices` contradicts it."""
    shape = parse_mesh(options.mesh)
    named = shape.fsdp * shape.tensor * shape.sequence
    count = options.devices or named * (shape.data or 1)
    if count < 1 or count % named or (shape.data and count != named * shape.data):
        raise ConfigError(f"the mesh {options.mesh!r} does not fit {count} devices")
    return count


def mesh_shape(options: Options) -> MeshShape:
    """Raises ConfigError for a `--mesh` that is none."""
    return parse_mesh(options.mesh)


def read_model(options: Options) -> PipelineConfig:
    """The model's configuration, with sizes and steps as asked. Raises ConfigError, OSError."""
    if options.model in PRESETS:
        config = PRESETS[options.model]
    else:
        folder = find(options.model, "configuration")
        if not folder.exists():
            names = ", ".join(PRESETS)
            raise ConfigError(f"{options.model!r} is neither a preset ({names}) nor a folder here")
        config = read_config(folder)
    names = ("width", "height", "frames", "steps", "max_sequence_length")
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in (
        *given.items(),
        ("batch", options.batch),
        ("accumulate", options.accumulate),
    ):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if options.frames is not None:
        config.require_frames(options.frames)
    if config.tiling is None:
        given.pop("frames", None)
    config = dataclasses.replace(config, **given)
    config.require_size(config.width, config.height)
    config.require_whole(options.model, text_alone=options.task != "sample")
    return config


def read_beside(options: Options, config: PipelineConfig) -> Tools:
    """The networks of tools that are named. Raises ConfigError, OSError."""
    return read_tools(
        config,
        options.model,
        options.controlnet,
        options.redux,
        options.ip_adapter,
        options.image_encoder,
    )


def find_chips(names: tuple[str, ...]) -> tuple[Chip, ...]:
    """Chips by parts of their names. Raises ConfigError for a name that is none."""
    known = tuple(dict.fromkeys(CHIPS.values()))
    if not names:
        return known
    found: dict[Chip, None] = {}
    for name in names:
        hits = [chip for chip in known if name.lower() in chip.name.lower()]
        if not hits:
            listed = ", ".join(chip.name for chip in known)
            raise ConfigError(f"no chip is called {name!r}; there are {listed}")
        found |= dict.fromkeys(hits)
    return tuple(found)
