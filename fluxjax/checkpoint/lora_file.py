"""LoRA files: reading every common naming, writing PEFT's (diffusers') and kohya's.

A file's module is looked up with its dots as underscores, under reference names and under BFL's,
so that one table serves diffusers, ai-toolkit, kohya, ComfyUI and fal. A module that BFL fuses
(qkv; qkv and MLP) is split: every part gets the same A and its own rows of B.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fluxjax.checkpoint.detect import detect_network
from fluxjax.checkpoint.engine import MappingError, listed
from fluxjax.checkpoint.file_format import PICKLES, pickle_refusal
from fluxjax.checkpoint.finite import is_finite, not_finite
from fluxjax.checkpoint.peft_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT_METADATA,
    PeftConfig,
    read_peft_config,
)
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.tensors import Tensor, of_array
from fluxjax.config import ConfigError, LoraConfig
from fluxjax.models.lora import Site, dense_sites
from fluxjax.models.names import flatten, is_stacked, module_name, unflatten
from fluxjax.networks.flux import BFL
from fluxjax.networks.tables import Rule
from fluxjax.shapes import Params

Naming = Literal["peft", "kohya"]
OWN_METADATA = "fluxjax_lora"

_PREFIX = re.compile(
    r"transformer\.|base_model\.model\.|(model\.)?diffusion_model\.|lora_unet_|lora_transformer_"
)
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down|down)|lora_B|lora_up|lora\.up|up)"
    r"(?:\.default)?\.weight|(?P<alpha>.+)\.alpha"
)
_FULL = {"a": "A (down)", "b": "B (up)"}
_DOUBLE, _SINGLE = "transformer_blocks.{}.attn", "single_transformer_blocks.{}"
_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_XLABS = (
    Rule("double_blocks.{}.processor.qkv_lora1", tuple(f"{_DOUBLE}.{name}" for name in _QKV)),
    Rule("double_blocks.{}.processor.qkv_lora2", tuple(f"{_DOUBLE}.{name}" for name in _ADDED)),
    Rule("double_blocks.{}.processor.proj_lora1", (f"{_DOUBLE}.to_out.0",)),
    Rule("double_blocks.{}.processor.proj_lora2", (f"{_DOUBLE}.to_add_out",)),
    Rule("single_blocks.{}.processor.qkv_lora", tuple(f"{_SINGLE}.attn.{name}" for name in _QKV)),
    Rule("single_blocks.{}.processor.proj_lora", (f"{_SINGLE}.proj_out",)),
)


class LoraFile(NamedTuple):
    """A LoRA tree of numpy arrays in the form of the parameters, and the file's metadata."""

    tree: dict[str, Any]
    metadata: dict[str, str]


class Adapter(NamedTuple):
    """What one module of a model gets: x (a b) scale, in the file's layout."""

    a: np.ndarray  # (rank, in)
    b: np.ndarray  # (out, rank)
    scale: float


class _Parts(NamedTuple):
    """Reference modules whose outputs one module of a file holds, one after the other."""

    names: tuple[str, ...]
    swap_halves: bool = False


def read_lora(path: Path, params: Params, *, dtype: Any = np.float32) -> LoraFile:
    """The LoRA in a safetensors file, for a FLUX transformer whose parameters look like `params`.

    `params`: arrays or ShapeDtypeStructs, stacked or per block. Where a file adapts some layers
    of a stack only, or with several ranks, the rest is zero.
    Raises MappingError listing every tensor that is unknown, missing, doubled, mis-shaped or not
    finite, ConfigError for kinds of adapters that are no LoRA, ValueError for a damaged file.
    """
    path = lora_path(Path(path))
    raw, metadata = read_safetensors(path)
    _refuse_others(path, raw)
    sites = list(dense_sites(params))
    shapes = {name: site.shape for site in sites for name in site.names}
    try:
        config = read_peft_config(path, metadata)
        if not config.where and _is_peft_folders(raw):
            raise ConfigError(
                f"how much it counts is in {ADAPTER_CONFIG}, which was saved with it: put that "
                "beside it"
            )
        adapters, errors = _adapters(raw, shapes, config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    targeted = config.targeted(shapes)
    errors += [f"missing: {name}" for name in targeted if name not in adapters]
    if errors:
        raise MappingError(f"{path}: {listed('do not fit as a LoRA of this transformer', errors)}")
    if not adapters:
        raise ConfigError(f"{path} holds no LoRA: it has no tensors")
    return LoraFile(_tree(sites, adapters, np.dtype(dtype)), metadata)


def _is_peft_folders(names: Collection[str]) -> bool:
    """Names that only PEFT writes, and no alpha; BFL's names under its prefix are fal's."""
    return all(name.startswith("base_model.model.") for name in names) and not any(
        re.search(r"(double|single)_blocks\.|alpha$", name.replace("single_transformer", ""))
        for name in names
    )


def lora_path(path: Path) -> Path:
    """The weights of a LoRA, which may be given as PEFT's folder.

    Raises FileNotFoundError, and ValueError for a pickle.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLES]
            if pickles:
                raise ValueError(pickle_refusal(pickles[0]))
            raise FileNotFoundError(f"{path} holds no LoRA: it has no .safetensors file")
        named = [file for file in files if file.name == ADAPTER_WEIGHTS] or files
        if len(named) > 1:
            names = ", ".join(file.name for file in named)
            raise ValueError(f"{path} holds several LoRAs, name one of: {names}")
        return named[0]
    if path.suffix.lower() in PICKLES:
        raise ValueError(pickle_refusal(path))
    if not path.exists():
        raise FileNotFoundError(f"there is no LoRA file {path}")
    return path


def _refuse_others(path: Path, names: Collection[str]) -> None:
    for pattern, what in (
        (r"query_norm\.scale|key_norm\.scale|norm_k\.weight|lora_B\.bias", "a control LoRA, which "
         "also widens the input and changes biases or norms: use the merged model"),
        (r"dora_scale|lora_magnitude_vector", "a DoRA, which also rescales the weights"),
        (r"\.lokr_|\.hada_|\.oft_", "a LyCORIS adapter (LoKr, LoHa or OFT)"),
    ):  # fmt: skip
        found = next((name for name in names if re.search(pattern, name)), None)
        if found:
            raise ConfigError(f"{path} is {what}; only LoRA is read (it has {found!r})")
    if names and not any(map(_KEY.fullmatch, names)):
        some = next(iter(names))
        try:
            network, _ = detect_network(dict.fromkeys(names, ()))
            what = f"it is a whole {network.words}, to be given as a model"
        except ConfigError:
            what = f"none of its {len(names)} tensors is one of a LoRA"
        raise ConfigError(f"{path} is no LoRA: {what} (it has {some!r})")


def _modules(shapes: Mapping[str, Any]) -> dict[str, _Parts]:
    """Module names that a file may use, dots as underscores."""
    known = {name.replace(".", "_"): _Parts((name,)) for name in shapes}
    blocks = max([int(n) for name in shapes for n in re.findall(r"\.(\d+)\.", name)], default=-1)
    for rule in (*BFL.rules, *_XLABS):
        for i in range(blocks + 1) if "{}" in rule.theirs else (0,):
            names = tuple(ours.format(i) for ours in rule.ours)
            if all(name in shapes for name in names):
                theirs = rule.theirs.format(i).replace(".", "_")
                known.setdefault(theirs, _Parts(names, rule.swap_halves))
    return known


def _adapters(
    raw: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], config: PeftConfig
) -> tuple[dict[str, Adapter], list[str]]:
    """Adapters by reference module, and what is wrong with each tensor that fits nowhere."""
    errors: list[str] = []
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in raw.items():
        match = _KEY.fullmatch(key)
        if match is None:
            errors.append(f"unknown: {key} {list(tensor.shape)}")
            continue
        part = "alpha" if match["alpha"] else "a" if match["down"] else "b"
        tensors = found.setdefault(match["module"] or match["alpha"], {})
        if part in tensors:
            errors.append(f"doubled: {key}")
        tensors[part] = tensor
    known, adapters = _modules(shapes), {}
    for module, tensors in found.items():
        plain = _PREFIX.sub("", module, count=1)
        parts = known.get(plain.replace(".", "_"))
        if parts is None:
            errors += [f"unknown: {module} ({', '.join(sorted(tensors))})"]
            continue
        missing = [name for name in "ab" if name not in tensors]
        if missing:
            errors += [f"missing: {_FULL[name]} of {module}" for name in missing]
            continue
        shape = _shape_error(module, tensors, parts, shapes)
        doubled = [name for name in parts.names if name in adapters]
        if shape or doubled:
            errors += [shape] if shape else []
            errors += [f"doubled: {module} is {name}, adapted already" for name in doubled]
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # said below
            a, b = (tensors[name].read().astype(np.float32) for name in "ab")
            scale = _scale(plain, tensors.get("alpha"), a.shape[0], config)
        if scale == 0:
            errors.append(f"alpha of {module} is 0, which some take for its rank and some for 0")
            continue
        values = {_FULL["a"]: a, _FULL["b"]: b, "alpha / rank": np.asarray(scale)}
        damaged = [f"{n} ({not_finite(v)})" for n, v in values.items() if not is_finite(v)]
        if damaged:
            errors.append(f"not finite: {module}: {', '.join(damaged)}")
            continue
        if parts.swap_halves:
            b = np.roll(b, len(b) // 2, axis=0)
        ends = np.cumsum([shapes[name][1] for name in parts.names])
        for name, rows in zip(parts.names, np.split(b, ends[:-1]), strict=True):
            # Of a block-diagonal B, a part needs only the ranks that reach it.
            block = len(parts.names) > 1 and b.any()
            used = rows.any(axis=0) if block else np.ones(len(a), bool)
            if used.any():
                adapters[name] = Adapter(a[used], rows[:, used], float(scale))
    return adapters, errors


def _shape_error(
    module: str,
    tensors: Mapping[str, Tensor],
    parts: _Parts,
    shapes: Mapping[str, tuple[int, int]],
) -> str:
    a, b = tensors["a"].shape, tensors["b"].shape
    fan_in, out = shapes[parts.names[0]][0], sum(shapes[name][1] for name in parts.names)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1 or (a[1], b[0]) != (fan_in, out):
        return (
            f"shape: {module} has {list(a)} and {list(b)}, expected [rank, {fan_in}] and "
            f"[{out}, rank]"
        )
    if "alpha" in tensors and tensors["alpha"].size != 1:
        return f"shape: {module}.alpha is {list(tensors['alpha'].shape)}, expected one number"
    return ""


def _scale(module: str, alpha: Tensor | None, rank: int, config: PeftConfig) -> np.float32:
    """`alpha / rank`; alpha is in the tensors (kohya), in PEFT's config or the rank."""
    if alpha is None:
        return np.float32(config.scale(module, rank))
    return np.float32(alpha.read().reshape(-1)[0].astype(np.float32) / rank)


def _tree(sites: list[Site], adapters: Mapping[str, Adapter], dtype: np.dtype) -> dict[str, Any]:
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for site in sites:
        members = [adapters.get(name) for name in site.names]
        rank = max((len(m.a) for m in members if m is not None), default=0)
        if not rank:
            continue
        (fan_in, out), layers = site.shape, len(members)
        a, b = np.zeros((layers, fan_in, rank), dtype), np.zeros((layers, rank, out), dtype)
        scale = np.zeros(layers, np.float32)
        for i, member in enumerate(members):
            if member is not None:
                a[i, :, : len(member.a)], b[i, : len(member.a)] = member.a.T, member.b.T
                scale[i] = member.scale
        for name, leaf in (("a", a), ("b", b), ("scale", scale)):
            flat[*site.module, name] = leaf if site.stacked else leaf[0]
    return unflatten(flat)


def write_lora(
    path: Path,
    tree: Params,
    config: LoraConfig | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    naming: Naming = "peft",
    params: Params | None = None,
    dtype: Any = None,
) -> None:
    """Write a LoRA as safetensors. Layers with scale 0 are left out.

    `peft`: `transformer.<module>.lora_A.weight` and alpha in the metadata, as diffusers has it.
    Tools that do not read the metadata assume that alpha is the rank: train with that, or write
    `kohya`, whose files carry each alpha; qkv are fused there (block-diagonal, of threefold rank),
    for which the shapes of the model's `params` are needed if only some of a fused module's parts
    are adapted. `config` and `metadata` (the recipe, say) are kept beside it; `dtype` None keeps
    the leaves'.
    """
    adapters = _from_tree(tree)
    texts = {"format": "pt", **(metadata or {})}
    if config is not None:
        values = {"rank": config.rank, "alpha": config.alpha, "targets": config.targets}
        texts[OWN_METADATA] = json.dumps(values)
    arrays: dict[str, np.ndarray] = {}
    if naming == "kohya":
        for module, adapter in _fused(adapters, _widths(params)).items():
            name = f"lora_unet_{module.replace('.', '_')}"
            arrays[f"{name}.lora_down.weight"] = adapter.a
            arrays[f"{name}.lora_up.weight"] = adapter.b
            arrays[f"{name}.alpha"] = np.asarray(adapter.scale * len(adapter.a), np.float32)
    else:
        texts[PEFT_METADATA] = json.dumps(_peft_metadata(adapters))
        for module, adapter in adapters.items():
            arrays[f"transformer.{module}.lora_A.weight"] = adapter.a
            arrays[f"transformer.{module}.lora_B.weight"] = adapter.b
    if dtype is not None:
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    tensors = {name: of_array(np.ascontiguousarray(arrays[name])) for name in sorted(arrays)}
    write_safetensors(Path(path), tensors, texts)


def _from_tree(tree: Params) -> dict[str, Adapter]:
    flat = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    adapters: dict[str, Adapter] = {}
    for module in dict.fromkeys(path[:-1] for path in flat):
        a, b, scale = (flat[*module, name] for name in ("a", "b", "scale"))
        if not is_stacked(module):
            a, b, scale = a[None], b[None], scale[None]
        for i in np.flatnonzero(scale):
            name = module_name(module, int(i) if is_stacked(module) else None)
            adapters[name] = Adapter(a[i].T, b[i].T, float(scale[i]))
    return adapters


def _peft_metadata(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """PEFT's LoraConfig; modules that differ from the first have their own rank and alpha."""
    ranks = {name: len(adapter.a) for name, adapter in adapters.items()}
    # Six digits: scales are float32, and 0.6666667 times 24 is meant to be 16.
    alphas = {n: float(f"{adapter.scale * len(adapter.a):.6g}") for n, adapter in adapters.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    values = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(adapters),
        "rank_pattern": {f"^{name}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
    }
    return {f"transformer.{key}": value for key, value in values.items()}


def _widths(params: Params | None) -> dict[str, int]:
    sites = () if params is None else dense_sites(params)
    return {name: site.shape[1] for site in sites for name in site.names}


def _fused(adapters: Mapping[str, Adapter], widths: Mapping[str, int]) -> dict[str, Adapter]:
    """Adapters under BFL's module names; parts that are not adapted get rows of zeros."""
    left, fused = dict(adapters), {}
    for name in adapters:
        for rule in BFL.rules:
            patterns = [re.escape(ours).replace(r"\{\}", r"(\d+)") for ours in rule.ours]
            match = next(filter(None, (re.fullmatch(p, name) for p in patterns)), None)
            if match is None or name not in left:
                continue
            theirs = rule.theirs.format(*match.groups())
            names = [ours.format(*match.groups()) for ours in rule.ours]
            unknown = [part for part in names if part not in left and part not in widths]
            if unknown:
                raise ConfigError(
                    f"{theirs} is one module in kohya's naming and the LoRA adapts only a part of "
                    f"it: the shapes of the model are needed for {', '.join(unknown)}"
                )
            joined = _join([left.pop(part) if part in left else widths[part] for part in names])
            if rule.swap_halves:
                joined = joined._replace(b=np.roll(joined.b, len(joined.b) // 2, axis=0))
            fused[theirs] = joined
    return fused


def _join(parts: list[Adapter | int]) -> Adapter:
    """One adapter with the outputs of several, one after the other; a number is rows of zeros."""
    if len(parts) == 1 and isinstance(parts[0], Adapter):
        return parts[0]
    adapters = [part for part in parts if isinstance(part, Adapter)]
    a = np.concatenate([part.a for part in adapters])
    rows = sum(part if isinstance(part, int) else len(part.b) for part in parts)
    b = np.zeros((rows, len(a)), adapters[0].b.dtype)
    row = column = 0
    for part in parts:
        if isinstance(part, int):
            row += part
            continue
        high, wide = part.b.shape
        b[row : row + high, column : column + wide] = part.b * part.scale
        row, column = row + high, column + wide
    return Adapter(a, b, 1.0)
