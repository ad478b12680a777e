"""Paths in our parameter trees and the published (diffusers, transformers) names they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fluxjax.models.stacking import stack_of

# Published names in which a number is a list index; elsewhere (linear_1, wi_0) it is the name's.
_INDEXED = (
    "transformer_blocks|single_transformer_blocks|controlnet_blocks|controlnet_single_blocks|"
    "ip_adapter|block|blocks|layers|layer|to_out|net|down_blocks|up_blocks|resnets|attentions|"
    "downsamplers|upsamplers|refiner_blocks|stages|op_list|aggreg"
)
_INDEX = re.compile(rf"\b({_INDEXED})((?:_\d+)+)(?=\.|$)")
_T5_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested dicts -> {path: leaf}."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        path = (*prefix, key)
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def is_stacked(path: tuple[str, ...]) -> bool:
    """Whether the leaf at `path` carries a leading layer axis."""
    return any(map(stack_of, path))


def module_name(module: tuple[str, ...], layer: int | None) -> str:
    """Published name of a module; `layer` is the index on the layer axis of a stacked one."""
    parts = list(module)
    if layer is not None:
        place = next(i for i, key in enumerate(module) if stack_of(key))
        group, first = stack_of(module[place]) or ("", 0)
        parts[place] = f"{group}.{first + layer}"
    name = ".".join(parts)
    return _T5_BIAS if name == "encoder.relative_attention_bias" else _INDEX.sub(_dotted, name)


def _dotted(index: re.Match[str]) -> str:
    return index[0].removesuffix(index[2]) + index[2].replace("_", ".")


def published_name(path: tuple[str, ...], layer: int | None) -> str:
    """Published name of a parameter."""
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    return ".".join(filter(None, (module_name(path[:-1], layer), leaf)))
