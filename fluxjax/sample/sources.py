"""The files that decide about a picture's pixels, and whether they are still the same."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxjax.checkpoint.lora.scaled_file import ADAPTER_CONFIG, peft_config_of, split_scale
from fluxjax.config import ConfigError
from fluxjax.hub import Kind, embedded_adapter, find, hub_name, shipped_folder

TINY = "tiny"
SINGLE = ("model", "text_encoders", "vae", "redux", "image_encoder", "refiner")
SCALED = {
    "lora": "LoRA file",
    "redux_image": "picture for Redux",
    "controlnet": "ControlNet folder",
    "ip_adapter": "IP-Adapter file",
}
"""Fields of Sources that hold several FILE:SCALE, and what one is called."""
TEXTS = ("quantise", "family")
"""Fields of Sources that are no files."""
_INDEX = ("model_index.json", "fluxjax.json")
_READ = {"text_encoders": r"(text_encoder|tokenizer)(_\d)?", "vae": "vae"}
"""Of a whole pipeline's folder that is given for these, which parts are read."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a pipeline is made of: an embedded model ("tiny", "tiny-edit"), paths or names on a hub;
    a LoRA is FILE:SCALE."""

    model: str = TINY
    text_encoders: str | None = None
    vae: str | None = None
    lora: tuple[str, ...] = ()
    redux: str | None = None
    """A folder of FLUX.1 Redux."""
    quantise: str | None = None
    """Of `load_pipeline`, where it is not the usual one."""
    family: str | None = None
    """Whose a single file is, of `load_pipeline`, where it was said."""
    redux_image: tuple[str, ...] = ()
    """The pictures that it reads, FILE:SCALE."""
    controlnet: tuple[str, ...] = ()
    """Folders (or files) of ControlNets, each with its scale."""
    ip_adapter: tuple[str, ...] = ()
    """Files of IP-Adapters, each with its scale."""
    image_encoder: str | None = None
    """The folder of the CLIP that sees for them."""
    refiner: str | None = None
    """The model that draws the last steps."""

    def files(self) -> dict[str, str]:
        """Paths by what they are: model, text_encoders, vae, redux, lora 1, lora 2 ..."""
        named = {name: getattr(self, name) for name in SINGLE}
        scaled = {
            f"{name} {i}": split_scale(one)[0]
            for name in SCALED
            for i, one in enumerate(getattr(self, name), start=1)
        }
        return {kind: path for kind, path in (named | scaled).items() if path is not None}

    def hashes(self) -> dict[str, str]:
        """SHA-256 by what it is of: "lora 1", or "model transformer" of a folder's parts.

        The files are read once, large ones then remembered (see `fluxjax.file_hash`).
        """
        return {
            f"{kind} {part}".strip(): digest
            for kind, path in self.files().items()
            for part, digest in hashes_of(path, kind).items()
        }


def hashes_of(source: str, kind: str) -> dict[str, str]:
    """SHA-256 of a file, or an adapter's folder, under "", of a model's parts under their names.
    Raises OSError."""
    from fluxjax.checkpoint.weights_location import (
        ST,
        TEXT_FILES,
        fitting,
        in_16_bits,
        named_parts,
    )
    from fluxjax.file_hash import hash_file, hash_files

    if adapter := embedded_adapter(source):
        return {**hashes_of(TINY, kind), "adapter": hash_file(adapter)}
    wanted: dict[str, Kind] = {
        **dict.fromkeys(("model", "refiner"), "model"),
        "text_encoders": "text encoders",
        "vae": "vae",
        "redux": "checkpoint",
        **dict.fromkeys(("controlnet", "ip_adapter", "image_encoder"), "checkpoint"),
    }
    path = find(source, wanted.get(kind.split()[0], "lora"))
    if path.is_file():
        config = peft_config_of(path) if kind.startswith("lora ") else None
        own = {"config": hash_file(config)} if config else {}
        return {"": hash_file(path), **own}
    if kind.startswith("lora "):  # PEFT's folder: its alpha counts too
        weights = sorted(file.name for file in path.glob("*.safetensors"))
        return {"": hash_files(path, [*weights, ADAPTER_CONFIG])}
    index = path / _INDEX[0]
    try:
        entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    except (ValueError, RecursionError):  # who loads the model says so
        entries = {}
    names = [name for name, entry in entries.items() if entry not in (None, [None, None])]
    if not entries:  # a folder of text encoders, or one network's
        names = [entry.name for entry in path.iterdir() if entry.is_dir()]
    names = [name for name in names if re.fullmatch(_READ.get(kind, ".*"), name)]
    files = set(named_parts(path, names)) - set(names)
    if not entries:
        named = [file.name for file in path.iterdir()]
        forms = [in_16_bits(fitting(named, pattern, TEXT_FILES)) for pattern in TEXT_FILES]
        weights = forms if kind == "text_encoders" else [fitting(named, f"*{ST}")]
        files = {name for names in weights for name in names}
    parts = {name: hash_files(path, [name]) for name in sorted(names) if (path / name).is_dir()}
    if files:
        parts["files"] = hash_files(path, sorted(files))
    if kind not in _READ:
        parts["index"] = hash_files(path, [name for name in _INDEX if (path / name).is_file()])
    return parts


def changed(then: Mapping[str, str], now: Mapping[str, str], kind: str) -> list[str]:
    """Names of what of a `kind` ("model", "lora 1") differs, of what is read."""
    read = rf"{kind}( ({_READ[kind]}|files))?" if kind in _READ else rf"{kind}( .*)?"
    mine = {name for name in then.keys() | now.keys() if re.fullmatch(read, name)}
    return sorted(name for name in mine if then.get(name) != now.get(name))


def is_name(source: str) -> bool:
    """Whether it is no path: an embedded model, or a name on a hub."""
    return shipped_folder(source) is not None or hub_name(source) is not None


def model_name(model: str) -> str:
    """As a picture's name and its parameters have it."""
    return Path(model).stem if model.endswith((".safetensors", ".gguf")) else Path(model).name


def absolute(source: str) -> str:
    """A path in full; an embedded model's and a hub's name as they are.

    Raises ConfigError for the home of a user that is not there.
    """
    if is_name(source):
        return source
    try:
        return str(Path(source).expanduser().absolute())
    except RuntimeError:
        raise ConfigError(f"{source}: there is no user of that name") from None


def absolute_lora(text: str) -> str:
    """FILE:SCALE with the file in full. Raises FileNotFoundError where there is none."""
    return absolute_scaled(text, SCALED["lora"])


def absolute_scaled(text: str, what: str) -> str:
    """As `absolute_lora`, of `what`."""
    file, scale = split_scale(text)
    if not is_name(file) and not Path(absolute(file)).exists():
        raise FileNotFoundError(f"there is no {what} {absolute(file)}")
    return f"{absolute(file)}:{scale:g}"


def replaced(sources: Sources, given: Mapping[str, object]) -> Sources:
    """With what is given in place of what is there; None and () count as not given. What is there
    beside a single file does not go with another model."""
    chosen = {name: value for name, value in given.items() if value not in (None, ())}
    if "model" in chosen:
        beside = {"family": None, "text_encoders": sources.text_encoders}
        if not str(chosen["model"]).endswith((".safetensors", ".gguf")):
            beside["text_encoders"] = None
        chosen = {**beside, **chosen}
    return dataclasses.replace(sources, **chosen)
