"""Whose module a tensor of an adapter belongs to, and which part of the adapter it is.

A key is PREFIX MODULE SUFFIX. The prefix tells the networks that may be meant, the suffix the
part; a module is looked up with its dots as underscores among the network's own names and those of
its original code, since names that are joined by underscores cannot be told apart otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fluxjax.checkpoint.engine import published_leaves
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.networks import NETWORKS
from fluxjax.networks.network import Network
from fluxjax.shapes import Params

SPLIT_OFT = "oft_blocks."  # kohya's, with the number of the part that it turns
_MOST_PARTS = 4  # of ours in one module of a file: q, k, v and MLP


def _suffixes() -> dict[str, str]:
    """suffix -> part, of every spelling."""
    found = {}
    for part, spellings in {
        "mid": ("lora_mid", "lora.mid"),
        "a": ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down", "down"),
        "b": ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up", "up"),
    }.items():
        for spelling in spellings:
            found |= {f"{spelling}.weight": part, f"{spelling}.default.weight": part}
            if part == "b":
                found |= {f"{spelling}.bias": "b_bias", f"{spelling}.default.bias": "b_bias"}
    magnitudes = ("lora_magnitude_vector", "lora_magnitude_vector.default", "dora_scale")
    found |= {name: "magnitude" for name in (*magnitudes, "magnitude")}
    found |= {f"{name}.weight": "magnitude" for name in magnitudes}
    found |= {f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")}
    found |= {
        f"{kind}_w{n}{end}": f"{kind}_w{n}{end}"
        for kind in ("lokr", "hada")
        for n in "12"
        for end in ("", "_a", "_b")
    }
    found |= {name: name for name in ("lokr_t2", "hada_t1", "hada_t2")}
    alone = ("alpha", "oft_blocks", "rescale", "boft_R", "boft_s", "on_input", "diff")
    found |= {name: name for name in (*alone, "set_weight", "reshape_weight")}
    found |= {f"{SPLIT_OFT}{i}": f"{SPLIT_OFT}{i}" for i in range(_MOST_PARTS)}
    found |= {"oft_R.weight": "oft_R", "diff_b": "bias", "b_norm": "bias", "w_norm": "diff"}
    return found | {"weight": "weight", "scale": "weight"}


SUFFIXES = _suffixes()
# Of a whole parameter just as well; every other suffix is only an adapter's.
_PLAIN = ("weight", "scale")
_OLDEST = {"_lora.down.weight": "a", "_lora.up.weight": "b"}
_PROCESSOR = re.compile(r"(_attn\d?)_processor(?=_)")
_WORDS = 4  # of the longest suffix


class Parts(NamedTuple):
    """Published modules whose outputs one module of a file holds, one after the other."""

    names: tuple[str, ...]
    swap_halves: bool = False


@dataclass(frozen=True)
class Known:
    """A network that a file may adapt. `shapes`: of every parameter, by published name.

    `modules`: what a file may call them, dots as underscores.
    """

    component: str
    kind: Network
    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, Parts]
    prefixes: tuple[str, ...]

    @property
    def linear(self) -> list[str]:
        """Modules with a matrix, by published name."""
        return [
            name.removesuffix(".weight")
            for name, shape in self.shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        ]


def known_network(component: str, params: Params) -> Known:
    """Of a network whose parameters look like `params` (arrays or shapes, stacked or not)."""
    shapes = {name: leaf.shape for name, leaf in published_leaves(params).items()}
    network = next(
        n for n in NETWORKS.values() if n.adapter_prefixes and n.dialects[0].fits(shapes)
    )
    own = {name.rpartition(".")[0] for name in shapes} - {""}  # a parameter of the network itself
    modules: dict[str, Parts] = {}
    for name in own:
        modules[_flat(name)] = Parts((name,))
        if len(shapes.get(f"{name}.weight", ())) == 1:  # a norm's scale is named itself
            modules[_flat(f"{name}.weight")] = Parts((name,))
    numbers = {word for name in own for word in name.split(".") if word.isdigit()}
    for rule in network.adapter_rules(shapes):
        for i in numbers if "{}" in rule.theirs else ("",):
            names = tuple(ours.replace("{}", i) for ours in rule.ours)
            if all(name in own for name in names):
                parts = Parts(names, rule.swap_halves)
                theirs = rule.theirs.replace("{}", i)
                modules.setdefault(_flat(theirs), parts)
                if rule.leaves[0][0] != "weight":
                    modules.setdefault(_flat(f"{theirs}.{rule.leaves[0][0]}"), parts)
    prefixes = network.adapter_prefixes
    if component != network.component:  # that kind in another place, counted from 1
        number = component.removeprefix("text_encoder").removeprefix("_")
        counted = (f"lora_te{number}_",) if number else ("lora_te1_", "lora_te_")
        prefixes = (*network.further_prefixes, f"{component}.", *counted)
    return Known(component, network, shapes, modules, prefixes)


def _flat(name: str) -> str:
    return name.replace(".", "_")


@dataclass
class Group:
    """The tensors of a file that change one module. `module`: what it is called there, in full;
    `plain`: without the prefix. `keys`: their names, by part."""

    network: Known
    module: str
    plain: str
    parts: Parts
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def grouped(raw: Mapping[str, Tensor], networks: Iterable[Known]) -> tuple[list[Group], list[str]]:
    """The groups of a file, and what is wrong with each tensor that belongs to none."""
    networks, groups, errors = list(networks), {}, []
    for key, tensor in raw.items():
        for network, prefix, module, part in _readings(key, networks):
            plain = module.removeprefix(prefix)
            # diffusers once named the attention's processor too.
            names = _flat(plain), _PROCESSOR.sub(r"\1", _flat(plain), count=1)
            parts = next((network.modules[n] for n in names if n in network.modules), None)
            if parts is not None:
                group = groups.setdefault(
                    (network.component, module), Group(network, module, plain, parts)
                )
                if part in group.tensors:
                    errors.append(f"doubled: {key}")
                group.tensors[part], group.keys[part] = tensor, key
                break
        else:
            errors.append(f"unknown: {key} {list(tensor.shape)}")
    return list(groups.values()), errors


def _readings(key: str, networks: list[Known]) -> Iterator[tuple[Known, str, str, str]]:
    """(network, prefix, module with prefix, part): every way to read a key, the likeliest first."""
    cuts = [
        (key.removesuffix(suffix), part) for suffix, part in _OLDEST.items() if key.endswith(suffix)
    ]
    words = key.split(".")
    for count in range(min(_WORDS, len(words) - 1), 0, -1):
        part = SUFFIXES.get(".".join(words[-count:]))
        if part is not None:
            cuts.append((".".join(words[:-count]), part))
    for module, part in cuts:
        for network in networks:
            for prefix in network.prefixes:
                if module.startswith(prefix):
                    yield network, prefix, module, part


def is_of_adapter(key: str) -> bool:
    """Whether its suffix is one that only adapters have."""
    words = key.split(".")
    tails = (".".join(words[-count:]) for count in range(1, min(_WORDS, len(words) - 1) + 1))
    return any(tail in SUFFIXES and tail not in _PLAIN for tail in tails)
