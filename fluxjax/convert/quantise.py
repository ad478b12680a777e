"""Which layers are quantised, and how each form of file spells their codes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.quantised.quantise import quantised
from fluxjax.checkpoint.tensors import Tensor, of_array, reshape
from fluxjax.config import ConfigError
from fluxjax.models.quantised import LEVELS, Quantised
from fluxjax.networks import network_of
from fluxjax.networks.tables import Table
from fluxjax.quantised_kinds import KINDS

Kind = Literal["int8", "fp8", "nf4", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0"]
assert get_args(Kind) == KINDS
# The form of files that holds a kind; GGUF's block types are in the files of BFL's form.
FORMS: dict[str, Literal["diffusers", "bfl"]] = {"int8": "diffusers", "nf4": "diffusers"}
# llama.cpp's numbers of what most tensors of a file are.
_FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k": 14, "q5_k": 16, "q6_k": 18}


def is_gguf_kind(kind: str | None) -> bool:
    """Whether codes of this kind are written as GGUF."""
    return kind in _FILE_TYPES


def form_of(kind: str | None, form: Any) -> Any:
    """The form to write. Raises ConfigError for one that cannot hold the kind."""
    if kind is None:
        return form or "diffusers"
    own = FORMS.get(kind, "bfl")
    if form not in (None, own, "orbax"):
        raise ConfigError(f"--quantise {kind} is written as --to {own} or orbax, not {form}")
    return form or own


def quantise(
    tensors: Mapping[str, Tensor], config: Any, table: Table, kind: str, form: str
) -> dict[str, Tensor]:
    """Tensors under the names of `table`; those of the blocks' products have codes of `kind`, to be
    written in a `form`."""
    description = network_of(config)
    chosen = {
        name
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
        and all(re.fullmatch(description.quantised, part) for part in _parts(table, name))
    }
    if form == "diffusers":
        chosen = _as_bitsandbytes_finds_them(tensors, chosen, description.json.library)
    out = dict(tensors)
    for name in chosen:
        out[name] = quantised(tensors[name], kind, name) or tensors[name]
    if not any(tensor.packed for tensor in out.values()) and description.quantised:
        raise ConfigError(
            f"no layer of the {description.words} has rows that are whole blocks of {kind}"
        )
    return out


def _parts(table: Table, name: str) -> list[str]:
    """The published names that a tensor consists of."""
    matched = None if table.identity else engine.match_rule(table, name)
    return matched[1] if matched else [name]


def _as_bitsandbytes_finds_them(
    tensors: Mapping[str, Tensor], chosen: set[str], library: str
) -> set[str]:
    """What its two users look for when they open a folder.

    diffusers leaves out a layer by its path or by its last name, so that one at the top that is
    called as those in blocks must be quantised with them. transformers keeps T5's `wo` in float32.
    """
    if library == "transformers":
        return {name for name in chosen if not name.endswith(".wo.weight")}
    last = {name.removesuffix(".weight").rpartition(".")[2] for name in chosen}
    return chosen | {f"{name}.weight" for name in last if f"{name}.weight" in tensors}


def spelled(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """As tensors of a safetensors file: bitsandbytes' nf4 and int8, or ComfyUI's scaled fp8."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        packed, module = tensor.packed, name.removesuffix("weight")
        if packed is None or packed.kind != kind:
            out[name] = tensor
        elif kind == "nf4":
            out |= _nf4(name, tensor, packed)
        elif kind == "int8":
            absmax = packed.parts.get("absmax") or _times_127(packed.parts["scale"])
            out[name] = packed.parts["codes"]
            out[f"{module}SCB"] = reshape(absmax, absmax.shape[:1])
            out[f"{module}weight_format"] = of_array(np.array(0, np.uint8))
        else:
            out[name] = packed.parts["codes"]
            out[f"{module}scale_weight"] = _one(packed.parts["scale"])
    if kind == "fp8":
        codes = next(
            t.packed.parts["codes"].dtype
            for t in tensors.values()
            if t.packed and t.packed.kind == "fp8"
        )
        out["scaled_fp8"] = of_array(np.zeros(0, codes))
    return out


def _one(scale: Tensor) -> Tensor:
    """The scale that all rows share."""
    return Tensor((), scale.dtype, lambda a, b: scale.rows(0, 1).reshape(()))


def _times_127(scale: Tensor) -> Tensor:
    return Tensor(scale.shape, scale.dtype, lambda a, b: scale.rows(a, b) * np.float32(127))


def _nf4(name: str, tensor: Tensor, packed: Quantised) -> dict[str, Tensor]:
    codes, absmax = packed.parts["codes"], packed.parts["absmax"]
    dtype = tensor.dtype.name
    state = {
        "quant_type": "nf4",
        "blocksize": packed.columns // absmax.shape[1],
        "dtype": dtype,
        "shape": list(tensor.shape),
    }
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {
        name: _flat(codes, 1),
        f"{name}.absmax": _flat(absmax),
        f"{name}.quant_map": of_array(np.asarray(LEVELS["nf4"], np.float32)),
        f"{name}.quant_state.bitsandbytes__nf4": of_array(text),
    }


def _flat(tensor: Tensor, *last: int) -> Tensor:
    """All values as rows of one, read by whole rows of the matrix."""
    width = tensor.shape[1]

    def rows(a: int, b: int) -> np.ndarray:
        values = tensor.rows(a // width, -(-b // width)).reshape(-1, *last)
        return values[a % width : a % width + b - a]

    return Tensor((tensor.size, *last), tensor.dtype, rows, tensor.by_rows)


def bitsandbytes_config(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    """`quantization_config` for config.json, naming the layers that are left as they are."""
    kept = [
        name.removesuffix(".weight")
        for name, tensor in sorted(tensors.items())
        if name.endswith(".weight") and len(tensor.shape) == 2 and not tensor.packed
    ]
    four = kind == "nf4"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
    }


def gguf_keys(config: Any, kind: str, saved: str) -> dict[str, str | int]:
    """Key-values of a network's file; `saved` is our own text. Raises ConfigError for one that
    nobody keeps in GGUF."""
    description = network_of(config)
    architecture = description.gguf_architecture(config)
    if not architecture:
        raise ConfigError(
            f"there are no GGUF files of a {description.words}: quantise it to int8 or nf4, or "
            "give --to orbax"
        )
    return {
        "general.architecture": architecture,
        "general.quantization_version": 2,
        "general.file_type": _FILE_TYPES[kind],
        "fluxjax": saved,
    }
