"""Adapters of a pipeline that is opened: merged into its networks, or computed beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.pipeline_folder import adapter_defaults
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import PipelineConfig
from fluxjax.hub import find
from fluxjax.models.lora import combine_loras
from fluxjax.shapes import Params

Scaled = tuple[str | Path, float]
LowRank = list[tuple[dict[str, Adapter], float]]
"""Of each file its low-rank products, and its strength."""


def with_loras(
    networks: dict[str, OpenNetwork], config: PipelineConfig, loras: Sequence[Scaled]
) -> tuple[dict[str, OpenNetwork], PipelineConfig, LowRank]:
    """All that adapters change other than by low-rank products in the denoiser's layers, merged;
    the pipeline that this makes; and those products, which are computed beside the weights."""
    if not loras:
        return networks, config, []
    networks, low_rank, defaults = _merged(networks, loras, config.denoiser)
    parts: dict[str, Any] = {name: networks[name].config for name in config.networks}
    adapted = replace(config, **parts)
    if adapted.class_name != config.class_name:  # a control LoRA, the only kind that widens
        names = " ".join(str(file) for file, _ in loras)
        kept = ("scheduler", "max_sequence_length", "steps", "width", "height")
        own = {name: getattr(adapted, name) for name in kept}
        adapted = adapted.published(parts | own | defaults, names)
    return networks, adapted, low_rank


def _merged(
    networks: dict[str, OpenNetwork], loras: Sequence[Scaled], denoiser: str
) -> tuple[dict[str, OpenNetwork], LowRank, dict[str, Any]]:
    """The networks, the denoiser's low-rank products, and how the adapters say to be sampled."""
    from fluxjax.checkpoint.lora.merge import Scaled as Changes
    from fluxjax.checkpoint.lora.merge import adaptable, merge
    from fluxjax.checkpoint.lora.reader import read_adapters, split_low_rank

    templates = adaptable(networks)
    low_rank: LowRank = []
    merged: dict[str, list[Changes]] = {name: [] for name in templates}
    defaults: dict[str, Any] = {}
    for file, strength in loras:
        found = read_adapters(find(file, "lora"), templates)
        defaults |= adapter_defaults(file, found.metadata)
        for name, changes in found.changes.items():
            others = changes
            if name == denoiser:
                adapters, others = split_low_rank(changes, templates[name])
                low_rank.append((adapters, strength))
            merged[name].append((others, strength))
    # In float32: to what the pipeline computes in, weights are cast when they are loaded.
    changed = {n: merge(networks[n], mine, dtype=np.float32) for n, mine in merged.items()}
    return networks | changed, low_rank, defaults


def low_rank_of(low_rank: LowRank, denoiser: Any, stacked: bool) -> Params | None:
    """The products of all files as one tree beside the denoiser's parameters; None for none."""
    if not any(adapters for adapters, _ in low_rank):
        return None
    from fluxjax.checkpoint.lora.reader import low_rank_tree

    template = abstract_params(denoiser, stacked=stacked)
    return combine_loras([(low_rank_tree(a, template), scale) for a, scale in low_rank if a])
