"""The options of `python -m fluxjax.sample`, and what can be said against them without JAX."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fluxjax.config import ConfigError, multiple
from fluxjax.config.choices import CONTROLS, IP_IMAGES, Respacing, Spacing
from fluxjax.hub import size_unit
from fluxjax.parallel.mesh_shape import parse_mesh
from fluxjax.picture_files import EXTENSIONS
from fluxjax.quantised_kinds import KEEP
from fluxjax.sample.file_names import FORMATS, PATTERN, check_pattern, is_picture_name
from fluxjax.sample.prompts_file import STANDARD_INPUT
from fluxjax.sample.quantise_option import parse_quantise
from fluxjax.sample.settings import (
    ALPHA,
    FIELDS,
    PICTURES,
    Dtype,
    Noise,
    Rounding,
    Settings,
    brief,
    override,
)
from fluxjax.sample.sources import SCALED, SINGLE, TINY, absolute, absolute_scaled, is_name

MOST_PICTURES = 2**20  # of one run


def _number(kind: Callable[[str], Any], words: str, metavar: str) -> Any:
    """An option's value or None, and one sentence for what is no number."""

    def parsed(texts: Sequence[str]) -> Any:
        try:
            return kind(texts[0])
        except ValueError:
            raise ValueError(f"must be {words}, got {brief(texts[0])}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parsed,
        is_instance=lambda value: value is None or isinstance(value, kind),  # pyright: ignore
        str_from_instance=lambda value: [str(value)],
    )


_INTEGER, _REAL = _number(int, "an integer", "INT"), _number(float, "a number", "FLOAT")


def _integers(words: str, metavar: str) -> Any:
    """An option's numbers, with commas between them, or None."""

    def parsed(texts: Sequence[str]) -> Any:
        try:
            return tuple(int(text) for text in texts[0].split(","))
        except ValueError:
            raise ValueError(f"must be {words}, got {brief(texts[0])}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parsed,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value or ()))],
    )


_SIDES = _integers("four integers, such as 0,0,256,0", "LEFT,TOP,RIGHT,BOTTOM")

# None stands for "not given": the model's own value, or that of --like.
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
_Int = Annotated[int | None, _INTEGER, tyro.conf.arg(help_behavior_hint="")]
_Float = Annotated[float | None, _REAL, tyro.conf.arg(help_behavior_hint="")]
_Sides = Annotated[tuple[int, int, int, int] | None, _SIDES, tyro.conf.arg(help_behavior_hint="")]
_Thresholds = Annotated[
    tuple[int, int] | None,
    _integers("two integers, such as 50,200", "LOW,HIGH"),
    tyro.conf.arg(help_behavior_hint=""),
]
_Pair = Annotated[
    tuple[int, int] | None,
    _integers("two integers, such as 1024,1024", "INT,INT"),
    tyro.conf.arg(help_behavior_hint=""),
]
_Dtype = Annotated[Dtype | None, tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="")]
_Rounding = Annotated[
    Rounding | None, tyro.conf.arg(metavar="{diffusers,bfl,none}", help_behavior_hint="")
]
_Sequence = Annotated[
    Literal["auto", "ulysses", "ring"] | None,
    tyro.conf.arg(metavar="{auto,ulysses,ring}", help_behavior_hint=""),
]
_Spacing = Annotated[
    Spacing | None,
    tyro.conf.arg(metavar="{leading,linspace,trailing}", help_behavior_hint=""),
]
_Respacing = Annotated[
    Respacing | None,
    tyro.conf.arg(metavar="{plain,karras,exponential,beta}", help_behavior_hint=""),
]
_Noise = Annotated[Noise | None, tyro.conf.arg(metavar="{torch,jax}", help_behavior_hint="")]
_Loras = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="FILE[:SCALE]", help_behavior_hint=""),
]
_Folders = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="FOLDER[:SCALE]", help_behavior_hint=""),
]
_Files = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE", help_behavior_hint="")
]
_Modes = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="MODE", help_behavior_hint="")
]
_Ranges = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="START,END", help_behavior_hint=""),
]
_Words = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT", help_behavior_hint="")
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw pictures from a prompt. Options that are not given are the model's own."""

    prompt: _Words = ()
    """What to draw. May be empty ("")."""
    model: _Text = None
    """tiny (the embedded model), a diffusers or Orbax folder, or a BFL file."""
    text_encoders: _Path = None
    """For a BFL file: folder with text_encoder, text_encoder_2, tokenizer and tokenizer_2."""
    vae: _Path = None
    """For a BFL file: folder of a diffusers autoencoder, or ae.safetensors."""
    lora: _Loras = ()
    """A LoRA for the transformer, or several: --lora A.safetensors --lora B.safetensors:0.5."""
    redux: _Path = None
    """Folder of FLUX.1 Redux, through which pictures are heard beside the prompt."""
    redux_image: _Loras = ()
    """A picture for Redux, or several with weights: --redux-image A.png:0.6 --redux-image B.png.
    """
    steps: _Int = None
    """Denoising steps."""
    sampler: _Text = None
    """Another sampler than the model's own: euler, heun, dpm++, dpm++1, dpm++3m or unipc; of Stable
    Diffusion also ddpm, ddim, pndm, euler-a, dpm++sde or lcm."""
    spacing: _Spacing = None
    """How the sampler's timesteps are spaced, for samplers that have them so."""
    sigmas: _Respacing = None
    """How the sampler's noise levels are spaced, for samplers that have them so."""
    eta: _Float = None
    """How much noise ddim adds, from 0 (none) to 1."""
    guidance: _Float = None
    """FLUX: embedded guidance, one pass per step. Stable Diffusion: classifier-free guidance, off
    at 1."""
    guidance_rescale: _Float = None
    """How far classifier-free guidance is brought back to the spread of what it guides, 0 to 1."""
    negative_prompt: _Text = None
    """What not to draw; FLUX needs --true-cfg for it."""
    true_cfg: _Float = None
    """FLUX: classifier-free guidance above 1; needs --negative-prompt, which may be empty."""
    prompt_2: _Text = None
    """Another prompt for the second text encoder (FLUX: T5); the first reads PROMPT."""
    clip_skip: _Int = None
    """How many of CLIP's last layers are left out (Stable Diffusion)."""
    original_size: _Pair = None
    """WIDTH,HEIGHT that Stable Diffusion XL is told the picture had, before --crop."""
    crop: _Pair = None
    """LEFT,TOP where it is told that the picture was cropped."""
    target_size: _Pair = None
    """WIDTH,HEIGHT that it is told the picture is wanted in."""
    aesthetic_score: _Float = None
    """How beautiful XL's refiner is told that the picture is, 1 to 10."""
    negative_aesthetic_score: _Float = None
    """Likewise of what the negative prompt describes."""
    image: _Text = None
    """A picture to start from; the new one takes its size, as it does that of the three below."""
    mask: _Text = None
    """White where the image is painted anew; "alpha": where the image is transparent."""
    control: _Files = ()
    """The edges or depths that the new picture is to have (FLUX.1 Canny and Depth, ControlNets);
    one for all, or one for each --controlnet."""
    controlnet: _Folders = ()
    """A ControlNet, or several: --controlnet A:0.7 --controlnet B:0.4 (folders or files)."""
    control_mode: _Modes = ()
    """Of a union ControlNet the kind of its control: canny, tile, depth, blur, pose, gray,
    low-quality, or a number."""
    control_range: _Ranges = ()
    """START,END, such as 0,0.8: between which parts of the run a ControlNet counts."""
    ip_adapter: _Loras = ()
    """XLabs' IP-Adapter, through which the blocks see pictures beside the prompt."""
    ip_image: _Files = ()
    """A picture for it, or several."""
    negative_ip_image: _Text = None
    """What it sees in the pass that --true-cfg guides away from; by default black."""
    image_encoder: _Path = None
    """Folder of the CLIP vision encoder that sees for it."""
    canny: _Thresholds = None
    """LOW,HIGH, such as 50,200: draw by the edges of the control, which is a photograph."""
    reference: _Text = None
    """A picture to edit (FLUX.1 Kontext); with --mask only where that is white."""
    strength: _Float = None
    """How much of the image is drawn anew, above 0 and up to 1."""
    mask_crop: _Int = None
    """Draw the mask's surroundings alone, with so many pixels around, as large as the whole."""
    soft_mask: bool = False
    """The greyer the mask, the fewer steps change the image."""
    expand: _Sides = None
    """LEFT,TOP,RIGHT,BOTTOM: a border of so many pixels round the image, painted anew."""
    width: _Int = None
    """Pixels, a multiple of 16 (Stable Diffusion: 8); by default the given picture's, rounded down,
    or the model's."""
    height: _Int = None
    """Likewise."""
    number: Annotated[int, _INTEGER, tyro.conf.arg(aliases=["-n"])] = 1
    """Pictures per prompt, with seeds seed, seed + 1, ..."""
    seed: _Int = None
    """0 ... 2**64 - 1; a random one is drawn and printed."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out")
    """Folder, or a file name that ends in .png, .jpg or .webp. Nothing is ever overwritten: where
    the name is taken the new picture gets a number."""
    name: str = PATTERN
    """Of the files in a folder: text with {prompt}, {seed}, {number}, {model}, {width}, {height},
    {steps} and {date}; may end in .png, .jpg or .webp."""
    record: bool = True
    """Write into each picture how it was made; --no-record writes nothing but the pixels."""
    grid: bool = False
    """Also save all pictures on one sheet, grid.png."""
    preview: _Int = None
    """Every so many steps write what the picture promises to be, to NAME.preview.png, which is
    removed when it is drawn."""
    preview_decoder: bool = False
    """Decode previews with the autoencoder: sharper and slower than the linear map."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Print the paths of the pictures and errors, nothing else."""
    dtype: _Dtype = None
    """By default float32 on a CPU, bfloat16 elsewhere."""
    quantise: _Text = None
    """Weights in few bits on the device: int8, fp8, nf4, q8_0, q6_k, q5_k, q4_k or q4_0, or for
    each network its own, transformer=nf4,text_encoder_2=int8; none decodes quantised files, which
    otherwise keep their codes. int8_dynamic and fp8_dynamic (on CUDA) round the activations too,
    and multiply 8 bits by 8 bits."""
    offload: bool = False
    """Only the networks that are at work are on the device: text encoders leave before denoising,
    the autoencoder comes after it. The same picture, more reading."""
    stream: bool = False
    """The transformer's blocks stay in the host's memory and come one at a time."""
    mesh: _Text = None
    """Devices along data, fsdp, tensor and sequence, such as fsdp=4,tensor=2; the rest is data."""
    sequence: _Sequence = None
    """How attention works where the mesh splits the tokens of a picture."""
    coordinator: _Text = None
    """HOST:PORT of process 0, for several processes started by hand."""
    process_id: _Int = None
    """This process's number, from 0."""
    num_processes: _Int = None
    """How many processes there are."""
    rounding: _Rounding = None
    """Follow the rounding of diffusers, of bfl, or avoid it (none)."""
    noise: _Noise = None
    """torch: what PyTorch's CPU generator draws for the seed; jax: jax.random."""
    max_sequence_length: _Int = None
    """Tokens of a prompt; FLUX at most 512 of T5, Stable Diffusion at most 77."""
    prompts: _Path = None
    """A file, or - for standard input: one prompt per line, or JSON lines of texts or settings
    such as {"prompt": "a star", "seed": 3, "number": 2, "lora": "style.safetensors:0.8"}."""
    like: _Path = None
    """Repeat a picture from the settings it carries; options given beside it take precedence."""
    like_anyway: bool = False
    """Repeat it although its model, a LoRA or a picture has changed."""
    like_paths: bool = False
    """Open every path that the picture names, not only those in the usual places."""


def check(options: Options) -> None:
    """Raises ConfigError, or OSError, for what cannot be; before JAX is imported."""
    if not 1 <= options.number <= MOST_PICTURES:
        least = "at least 1" if options.number < 1 else f"at most {MOST_PICTURES}"
        raise ConfigError(f"number must be {least}, got {brief(options.number)}")
    if options.prompts is not None and (options.prompt or options.like is not None):
        other = "--like" if options.like is not None else "a PROMPT"
        raise ConfigError(f"give {other} or --prompts, not both")
    if options.like is None and (options.like_anyway or options.like_paths):
        raise ConfigError("--like-anyway and --like-paths say how to take --like: give that too")
    if not options.prompt and options.like is None and options.prompts is None:
        raise ConfigError("there is nothing to draw: give a PROMPT, --prompts or --like")
    if options.preview is not None and options.preview < 1:
        raise ConfigError(f"preview must be at least 1 step, got {brief(options.preview)}")
    if options.preview_decoder and options.preview is None:
        raise ConfigError("--preview-decoder decodes previews: give --preview N too")
    given = given_settings(options)
    override(Settings(), given)
    unit = size_unit(options.model or TINY)
    for name in ("width", "height"):
        if given[name] is not None:
            multiple(name, given[name], unit)
    sources = given_sources(options)
    _check_model(sources["model"])
    if options.like is None and (sources["redux"] is None) != (sources["redux_image"] == ()):
        raise ConfigError("--redux FOLDER and --redux-image FILE belong together: give both")
    if options.controlnet and not options.control and not (options.like or options.prompts):
        raise ConfigError("--controlnet FOLDER needs a picture that it sees: give --control FILE")
    _check_ip_adapter(options)
    if sources["redux"] and not (is_name(sources["redux"]) or Path(sources["redux"]).exists()):
        raise FileNotFoundError(f"there is no Redux folder {sources['redux']}")
    named = [(f"{name} picture", given[name]) for name in PICTURES]
    for kind, path in (*named, ("file", options.prompts)):
        if path not in (None, STANDARD_INPUT, ALPHA) and not Path(path).exists():
            raise FileNotFoundError(f"there is no {kind} {path}")
    parse_mesh(options.mesh or "")
    if options.mesh is not None and (options.offload or options.stream):
        raise ConfigError("--offload and --stream are for one device: give them or --mesh")
    parse_quantise(options.quantise or KEEP)
    if options.canny is not None:
        from fluxjax.sample.edges import require_opencv

        require_opencv()
    check_pattern(options.name)
    destination(options)
    if options.like is not None:
        from fluxjax.sample.picture_record import remembered

        remembered(options.like)


def _check_ip_adapter(options: Options) -> None:
    if len(options.ip_adapter) > 1:
        raise ConfigError(f"one IP-Adapter sees all pictures, got {len(options.ip_adapter)}")
    if options.like or options.prompts:
        return
    if options.ip_adapter and not options.ip_image:
        raise ConfigError("--ip-adapter FILE needs a picture that it sees: give --ip-image FILE")
    if options.ip_image and not options.ip_adapter:
        raise ConfigError("--ip-image is seen by an IP-Adapter: give --ip-adapter FILE")


def _check_model(model: str | None) -> None:
    """Raises FileNotFoundError, with the name that may be meant."""
    if model is None or is_name(model) or Path(model).exists():
        return
    from difflib import get_close_matches

    path = Path(model)
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    near = get_close_matches(path.name, [TINY, *(entry.name for entry in beside)], 1)
    what = "file" if path.suffix else "folder"
    meant = f"; did you mean {near[0]}?" if near else ""
    raise FileNotFoundError(f"there is no model {what} {path}{meant}")


def given_settings(options: Options) -> dict[str, Any]:
    """The settings on the command line; None is what is not there."""
    given = {name: getattr(options, name, None) for name in FIELDS}
    given["prompt"] = " ".join(options.prompt) if options.prompt else None
    for option, names, files in (
        ("--control", CONTROLS, options.control),
        ("--ip-image", IP_IMAGES, options.ip_image),
    ):
        if len(files) > len(names):
            raise ConfigError(
                f"{option} is given {len(files)} times, and at most {len(names)} go together"
            )
        given[names[0]] = None
        given |= dict(zip(names, files, strict=False))
    given["control_mode"] = options.control_mode or None
    given["control_range"] = _ranges(options.control_range) or None
    for name in PICTURES:
        if given[name] is not None and (name, str(given[name])) != ("mask", ALPHA):
            given[name] = absolute(str(given[name]))
    return {**given, "soft_mask": options.soft_mask or None}


def _ranges(texts: tuple[str, ...]) -> tuple[float, ...]:
    try:
        return tuple(float(part) for text in texts for part in _pair(text))
    except ValueError:
        shown = " ".join(texts)
        raise ConfigError(
            f"--control-range must be START,END, such as 0,0.8, got {brief(shown)}"
        ) from None


def _pair(text: str) -> tuple[str, str]:
    start, end = text.split(",")
    return start, end


def given_sources(options: Options) -> dict[str, Any]:
    """The fields of Sources on the command line, in full; None or () is what is not there."""
    paths = {name: getattr(options, name) for name in SINGLE}
    given: dict[str, Any] = {name: p and absolute(str(p)) for name, p in paths.items()}
    given["quantise"] = options.quantise
    for name, what in SCALED.items():
        given[name] = tuple(absolute_scaled(one, what) for one in getattr(options, name))
    return given


def destination(options: Options) -> tuple[Path, Path | None]:
    """(folder, file): `file` where one picture's own name is given.

    Raises ConfigError for a name of another kind, NotADirectoryError and PermissionError for a
    folder that cannot be made or written.
    """
    out = options.out.expanduser()
    file = out if is_picture_name(out) and not out.is_dir() else None
    if file is None and not out.is_dir():
        if out.suffix.lower() in EXTENSIONS:
            known = ", ".join(FORMATS)
            raise ConfigError(f"{out}: pictures are written as {known}, not as {out.suffix}")
        if out.exists():
            raise ConfigError(f"{out} is a file, but no picture's: give a folder, or a new name")
    if file is not None and options.name != PATTERN:
        raise ConfigError("--out names the file, and so does --name: give a folder as --out")
    folder = out if file is None else out.parent
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file: no folder {folder} can be made there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written: pictures are to go into {folder}")
    return folder, file
