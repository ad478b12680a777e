"""Whole pipelines in single files: read as networks, and networks written as one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json, network_config, parse_config
from fluxjax.checkpoint.opened_network import OpenNetwork, make_network
from fluxjax.checkpoint.tensors import Tensor, as_tensor
from fluxjax.config import ConfigError
from fluxjax.config.sampler import SamplerConfig
from fluxjax.networks import network_of
from fluxjax.networks.network import count
from fluxjax.networks.whole_files import (
    LOSSES,
    UNREAD,
    V_PREDICTION,
    ZERO_SNR,
    Part,
    WholeFile,
    whole_file,
)

METADATA_KEY = "fluxjax_networks"
_PROJECTION = "text_projection.weight"
_SCHEDULER = "scheduler"


def open_whole_file(
    raw: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    config: Any = None,
    family: str = "",
) -> dict[str, OpenNetwork] | None:
    """The networks of such a file; None for another one.

    `config`: of the one that draws, where shapes do not tell it. `family`: of `FAMILY_NAMES`; of
    Stable Diffusion 2 it tells the size, and so what is predicted. What is read of no network is
    named in the first one's `dropped`. Raises ConfigError for names that belong nowhere, and what
    `make_network` does.
    """
    whole = whole_file(raw)
    if whole is None:
        return None
    configs = _configs(metadata, path)
    scheduler = configs.pop(_SCHEDULER, None)
    networks: dict[str, OpenNetwork] = {}
    left = dict(raw)
    for component, part in whole.parts.items():
        # An autoencoder's losses have its prefix too.
        names = [n for n in raw if n.startswith(part.prefix) and not re.fullmatch(LOSSES, n)]
        own = {name.removeprefix(part.prefix): left.pop(name) for name in names}
        own = {name: tensor for name, tensor in own.items() if name not in _cut(part, own)}
        if own:
            known = configs.get(component) or (None if networks else config)
            networks[component] = open_part(own, path, component, whole, known)
    if not configs and config is None:
        networks |= _of_size(whole, networks, family, path)
    if whole.predicting_v is not None and V_PREDICTION in left:
        flagged = replace(whole.predicting_v, rescale_betas_zero_snr=ZERO_SNR in left)
        scheduler = scheduler or flagged
        left = {name: left[name] for name in left if name not in (V_PREDICTION, ZERO_SNR)}
    lost = sorted(name for name in left if not re.fullmatch(UNREAD, name))
    if lost:
        raise ConfigError(
            f"{path} holds tensors that belong to none of its networks: "
            f"{', '.join(map(repr, lost[:5]))}"
        )
    first = next(iter(networks))
    cut = [f"{part.prefix}{name}" for part in whole.parts.values() for name in _cut_of(part, raw)]
    dropped = (*networks[first].dropped, *sorted(left), *cut)
    networks[first] = replace(networks[first], dropped=dropped, scheduler=scheduler)
    return networks


def open_part(
    own: Mapping[str, Tensor], path: Path, component: str, whole: WholeFile, config: Any = None
) -> OpenNetwork:
    """One network of such a file, from its tensors. Raises what `make_network` does."""
    part = whole.parts[component]
    if part.identity and _PROJECTION not in own:
        own = {**own, _PROJECTION: _identity(own)}
    if config is None and part.config is not None:
        config = _inferred(part, {name: tensor.shape for name, tensor in own.items()}, path)
    return make_network(own, path, component=component, config=config, family=whole.family)


def _of_size(
    whole: WholeFile, networks: Mapping[str, OpenNetwork], family: str, path: Path
) -> dict[str, OpenNetwork]:
    """The UNet of the size that `family` tells, where there are several. Raises ConfigError."""
    unet = networks.get("unet")
    if not whole.sides or unet is None or unet.config.in_channels > unet.config.out_channels:
        return {}
    if family not in whole.sides:
        raise ConfigError(
            f"{path} is {whole.words}, and what it predicts cannot be told from it: say --family "
            "sd2-v for models of 768 pixels (v), or --family sd2 for those of 512 (noise)"
        )
    return {"unet": replace(unet, config=replace(unet.config, sample_size=whole.sides[family]))}


def _inferred(part: Part, shapes: Mapping[str, tuple[int, ...]], path: Path) -> Any:
    assert part.config is not None
    try:
        return part.config(shapes)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{path}: {part.prefix} lacks {error}, from which its size is read"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Those that our own writer left. Raises ValueError."""
    try:
        saved = json.loads(metadata.get(METADATA_KEY, "{}"))
        scheduler = saved.pop(_SCHEDULER, None)
        configs = {name: network_config(values, path) for name, values in saved.items()}
        if scheduler is not None:
            configs[_SCHEDULER] = parse_config(SamplerConfig, scheduler, path)
        return configs
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path}: the metadata under {METADATA_KEY!r} is damaged") from None


def _cut(part: Part, own: Mapping[str, Tensor]) -> set[str]:
    """Of OpenCLIP's text encoder what nothing reads: its last layer, and the projection."""
    if not part.cut or "text_projection" not in own:
        return set()
    last = count({name: () for name in own}, r"transformer\.resblocks\.(\d+)\.") - 1
    layer = f"transformer.resblocks.{last}."
    return {name for name in own if name == "text_projection" or name.startswith(layer)}


def _cut_of(part: Part, raw: Mapping[str, Tensor]) -> list[str]:
    own = {n.removeprefix(part.prefix): t for n, t in raw.items() if n.startswith(part.prefix)}
    return sorted(_cut(part, own))


def _identity(own: Mapping[str, Tensor]) -> Tensor:
    norm = next(t for name, t in own.items() if name.endswith("final_layer_norm.weight"))
    return as_tensor(np.eye(norm.shape[0], dtype=norm.dtype))


def whole_tensors(
    whole: WholeFile, networks: Mapping[str, OpenNetwork], scheduler: SamplerConfig | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors under their names in such a file, and its metadata, which tell our reader the
    `scheduler`, and others what is predicted where such files can. Raises engine.MappingError for
    what those names cannot express."""
    tensors: dict[str, Tensor] = {}
    for component, network in networks.items():
        part = whole.parts[component]
        table = network_of(network.config).dialect(part.dialect).table(network.config)
        own = network.record.restore(
            engine.from_published(network.tensors, table), part.dialect, fp8=True
        )
        if part.identity and _is_identity(own[_PROJECTION]):
            del own[_PROJECTION]
        tensors |= {f"{part.prefix}{name}": tensor for name, tensor in own.items()}
    saved = {name: config_json(network.config) for name, network in networks.items()}
    if scheduler is not None:
        saved[_SCHEDULER] = config_json(scheduler)
        flags = whole.predicting_v is not None
        predicts_v = flags and scheduler.given("prediction_type") == "v_prediction"
        told = {V_PREDICTION: predicts_v, ZERO_SNR: predicts_v and scheduler.rescale_betas_zero_snr}
        tensors |= {name: as_tensor(np.zeros(0, np.float32)) for name, so in told.items() if so}
    return tensors, {METADATA_KEY: json.dumps(saved)}


def _is_identity(tensor: Tensor) -> bool:
    rows, columns = tensor.shape
    return rows == columns and bool((tensor.read() == np.eye(rows, dtype=tensor.dtype)).all())
