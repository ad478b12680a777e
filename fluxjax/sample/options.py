"""The options of `python -m fluxjax.sample`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from fluxjax.config.choices import FileFamily, Respacing, Spacing
from fluxjax.sample.file_names import PATTERN
from fluxjax.sample.settings import Dtype, Noise, Rounding, VideoKind, brief


def _numbers(kind: Callable[[str], Any], words: str, metavar: str) -> Any:
    """An option's numbers, with commas between them, or None."""

    def parsed(texts: Sequence[str]) -> Any:
        try:
            return tuple(kind(text) for text in texts[0].split(","))
        except ValueError:
            raise ValueError(f"must be {words}, got {brief(texts[0])}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parsed,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value or ()))],
    )


_integers = partial(_numbers, int)
_SIDES = _integers("four integers, such as 0,0,256,0", "LEFT,TOP,RIGHT,BOTTOM")

# None stands for "not given": the model's own value, or that of --like.
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
_Path = Annotated[Path | None, tyro.conf.arg(help_behavior_hint="")]
_Int = Annotated[int | None, tyro.conf.arg(help_behavior_hint="")]
_Float = Annotated[float | None, tyro.conf.arg(help_behavior_hint="")]
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
_Blocks = Annotated[
    tuple[int, ...] | None,
    _integers("numbers of blocks, such as 7,8,9", "BLOCK,..."),
    tyro.conf.arg(help_behavior_hint=""),
]
_Range = Annotated[
    tuple[float, float] | None,
    _numbers(float, "two numbers, such as 0.01,0.2", "START,END"),
    tyro.conf.arg(help_behavior_hint=""),
]
_Flag = Annotated[bool | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="")]
_Family = Annotated[
    FileFamily | None,
    tyro.conf.arg(metavar=f"{{{','.join(get_args(FileFamily))}}}", help_behavior_hint=""),
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
_VideoKind = Annotated[
    VideoKind | None,
    tyro.conf.arg(metavar="{v2v_head,v2v_tail,v2v_head_easy,v2v_tail_easy}", help_behavior_hint=""),
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
    """tiny (the embedded model; with a reference, mask or control tiny-edit, -fill or -canny),
    tiny-pixart or tiny-sd (a PixArt and a Stable Diffusion of the same scenes), tiny-video (clips
    of one or two of the shapes), a diffusers or Orbax folder, a BFL file, or a whole Stable
    Diffusion in one file.
    """
    text_encoders: _Path = None
    """For a file without them: a folder with text_encoder, text_encoder_2, tokenizer and
    tokenizer_2, or with clip_l, clip_g, t5xxl and llava_llama3, as ComfyUI keeps them.
    Tokenizers that are nowhere are the published ones, from the hub."""
    vae: _Path = None
    """Another autoencoder than the model's own, which a BFL file lacks: a diffusers folder, or a
    file such as ae.safetensors."""
    family: _Family = None
    """Whose a single file is where it does not tell: sd2 (512 pixels) or sd2-v (768), above all."""
    first_frame_model: _Text = None
    """A model of pictures (FLUX.1) that draws a clip's first frame from the same prompt; it is kept
    beside the clip, as its --reference."""
    lora: _Loras = ()
    """A LoRA for the transformer, or several: --lora A.safetensors --lora B.safetensors:0.5."""
    refiner: _Path = None
    """Folder of Stable Diffusion XL's refiner, which draws the last steps."""
    refiner_start: _Float = None
    """After which part of the run, between 0 and 1; 0.8 by default."""
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
    flow_shift: _Float = None
    """How far a flow's noise levels are moved towards noise, in place of the model's own."""
    frames: _Int = None
    """Of a clip (Open-Sora, HunyuanVideo): 1 more than a multiple of 4; 1 draws a picture."""
    fps: _Int = None
    """Frames a second of a clip, 1 to 240."""
    motion: _Int = None
    """How much moves in a clip, 1 (nothing) to 7; 0: the model is not told."""
    image_guidance: _Float = None
    """The scale of guidance by the frames that a clip is given."""
    oscillation: bool = True
    """Every second step of a clip, but for the first ten, is not guided; --no-oscillation guides
    all."""
    guidance_rescale: _Float = None
    """How far classifier-free guidance is brought back to the spread of what it guides, 0 to 1."""
    negative_prompt: _Text = None
    """What not to draw; FLUX needs --true-cfg for it."""
    true_cfg: _Float = None
    """FLUX: classifier-free guidance above 1; needs --negative-prompt, which may be empty."""
    prompt_2: _Text = None
    """Another prompt for the second text encoder (FLUX: T5); the first reads PROMPT."""
    prompt_3: _Text = None
    """Another prompt for the third (T5 of Stable Diffusion 3)."""
    clip_skip: _Int = None
    """How many of CLIP's last layers are left out (Stable Diffusion)."""
    skip_layers: _Blocks = None
    """Skip-layer guidance of Stable Diffusion 3: away from what it draws without these blocks, such
    as 7,8,9 for 3.5 medium."""
    skip_layer_scale: _Float = None
    """How far; 2.8 by default."""
    skip_layer_range: _Range = None
    """START,END between 0 and 1: in which part of the run; 0.01,0.2 by default."""
    original_size: _Pair = None
    """WIDTH,HEIGHT that Stable Diffusion XL is told the picture had, before --crop."""
    crop: _Pair = None
    """LEFT,TOP where it is told that the picture was cropped."""
    target_size: _Pair = None
    """WIDTH,HEIGHT that it is told the picture is wanted in."""
    negative_original_size: _Pair = None
    """The same three of what the negative prompt describes, both sizes together; by default the
    picture's, or beside them no crop."""
    negative_crop: _Pair = None
    """LEFT,TOP."""
    negative_target_size: _Pair = None
    """WIDTH,HEIGHT."""
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
    """XLabs' IP-Adapter, or several, through which the blocks see pictures beside the prompt."""
    ip_image: _Files = ()
    """A picture for it, or several; one for each adapter, where there are several."""
    negative_ip_image: _Text = None
    """What it sees in the pass that --true-cfg guides away from; by default black."""
    image_encoder: _Path = None
    """Folder of the CLIP vision encoder that sees for it."""
    canny: _Thresholds = None
    """LOW,HIGH, such as 50,200: draw by the edges of the control, which is a photograph."""
    reference: _Text = None
    """A picture to edit (FLUX.1 Kontext), with --mask only where that is white; of a clip its first
    frame."""
    last: _Text = None
    """The last frame of a clip; --reference is its first."""
    loop: bool = False
    """End the clip with its first frame."""
    video: _Text = None
    """A clip that is a part of the new one, see --video-kind."""
    video_kind: _VideoKind = None
    """Its first or last frames; 33 of them, or ("easy") 65."""
    strength: _Float = None
    """How much of the image is drawn anew, above 0 and up to 1."""
    mask_crop: _Int = None
    """Draw the mask's surroundings alone, with so many pixels around, as large as the whole."""
    soft_mask: bool = False
    """The greyer the mask, the fewer steps change the image."""
    noise_mask: _Flag = None
    """A model that reads a mask (FLUX.1 Fill) keeps what lies outside of it as the autoencoder has
    it; by default tiny-fill alone does."""
    expand: _Sides = None
    """LEFT,TOP,RIGHT,BOTTOM: a border of so many pixels round the image, painted anew."""
    width: _Int = None
    """Pixels, a multiple of 16 (Stable Diffusion: 8); by default the given picture's, rounded down,
    or the model's."""
    height: _Int = None
    """Likewise."""
    size_bins: bool = True
    """A published PixArt draws in the nearest size that it was trained with, and the picture is
    resized; --no-size-bins draws in the size that is asked for."""
    clean_caption: bool = False
    """Clean PixArt's prompts as the captions of its training were: no addresses, marks, codes."""
    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Pictures per prompt, with seeds seed, seed + 1, ..."""
    seed: _Int = None
    """0 ... 2**64 - 1; a random one is drawn and printed."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out")
    """Folder, or a file name that ends in .png, .jpg or .webp, of a clip in .mp4 or .webp. Nothing
    is ever overwritten: where the name is taken the new picture gets a number."""
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
    """Tokens of a prompt; at most 512 of T5, or 77 where CLIP reads alone."""
    prompts: _Path = None
    """A file, or - for standard input: one prompt per line, or JSON lines of texts or settings
    such as {"prompt": "a star", "seed": 3, "number": 2, "lora": "style.safetensors:0.8"}."""
    like: _Path = None
    """Repeat a picture from the settings it carries; options given beside it take precedence."""
    like_anyway: bool = False
    """Repeat it although its model, a LoRA or a picture has changed."""
    like_paths: bool = False
    """Open every path that the picture names, not only those in the usual places."""
