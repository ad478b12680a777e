"""Which network a checkpoint holds, in whose names, and its configuration: from keys and shapes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fluxjax.config import ConfigError
from fluxjax.networks import NETWORKS, network_of
from fluxjax.networks.foreign import foreign_words
from fluxjax.networks.network import Dialect, Network, Shapes

_PREFIXES = sorted(
    ((prefix, network) for network in NETWORKS.values() for prefix in network.prefixes),
    key=lambda pair: -len(pair[0]),
)

# Of files with one network, where all names have it: OpenCLIP's blocks begin so too.
_COMMON = ("diffusion_model.", "transformer.")


def split_prefixes(names: Collection[str]) -> dict[str, dict[str, str]]:
    """component -> {name without prefix: name}; the component is "" for names without prefix."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        for prefix, network in _PREFIXES:
            if name.startswith(prefix):
                groups.setdefault(network.component, {})[name[len(prefix) :]] = name
                break
        else:
            groups.setdefault("", {})[name] = name
    if groups.keys() == {""}:
        common = next((p for p in _COMMON if all(n.startswith(p) for n in names)), "")
        return {"": {name[len(common) :]: name for name in names}}
    return groups


def refuse_foreign(shapes: Shapes) -> None:
    """Raises ConfigError for checkpoints of other families, which share some names with ours."""
    words = foreign_words(shapes)
    if words:
        raise ConfigError(
            f"these are the tensors of {words}"
            + ("" if words.startswith("a LoRA") else ", which fluxjax cannot read yet")
        )


def detect_network(shapes: Shapes, config: type | None = None) -> tuple[Network, Dialect]:
    """The kind of weights and whose names these are; of several that fit, that of a `config` which
    is known to be theirs.

    Raises ConfigError saying what it looks like instead.
    """
    refuse_foreign(shapes)
    found: dict[type, tuple[Network, Dialect]] = {}
    for network in NETWORKS.values():
        for dialect in network.dialects:
            if dialect.fits(shapes):
                found.setdefault(network.config, (network, dialect))
    parts = {part for network, _ in found.values() for part in network.parts}
    found = {kind: pair for kind, pair in found.items() if pair[0].component not in parts}
    if config in found:
        return found[config]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = ", ".join(network.words for network, _ in found.values())
        raise ConfigError(f"the names fit several networks: {names}")
    some = ", ".join(repr(name[:80]) for name in sorted(shapes)[:3])
    known = ", ".join(network.words for network in NETWORKS.values())
    raise ConfigError(f"no network that fluxjax reads ({known}) has names like {some}")


def infer_config(network: Network, dialect: Dialect, shapes: Shapes, family: str = "") -> Any:
    """Every number of the configuration that shapes tell; the rest as published.

    `family`: its name where the file is known to belong to one, which tells what shapes cannot.
    Raises ConfigError for what nothing tells, and for a file without a needed tensor.
    """
    read = _Read(shapes)
    try:
        return network.fit(dialect.infer(read, family), read)
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(
            f"the {network.words} lacks {error}, from which its size is read"
        ) from None
    except (IndexError, ValueError, ZeroDivisionError):
        some = ", ".join(f"{name} {list(shapes[name])}" for name in read.names)
        raise ConfigError(
            f"the size of the {network.words} is read from the shapes of {some}: one of these "
            "cannot be right"
        ) from None


class _Read(dict[str, tuple[int, ...]]):
    """Shapes that remember which of them were asked for."""

    def __init__(self, shapes: Shapes):
        super().__init__(shapes)
        self.names: dict[str, None] = {}

    def __getitem__(self, name: str) -> tuple[int, ...]:
        shape = super().__getitem__(name)
        self.names[name] = None
        return shape

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


def describe(config: Any) -> str:
    """In words: the kind of weights, and the variant as far as keys tell it."""
    return network_of(config).describe(config)
