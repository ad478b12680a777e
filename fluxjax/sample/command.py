"""What `python -m fluxjax.sample` does: settings from options, files and pictures; then drawing."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fluxjax import __version__
from fluxjax.config import ConfigError, multiple
from fluxjax.hub import hub_name, size_unit
from fluxjax.sample.settings import FIELDS, Dtype, Noise, Rounding, Settings, override

if TYPE_CHECKING:
    from fluxjax.sample.pipeline import Pipeline

# None stands for "not given": the model's own value, or that of --like.
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
_Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
_Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
_Dtype = Annotated[Dtype | None, tyro.conf.arg(metavar="{float32,bfloat16}", help_behavior_hint="")]
_Rounding = Annotated[
    Rounding | None, tyro.conf.arg(metavar="{diffusers,bfl,none}", help_behavior_hint="")
]
_Sequence = Annotated[
    Literal["auto", "ulysses", "ring"] | None,
    tyro.conf.arg(metavar="{auto,ulysses,ring}", help_behavior_hint=""),
]
_Noise = Annotated[Noise | None, tyro.conf.arg(metavar="{torch,jax}", help_behavior_hint="")]
_Loras = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="FILE[:SCALE]", help_behavior_hint=""),
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
    steps: _Int = None
    """Denoising steps."""
    guidance: _Float = None
    """Embedded guidance of distilled models, one pass per step."""
    negative_prompt: _Text = None
    """What not to draw; needs --true-cfg."""
    true_cfg: _Float = None
    """Classifier-free guidance above 1; needs --negative-prompt, which may be empty."""
    prompt_2: _Text = None
    """Another prompt for T5; CLIP reads PROMPT."""
    reference: _Path = None
    """A picture to edit (FLUX.1 Kontext); the new one takes its shape unless a size is given."""
    width: _Int = None
    """Pixels, a multiple of 16."""
    height: _Int = None
    """Pixels, a multiple of 16."""
    number: int = 1
    """Pictures per prompt, with seeds seed, seed + 1, ..."""
    seed: _Int = None
    """0 ... 2**64 - 1; a random one is drawn and printed."""
    out: Path = Path("out")
    """Folder, or a file name that ends in .png. Existing files are never overwritten."""
    grid: bool = False
    """Also save all pictures on one sheet, grid.png."""
    dtype: _Dtype = None
    """By default float32 on a CPU, bfloat16 elsewhere."""
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
    """T5 tokens, at most 512."""
    prompts: _Path = None
    """A file of JSON lines: texts, or settings such as {"prompt": "a star", "seed": 3}."""
    like: _Path = None
    """Repeat a picture from the settings it carries; options given beside it take precedence."""


def check(options: Options) -> None:
    """Raises ConfigError for what can be told before JAX is imported, in a fraction of a second."""
    if options.number < 1:
        raise ConfigError(f"number must be at least 1, got {options.number}")
    if options.like is not None and options.prompts is not None:
        raise ConfigError("give --like or --prompts, not both")
    if not options.prompt and options.like is None and options.prompts is None:
        raise ConfigError("there is nothing to draw: give a PROMPT, --prompts or --like")
    given = _given(options)
    unit = size_unit(options.model or "tiny")
    for name in ("width", "height"):
        if given[name] is not None:
            multiple(name, given[name], unit)
    override(Settings(), given)


def draw(options: Options) -> int:
    """Draw, save and report every picture that `options` ask for, once they are checked."""
    from fluxjax.parallel import hosts

    record = _record_of(options.like)
    source: dict[str, Any] = {
        name: _text(value) if value is not None else record.get(name)
        for name in ("model", "text_encoders", "vae", "dtype")
        for value in [getattr(options, name)]
    }
    source["model"] = source["model"] or "tiny"
    source["lora"] = _lora_texts(options.lora) or record.get("lora", [])

    from fluxjax.models.latents import latent_size
    from fluxjax.sample.cache import enable_cache
    from fluxjax.sample.loading import load_pipeline

    if note := enable_cache():
        _say(note)
    start = time.perf_counter()
    pipe = load_pipeline(
        source["model"],
        dtype=source["dtype"],
        text_encoders=source["text_encoders"],
        vae=source["vae"],
        loras=source["lora"],
        mesh=options.mesh,
        sequence=options.sequence or "auto",
    )
    pipe.seconds["loading"] += time.perf_counter() - start
    asked = repr(dataclasses.replace(options, process_id=None))
    hosts.agree({"options": hashlib.sha256(asked.encode()).hexdigest()[:16]})
    # Process 0 draws seeds and reads files for all.
    requests = [
        Settings(**values)
        for values in hosts.from_first(
            lambda: [
                dataclasses.asdict(settings)
                for settings in _requests(options, record.get("settings", {}), pipe)
            ]
        )
    ]
    for settings in requests:
        latent_size(settings.width, settings.height, pipe.config.vae)
    folder = options.out.parent if options.out.suffix == ".png" else options.out
    source["dtype"] = str(pipe.dtype)
    with hosts.others_may_end():
        _draw_all(pipe, requests, options, folder, source)
        hosts.barrier("drawn")  # who leaves earlier would be missed
    return 0


def _draw_all(
    pipe: Pipeline, requests: list[Settings], options: Options, folder: Path, source: dict
) -> None:
    """Every process draws; process 0 speaks and saves."""
    import jax

    from fluxjax.picture_sheet import picture_sheet
    from fluxjax.sample.known_words import EDITS, outside
    from fluxjax.sample.pictures import file_name, save

    made = {"fluxjax": __version__, **source}
    first = jax.process_index() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    drawn, told = [], set()
    for group in _together(requests, pipe.programs.rows("denoise", 1)):
        settings = group[0]
        prompts = [one.prompt for one in group]
        if source["model"] == "tiny":
            remarks = [outside(prompt) for prompt in prompts] + [EDITS] * bool(settings.reference)
            for note in dict.fromkeys(filter(None, remarks)):
                if first and note not in told:
                    _say(note)
                told.add(note)
        with _progress(settings) as progress:
            seeds = [one.seed for one in group]
            pictures = pipe.draw(settings, prompts=prompts, seeds=seeds, progress=progress)
        if not first:
            continue
        for note in dict.fromkeys(pipe.notes):
            _say(note)
        pipe.notes.clear()
        for settings, picture in zip(group, pictures, strict=True):
            name = file_name(settings.prompt, settings.seed)
            wanted = options.out if options.out.suffix == ".png" else folder / name
            path = save(picture, wanted, {**made, "settings": dataclasses.asdict(settings)})
            spent = "  ".join(f"{phase} {seconds:.2f} s" for phase, seconds in pipe.seconds.items())
            print(f"{path}  seed {settings.seed}  {spent}", flush=True)
            drawn.append(picture)
        pipe.seconds = dict.fromkeys(pipe.seconds, 0.0)
    if options.grid and first:
        sheet = {**made, "pictures": [dataclasses.asdict(settings) for settings in requests]}
        print(save(picture_sheet(drawn), folder / "grid.png", sheet))


def _together(requests: list[Settings], size: int) -> Iterator[list[Settings]]:
    """Runs of at most `size` requests that differ in prompt and seed alone: one batch each."""
    for _, run in itertools.groupby(
        requests, key=lambda one: dataclasses.replace(one, prompt="", seed=0)
    ):
        alike = list(run)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def _requests(options: Options, repeated: dict, pipe: Pipeline) -> Iterator[Settings]:
    """Settings of every picture: the model's, then --like's, the command line's, a line's."""
    base = override(pipe.defaults, repeated, str(options.like))
    given = _given(options)
    base = override(base, given)
    for values, where in _lines(options.prompts):
        settings = override(base, values, where)
        if settings.reference is not None:
            settings = _sized(settings, (repeated, given, values), pipe)
        if settings.negative_prompt is None and settings.true_cfg > 1:
            raise ConfigError('--true-cfg needs --negative-prompt; an empty one ("") will do')
        if settings.negative_prompt is not None and settings.true_cfg <= 1:
            raise ConfigError("--negative-prompt needs --true-cfg above 1, such as --true-cfg 3.5")
        if options.seed is None and "seed" not in values and "seed" not in repeated:
            settings = dataclasses.replace(settings, seed=secrets.randbelow(2**32))
        for i in range(options.number):
            yield dataclasses.replace(settings, seed=settings.seed + i)


def _given(options: Options) -> dict[str, Any]:
    """The settings on the command line; None is what is not there."""
    given = {name: getattr(options, name, None) for name in FIELDS}
    given["prompt"] = " ".join(options.prompt) if options.prompt else None
    given["reference"] = None if options.reference is None else _text(options.reference)
    return given


def _sized(settings: Settings, given: Iterable[dict], pipe: Pipeline) -> Settings:
    """With the hash of the reference, and with its shape where no width or height is given."""
    from fluxjax.sample.reference import read_reference

    assert settings.reference is not None
    picture, found = read_reference(settings.reference, settings.reference_sha256)
    size = dict(zip(("width", "height"), pipe.reference_size(picture), strict=True))
    free = {name: size[name] for name in size if all(one.get(name) is None for one in given)}
    return dataclasses.replace(settings, reference_sha256=found, **free)


def _lines(path: Path | None) -> Iterator[tuple[dict[str, Any], str]]:
    if path is None:
        yield {}, ""
        return
    count = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where, count = f"{path}, line {number}", count + 1
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error})") from None
        values = {"prompt": values} if isinstance(values, str) else values
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: must be a text or an object of settings, got {line[:60]}")
        if isinstance(values.get("reference"), str):  # beside the file, if its path is relative
            values["reference"] = _text(path.parent / Path(values["reference"]).expanduser())
        yield values, where
    if not count:
        raise ConfigError(f"{path} has no prompts")


def _record_of(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from fluxjax.sample.pictures import read_record

    record = read_record(path)
    for name in ("model", "text_encoders", "vae", "dtype"):
        if not isinstance(record.get(name), str | None):
            raise ConfigError(f"{path}: its {name} must be a text, got {record[name]!r}")
    loras = record.get("lora", [])
    if not isinstance(loras, list) or not all(isinstance(lora, str) for lora in loras):
        raise ConfigError(f"{path}: its lora must be a list of texts, got {loras!r}")
    return record


def _text(source: str | Path) -> str:
    """A model as it is remembered: paths in full, so that --like works from any folder."""
    if source in ("tiny", "float32", "bfloat16") or hub_name(source):
        return str(source)
    return str(Path(source).expanduser().resolve())


def _lora_texts(loras: tuple[str, ...]) -> list[str]:
    from fluxjax.sample.loading import split_scale

    return [f"{_text(file)}:{scale:g}" for file, scale in map(split_scale, loras)]


def _say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr, flush=True)


@contextmanager
def _progress(settings: Settings) -> Iterator[Callable[[int], None] | None]:
    """A bar of the steps on the first process's terminal; None elsewhere: the run is one call."""
    import jax

    from fluxjax.parallel import hosts

    if not hosts.from_first(sys.stderr.isatty):
        yield None
        return
    if jax.process_index() > 0:  # runs the same parts
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading and compiling", total=None)

        def report(done: int) -> None:
            bar.update(task, description="steps", total=settings.steps, completed=done)

        yield report
