"""Writing LoRA files in the names of PEFT (diffusers') and of kohya."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.peft_config import PEFT_METADATA
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import ConfigError, LoraConfig
from fluxjax.models.lora import dense_sites
from fluxjax.models.names import flatten, is_stacked, module_name
from fluxjax.networks.flux import BFL
from fluxjax.shapes import Params

Naming = Literal["peft", "kohya"]
OWN_METADATA = "fluxjax_lora"


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
