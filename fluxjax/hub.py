"""Where a model's files are: the embedded one, a path on this machine, or a name on a hub.

A name is OWNER/NAME, OWNER/NAME@REVISION, or either with /FILE.safetensors or /FILE.gguf behind it,
for one file of a repository. A path that exists is never taken for one. huggingface_hub downloads,
with its own cache, tokens and settings (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, NoReturn

from fluxjax.config import ConfigError
from fluxjax.terminal import say

Kind = Literal["model", "configuration", "checkpoint", "vae", "text encoders", "tokenizer", "lora"]

_ASSETS = Path(__file__).resolve().parent / "assets"
_SHIPPED = r"[a-z][a-z\d-]{0,63}"
_NAME = (
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/pr/\d+|[\w.-]+))?"
    r"(?:/(?P<file>(?:[\w .+()-]+/)*[\w .+()-]+\.(?:safetensors|gguf)))?"
)
_WEIGHTS = (".safetensors", ".gguf")
_FILES = (*_WEIGHTS, ".ckpt", ".bin", ".pt", ".pth", ".png", ".toml")
_TEXT = (".json", ".txt", ".model", ".jinja")
_ENCODERS = r"(text_encoder|tokenizer)(_\d)?"
_NETWORK = r"text_encoder(_\d)?|transformer|unet|vae|controlnet(_\d)?|image_encoder|image_embedder"
_TOKENIZER = r"(tokenizer(_config)?|special_tokens_map|vocab)\.json|merges\.txt|spiece\.model"
_REPACKED = "text_encoders"  # ComfyUI's folder, in repositories that are made for it
_CARRIED = ("safety_checker", "feature_extractor")  # along by `convert`, and of no use here
_INDEX = "model_index.json"
_LORA = "pytorch_lora_weights.safetensors"


class Name(NamedTuple):
    """A repository of the hub, one of its branches, tags or commits, and a `file` of it, or ""."""

    repo: str
    revision: str
    file: str = ""


def tiny_folder() -> Path:
    """The embedded model, trained on drawn scenes."""
    return _ASSETS / "tiny"


def embedded_names() -> list[str]:
    """Of the models that are shipped, tiny and those beside it."""
    return sorted(folder.name for folder in _ASSETS.iterdir() if folder.is_dir())


def embedded_folder(source: str | Path) -> Path | None:
    """That of a model that is shipped, tiny or one beside it, of that name; None for any other."""
    folder = _ASSETS / str(source)
    return folder if re.fullmatch(_SHIPPED, str(source)) and folder.is_dir() else None


def embedded_adapter(source: str | Path) -> Path | None:
    """The shipped adapter of that name, with which tiny has learnt more; None for any other."""
    path = _ASSETS / f"{source}.safetensors"
    return path if re.fullmatch(_SHIPPED, str(source)) and path.is_file() else None


def shipped_folder(source: str | Path) -> Path | None:
    """Of a model that is shipped, as it is or with an adapter, its folder; None for any other."""
    return tiny_folder() if embedded_adapter(source) else embedded_folder(source)


def hub_name(source: str | Path) -> Name | None:
    """`source` as a name on the hub; None for a path that exists, or that can only be one."""
    match = re.fullmatch(_NAME, str(source))
    if match is None or Path(source).exists() or ".." in match["repo"] or "--" in match["repo"]:
        return None
    if match["repo"].lower().endswith(_FILES):
        return None
    return Name(match["repo"], match["revision"] or "main", match["file"] or "")


def is_cached(source: str) -> bool:
    """Whether something of what a hub's name stands for has been downloaded."""
    from huggingface_hub import constants

    name = hub_name(source)
    if name is None:
        return False
    return (Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}").is_dir()


def find(
    source: str | Path, kind: Kind = "model", check: Callable[[Path], Any] | None = None
) -> Path:
    """The folder or file of `source`; what only the hub has is downloaded, as far as `kind` needs.

    model: a whole pipeline, as far as it is run; configuration: its JSON files alone; checkpoint: a
    pipeline with what is carried along, the folder of one network, or a file; vae, text encoders:
    those folders of a pipeline, or a repository that is one; tokenizer: its files alone, of a
    repository of transformers; lora: a file. `check` sees a pipeline's folder before its weights
    are downloaded. A path comes back as it is, there or not: whoever opens it says what is wrong.

    Raises FileNotFoundError for what neither this machine nor the hub has, PermissionError for a
    gated model, ConfigError for a repository that holds no `kind`, each in one sentence.
    """
    embedded = embedded_folder(source)
    name = None if embedded else hub_name(source)
    if name is not None:
        return _download(name, kind, check)
    return embedded or Path(source).expanduser()


@functools.cache  # one process sees one state of a repository
def _download(name: Name, kind: Kind, check: Callable[[Path], Any] | None) -> Path:
    from fluxjax.hub_errors import explained

    with explained(name):
        files, folder = _listing(name)
        wanted = choose(files, name, kind)
        texts = [file for file in wanted if file.endswith(_TEXT)]
        for part in (texts, wanted) if check else (wanted,):
            lacking = [file for file in part if not (folder / file).is_file()]
            if lacking:
                size = sum(files[file] or 0 for file in lacking)
                say(f"downloading {name.repo}: {len(lacking)} file(s), {size / 1e6:.0f} MB")
                # The index last: half a model without it is none, also without a network.
                others = [file for file in lacking if file != _INDEX]
                for some in filter(None, (others, [_INDEX] * (_INDEX in lacking))):
                    _fetch(name, some)
                    _check_hashes(name, folder, some)
            if check is not None and part is texts and _INDEX in part:
                check(folder)
    if kind == "text encoders":
        place = PurePosixPath(wanted[0]).parent
        return folder / place if place.name == _REPACKED else folder
    return folder / wanted[0] if wanted[0].endswith(_WEIGHTS) else folder


def _fetch(name: Name, files: list[str]) -> None:
    import huggingface_hub as hub

    with _bars_on_a_terminal_only():
        hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=files)


def _check_hashes(name: Name, folder: Path, files: Collection[str]) -> None:
    """The cache calls large files by the hub's SHA-256 of them, and nobody has compared it.

    Raises OSError for one that came as another, and removes it.
    """
    from fluxjax.file_hash import hash_file

    for path in (folder / file for file in files):
        blob = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and hash_file(blob) != blob.name:
            for one in (path, blob):
                one.unlink()
            raise OSError(
                f"{path.relative_to(folder).as_posix()} of {name.repo} came damaged (its hash is "
                "not the hub's) and is removed: try again"
            )


def _listing(name: Name) -> tuple[dict[str, int | None], Path]:
    """The repository's files with their sizes, and the folder of the cache where they belong.

    Without a connection the files are those in the cache.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    from fluxjax.hub_errors import is_offline

    cache = Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"
    try:
        found = hub.HfApi().model_info(
            name.repo, revision=name.revision, files_metadata=True, timeout=20
        )
    except Exception as error:
        if not is_offline(error):
            raise
        branch = cache / "refs" / name.revision
        commit = branch.read_text().strip() if branch.is_file() else name.revision
        folder = cache / "snapshots" / commit
        if not folder.is_dir():
            raise
        paths = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}, folder
    if not re.fullmatch("[0-9a-f]{40,64}", str(found.sha)):  # it becomes the name of a folder
        raise LookupError(f"it has no commit but {found.sha!r}")
    files = {entry.rfilename: entry.size for entry in found.siblings or ()}
    return files, cache / "snapshots" / str(found.sha)


def choose(files: Collection[str], name: Name, kind: Kind) -> list[str]:
    """Which of a repository's files `kind` needs: never pickles, duplicates or other frameworks'.

    Raises ConfigError, naming what there is, if none will do or several would.
    """
    if name.file:
        if name.file not in files:
            _refuse(name, f"has no file {name.file}", files)
        return [name.file, *_beside(files, name.file)]
    if kind == "tokenizer":
        own = sorted(file for file in files if re.fullmatch(_TOKENIZER, file))
        return own or _refuse(name, "has no tokenizer", files)
    whole = _INDEX in files
    if kind == "configuration" and whole:
        texts = [file for file in files if file.endswith(".json") and ".index." not in file]
        return sorted(file for file in texts if file.count("/") < 2)
    if kind in ("model", "checkpoint") and whole:
        texts = [file for file in files if "/" not in file and file.endswith(".json")]
        return sorted(texts) + [file for part in _parts(files, kind) for file in part]
    encoders = [name for name in _folders(files) if re.fullmatch(_ENCODERS, name)]
    if kind == "text encoders" and encoders:
        return [file for part in encoders for file in _part(files, part)]
    if kind == "text encoders" and (alone := _text_files(files, name)):
        return alone
    if kind == "vae" and "vae/config.json" in files:
        return _part(files, "vae")
    if kind in ("vae", "checkpoint") and "config.json" in files:
        return ["config.json", *_weights(files, "")]
    if kind in ("configuration", "text encoders"):
        _refuse(name, f"has no {_INDEX if kind == 'configuration' else 'text_encoder'}", files)
    alone = [file for file in files if file.endswith(_WEIGHTS)]
    if kind in ("lora", "checkpoint"):  # of several, as training leaves them, diffusers' result
        alone = [file for file in alone if file == _LORA] or alone
    if len(alone) != 1:
        article = "a diffusers folder" if kind == "model" else f"one {kind} alone"
        _refuse(name, f"is not {article}", files)
    return [*alone, *_beside(files, alone[0])]


def _text_files(files: Collection[str], name: Name) -> list[str]:
    """One file of each text encoder, as ComfyUI calls them, of several the one in 16 bits: above
    all folders, or in one for them."""
    places = {str(PurePosixPath(file).parent) for file in files}
    repacked = sorted(place for place in places if PurePosixPath(place).name == _REPACKED)
    for place in (".", *repacked):
        inside = [file for file in files if str(PurePosixPath(file).parent) == place]
        if chosen := _text_files_of(inside, name):
            return chosen
    return []


def _text_files_of(paths: Collection[str], name: Name) -> list[str]:
    from fluxjax.checkpoint.weights_location import TEXT_FILES, fitting, in_16_bits

    named = {PurePosixPath(path).name: path for path in paths}
    chosen = []
    for pattern in sorted(TEXT_FILES):
        own = fitting(named, pattern, TEXT_FILES)
        whole = in_16_bits(own)
        if len(whole) > 1:
            listed = ", ".join(sorted(own)[:5])
            raise ConfigError(
                f"{name.repo} has several files of one text encoder ({listed}): download one of "
                "each into a folder, and give that"
            )
        chosen += [named[file] for file in whole]
    return chosen


def _beside(files: Collection[str], file: str) -> list[str]:
    """What says how much PEFT's adapters count."""
    config = str(PurePosixPath(file).with_name("adapter_config.json"))
    return [config] if config in files else []


def _folders(files: Collection[str]) -> list[str]:
    return sorted({file.partition("/")[0] for file in files if "/" in file})


def _parts(files: Collection[str], kind: Kind) -> Iterator[list[str]]:
    """Those of each folder of a pipeline. Some have weights that its index does not list, of
    another version or the same once more: XL's vae_1_0, Stable Diffusion 3.5's text_encoders."""
    for folder in _folders(files):
        part = _part(files, folder)
        if folder in _CARRIED:
            wanted = kind == "checkpoint"
        else:
            weights = any(file.endswith(".safetensors") for file in part)
            wanted = not weights or re.fullmatch(_NETWORK, folder) is not None
        if wanted:
            yield part


def _part(files: Collection[str], part: str) -> list[str]:
    """A component's folder: its configuration, its tokenizer, one set of its weights."""
    own = sorted(file for file in files if file.startswith(f"{part}/"))
    weights = _weights(own, f"{part}/")
    orbax = [] if weights else [file for file in own if file.startswith(f"{part}/params/")]
    texts = [file for file in own if file.endswith(_TEXT) or "." not in PurePosixPath(file).name]
    texts = [file for file in texts if file.count("/") == 1 and ".index." not in file]
    return [*texts, *weights, *orbax]


def _weights(files: Collection[str], folder: str) -> list[str]:
    """The plain .safetensors of a folder, or its shards with their index; else bf16, else fp16."""
    names = [file.removeprefix(folder) for file in sorted(files) if file.startswith(folder)]
    names = [file for file in names if "/" not in file and ".safetensors" in file]
    shards = [file for file in names if re.fullmatch(r"[^.]+-\d+-of-\d+\.safetensors", file)]
    index = [file for file in names if re.fullmatch(r"[^.]+\.safetensors\.index\.json", file)]
    plain = [file for file in names if re.fullmatch(r"[^.]+\.safetensors", file)]
    chosen = [*index, *shards] if index and shards else plain
    for variant in () if chosen else ("bf16", "fp16"):
        own = rf"\.{variant}(-\d+-of-\d+)?\.safetensors|\.safetensors\.index\.{variant}\.json"
        chosen = chosen or [file for file in names if re.search(f"({own})$", file)]
    return [folder + file for file in chosen]


def _refuse(name: Name, what: str, files: Collection[str]) -> NoReturn:
    alone = sorted(file for file in files if file.endswith(_WEIGHTS))
    listed = ", ".join(f"{name.repo}/{file}" for file in alone[:5])
    more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
    there = (
        f"name one of its files: {listed}{more}"
        if alone
        else "it has no .safetensors or .gguf file"
    )
    raise ConfigError(f"{name.repo} {what}; {there}")


@contextmanager
def _bars_on_a_terminal_only() -> Iterator[None]:
    import sys

    from huggingface_hub import constants, utils

    leave = sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    if leave or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def size_unit(model: str) -> int:
    """The pixels that widths are multiples of, or 1 where no folder's configuration tells it.

    Light: for refusing a size before anything is imported that could open the model.
    """
    folder = shipped_folder(model) or Path(model)
    try:
        kind = json.loads((folder / _INDEX).read_text("utf-8"))["_class_name"]
        config = json.loads((folder / "vae" / "config.json").read_text("utf-8"))
        halvings = len(config["block_out_channels"]) - 1
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 1
    # Tokens of FLUX, of Stable Diffusion 3 and of PixArt are 2 x 2 latents.
    more = {"Flux": 1, "StableDiffusion3": 1, "StableDiffusion": 0, "PixArt": 1}
    for start, patches in more.items():
        if str(kind).startswith(start) and halvings < 8:
            return 2 ** (halvings + patches)
    return 1
