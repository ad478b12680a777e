"""Writing LoRA files in the names of PEFT (diffusers'), kohya and ComfyUI."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.original_names import in_original_names, prefix_of
from fluxjax.checkpoint.lora.peft_config import PEFT_METADATA
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import DEV, ConfigError, LoraConfig
from fluxjax.config.choices import LoraNaming
from fluxjax.models.names import flatten, is_stacked, module_name
from fluxjax.shapes import Params

OWN_METADATA = "fluxjax_lora"
_CLIP = "text_model."


def write_lora(
    path: Path,
    trees: Mapping[str, Params],
    config: LoraConfig | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    naming: LoraNaming = "peft",
    model: Mapping[str, Any] | None = None,
    dtype: Any = None,
    changes: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Write LoRAs by component; layers with scale 0 are left out. See `write_adapters`.

    A DoRA is written in PEFT's names, a LoKr in LyCORIS' (those that SimpleTuner gives it, and
    kohya that of text encoders).

    `config` and `metadata` (the recipe, say) are kept beside. `changes`: what is added to
    parameters besides, by component and published name, for `peft` alone; of a layer that has both
    they become one.
    """
    texts = dict(metadata or {})
    if config is not None:
        values = dataclasses.asdict(config)
        texts[OWN_METADATA] = json.dumps(values)
    networks = {component: _modules(tree) for component, tree in trees.items()}
    if any("w1" in leaves for modules in networks.values() for leaves in modules.values()):
        arrays: dict[str, np.ndarray] = {}
        for component, modules in networks.items():
            own = component in ("transformer", "unet")
            prefix = "lycoris_" if own else prefix_of("kohya", component, model)
            arrays |= _lycoris_arrays(prefix, modules)
        _write(Path(path), arrays, texts, dtype)
        return
    adapters, magnitudes = {}, {}
    for component, modules in networks.items():
        adapters[component] = {name: _adapter(leaves) for name, leaves in modules.items()}
        vectors = {n: leaves["magnitude"] for n, leaves in modules.items() if "magnitude" in leaves}
        magnitudes |= {component: vectors} if vectors else {}
    whole = {
        component: _with_products(mine, adapters.get(component, {}))
        for component, mine in (changes or {}).items()
    }
    write_adapters(
        path,
        adapters,
        texts,
        naming=naming,
        model=model,
        dtype=dtype,
        magnitudes=magnitudes,
        changes=whole,
    )


def _with_products(
    changes: Mapping[str, np.ndarray], adapters: dict[str, Adapter]
) -> dict[str, np.ndarray]:
    """The changes of weights with the products of the same layers, which leave `adapters`."""
    both = {n: adapters.pop(m) for n in changes if (m := n.removesuffix(".weight")) in adapters}
    product = {name: (one.b @ one.a) * np.float32(one.scale) for name, one in both.items()}
    return {n: change + product[n] if n in product else change for n, change in changes.items()}


def write_adapters(
    path: Path,
    adapters: Mapping[str, Mapping[str, Adapter]],
    metadata: Mapping[str, str],
    *,
    naming: LoraNaming = "peft",
    model: Mapping[str, Any] | None = None,
    dtype: Any = None,
    magnitudes: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    changes: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Write low-rank products, by component and module, as safetensors.

    Every scale is multiplied into B, so that alpha is the rank for every reader: those that read
    it in the file (kohya), in the metadata (diffusers) or nowhere (ComfyUI). `peft` has the
    published names; `kohya` and `comfy` those of the original code, where q, k and v are one module
    (block-diagonal, of threefold rank). `model`: the configurations of its networks by component,
    which these two need, by default FLUX.1's. `dtype` None keeps that of the arrays. `magnitudes`:
    a DoRA's vectors, by component and module, and `changes`: what is added to whole parameters, by
    published name (`.diff`, `.diff_b`, as ComfyUI has them), for `peft` alone.
    """
    magnitudes, changes = magnitudes or {}, changes or {}
    if magnitudes and naming != "peft":
        raise ConfigError(f"a DoRA is written in PEFT's names, not in those of {naming}")
    if any(changes.values()) and naming != "peft":
        raise ConfigError(f"whole differences are written beside PEFT's names, not {naming}'s")
    texts, arrays = dict(metadata), dict[str, np.ndarray]()
    if naming == "peft":
        texts[PEFT_METADATA] = json.dumps(_peft_metadata(adapters, set(magnitudes)))
    down, up = ("lora_down", "lora_up") if naming == "kohya" else ("lora_A", "lora_B")
    for component, mine in adapters.items():
        mine = {module: _with_alpha_as_rank(adapter) for module, adapter in mine.items()}
        if naming != "peft":
            mine = in_original_names(mine, naming, (model or DEV.networks)[component])
        prefix = prefix_of(naming, component, model)
        for module, adapter in mine.items():
            name = prefix + (module.replace(".", "_") if naming == "kohya" else module)
            arrays[f"{name}.{down}.weight"], arrays[f"{name}.{up}.weight"] = adapter.a, adapter.b
            if naming == "kohya":
                arrays[f"{name}.alpha"] = np.asarray(len(adapter.a), np.float32)
    for component, mine in magnitudes.items():
        for module, vector in mine.items():
            name = f"{prefix_of(naming, component, model)}{module}"
            arrays[f"{name}.lora_magnitude_vector"] = vector
    for component, mine in changes.items():
        for name, change in mine.items():
            module, _, leaf = name.rpartition(".")
            name = f"{prefix_of(naming, component, model)}{module}"
            arrays[f"{name}.{'diff' if leaf == 'weight' else 'diff_b'}"] = change
    _write(Path(path), arrays, texts, dtype)


def _write(
    path: Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str], dtype: Any
) -> None:
    if dtype is not None:
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    tensors = {name: of_array(np.ascontiguousarray(arrays[name])) for name in sorted(arrays)}
    write_safetensors(path, tensors, {"format": "pt", **texts})


def _lycoris_arrays(
    prefix: str, modules: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """LoKr, and LoRA beside it; scales are multiplied into it, and alpha is the rank."""
    arrays: dict[str, np.ndarray] = {}
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
    """Leaves of each adapted module, by its published name."""
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
        # transformers 5 has CLIP's modules without this, older ones with it: PEFT takes both.
        ranks = {name.removeprefix(_CLIP): len(adapter.a) for name, adapter in mine.items()}
        rank = next(iter(ranks.values()), 1)
        start = "" if any(name.startswith(_CLIP) for name in mine) else "^"
        others = {f"{start}{name}": r for name, r in ranks.items() if r != rank}
        values = {
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(ranks),
            "rank_pattern": others,
            "alpha_pattern": others,
        }
        values |= {"use_dora": True} if component in dora else {}
        found |= {f"{component}.{key}": value for key, value in values.items()}
    return found
