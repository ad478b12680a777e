"""Writing LoRA files in the names of PEFT (diffusers'), kohya and ComfyUI."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.peft_config import PEFT_METADATA
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import ConfigError, LoraConfig
from fluxjax.config.choices import LoraNaming
from fluxjax.models.lora import dense_sites
from fluxjax.models.names import flatten, is_stacked, module_name
from fluxjax.networks.flux import BFL
from fluxjax.shapes import Params

OWN_METADATA = "fluxjax_lora"
PREFIXES: dict[LoraNaming, dict[str, str]] = {
    "peft": {
        "transformer": "transformer.",
        "text_encoder": "text_encoder.",
        "text_encoder_2": "text_encoder_2.",
    },
    "kohya": {
        "transformer": "lora_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te3_",
    },
    "comfy": {
        "transformer": "diffusion_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    },
}


def write_lora(
    path: Path,
    trees: Mapping[str, Params],
    config: LoraConfig | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    naming: LoraNaming = "peft",
    params: Params | None = None,
    dtype: Any = None,
) -> None:
    """Write LoRAs by component; layers with scale 0 are left out. See `write_adapters`.

    A DoRA is written in PEFT's names, a LoKr in LyCORIS' (those that SimpleTuner gives it, and
    kohya that of text encoders).

    `params`: as the transformer's look. `config` and `metadata` (the recipe, say) are kept beside.
    """
    texts = dict(metadata or {})
    if config is not None:
        values = dataclasses.asdict(config)
        texts[OWN_METADATA] = json.dumps(values)
    networks = {component: _modules(tree) for component, tree in trees.items()}
    if any("w1" in leaves for modules in networks.values() for leaves in modules.values()):
        arrays: dict[str, np.ndarray] = {}
        for component, modules in networks.items():
            arrays |= _lycoris_arrays(component, modules)
        _write(Path(path), arrays, texts, dtype)
        return
    adapters, magnitudes = {}, {}
    for component, modules in networks.items():
        adapters[component] = {name: _adapter(leaves) for name, leaves in modules.items()}
        vectors = {n: leaves["magnitude"] for n, leaves in modules.items() if "magnitude" in leaves}
        magnitudes |= {component: vectors} if vectors else {}
    write_adapters(
        path, adapters, texts, naming=naming, params=params, dtype=dtype, magnitudes=magnitudes
    )


def write_adapters(
    path: Path,
    adapters: Mapping[str, Mapping[str, Adapter]],
    metadata: Mapping[str, str],
    *,
    naming: LoraNaming = "peft",
    params: Params | None = None,
    dtype: Any = None,
    magnitudes: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Write low-rank products, by component and module, as safetensors.

    Every scale is multiplied into B, so that alpha is the rank for every reader: those that read
    it in the file (kohya), in the metadata (diffusers) or nowhere (ComfyUI). `peft` has the
    published names; `kohya` and `comfy` have BFL's, whose qkv are one module (block-diagonal, of
    threefold rank), for which the shapes of the transformer's `params` are needed if only some of
    its parts are adapted. `dtype` None keeps that of the arrays. `magnitudes`: a DoRA's vectors, by
    component and module, for `peft` alone.
    """
    magnitudes = magnitudes or {}
    if magnitudes and naming != "peft":
        raise ConfigError(f"a DoRA is written in PEFT's names, not in those of {naming}")
    texts, arrays = dict(metadata), dict[str, np.ndarray]()
    if naming == "peft":
        texts[PEFT_METADATA] = json.dumps(_peft_metadata(adapters, set(magnitudes)))
    down, up = ("lora_down", "lora_up") if naming == "kohya" else ("lora_A", "lora_B")
    for component, mine in adapters.items():
        mine = {module: _with_alpha_as_rank(adapter) for module, adapter in mine.items()}
        if naming != "peft" and component == "transformer":
            mine = _fused(mine, _widths(params))
        for module, adapter in mine.items():
            name = module.replace(".", "_") if naming == "kohya" else module
            name = PREFIXES[naming][component] + name
            arrays[f"{name}.{down}.weight"], arrays[f"{name}.{up}.weight"] = adapter.a, adapter.b
            if naming == "kohya":
                arrays[f"{name}.alpha"] = np.asarray(len(adapter.a), np.float32)
    for component, mine in magnitudes.items():
        for module, vector in mine.items():
            arrays[f"{PREFIXES[naming][component]}{module}.lora_magnitude_vector"] = vector
    _write(Path(path), arrays, texts, dtype)


def _write(
    path: Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str], dtype: Any
) -> None:
    if dtype is not None:
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    tensors = {name: of_array(np.ascontiguousarray(arrays[name])) for name in sorted(arrays)}
    write_safetensors(path, tensors, {"format": "pt", **texts})


def _lycoris_arrays(
    component: str, modules: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """LoKr, and LoRA beside it; scales are multiplied into it, and alpha is the rank."""
    arrays: dict[str, np.ndarray] = {}
    prefix = "lycoris_" if component == "transformer" else PREFIXES["kohya"][component]
    for module, leaves in modules.items():
        key, scale = f"{prefix}{module.replace('.', '_')}", leaves["scale"]
        rank = np.asarray(leaves["a"].shape[1] if "a" in leaves else 1, np.float32)
        arrays[f"{key}.alpha"] = rank
        if "w1" not in leaves:
            adapter = _with_alpha_as_rank(_adapter(leaves))
            arrays[f"{key}.lora_down.weight"] = adapter.a
            arrays[f"{key}.lora_up.weight"] = adapter.b
            continue
        arrays[f"{key}.lokr_w1"] = leaves["w1"].T * scale
        if "w2" in leaves:
            arrays[f"{key}.lokr_w2"] = leaves["w2"].T
        else:
            arrays[f"{key}.lokr_w2_a"], arrays[f"{key}.lokr_w2_b"] = leaves["b"].T, leaves["a"].T
    return arrays


def _with_alpha_as_rank(adapter: Adapter) -> Adapter:
    b = adapter.b.astype(np.float32) * np.float32(adapter.scale)
    return Adapter(adapter.a, b.astype(adapter.b.dtype), 1.0)


def _modules(tree: Params) -> dict[str, dict[str, np.ndarray]]:
    """Leaves of each adapted module, by its reference name."""
    flat = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    for module in dict.fromkeys(path[:-1] for path in flat):
        stacked = is_stacked(module)
        leaves = {path[-1]: leaf for path, leaf in flat.items() if path[:-1] == module}
        leaves = leaves if stacked else {name: leaf[None] for name, leaf in leaves.items()}
        for i in np.flatnonzero(leaves["scale"]):
            name = module_name(module, int(i) if stacked else None)
            found[name] = {leaf: values[i] for leaf, values in leaves.items()}
    return found


def _adapter(leaves: Mapping[str, np.ndarray]) -> Adapter:
    return Adapter(leaves["a"].T, leaves["b"].T, float(leaves["scale"]))


def _peft_metadata(
    adapters: Mapping[str, Mapping[str, Adapter]], dora: Collection[str]
) -> dict[str, Any]:
    """PEFT's LoraConfig of each network; modules that differ from the first have their own rank.
    `dora`: networks whose adapters have magnitudes."""
    found: dict[str, Any] = {}
    for component, mine in adapters.items():
        ranks = {name: len(adapter.a) for name, adapter in mine.items()}
        rank = next(iter(ranks.values()), 1)
        others = {f"^{name}": r for name, r in ranks.items() if r != rank}
        values = {
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(mine),
            "rank_pattern": others,
            "alpha_pattern": others,
        }
        values |= {"use_dora": True} if component in dora else {}
        found |= {f"{component}.{key}": value for key, value in values.items()}
    return found


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
                    f"{theirs} is one module in BFL's naming and the LoRA adapts only a part of "
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
