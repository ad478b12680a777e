"""PEFT's LoraConfig: in the metadata of a file (diffusers), or in adapter_config.json beside it.

It decides by how much a LoRA counts: alpha / rank, or alpha / sqrt(rank) where rank-stabilised.
https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/config.py, and those of its
LoHa, LoKr, OFT and BOFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxjax.checkpoint.lora.rotations import Cayley
from fluxjax.checkpoint.lora.scaled_file import peft_config_of
from fluxjax.config import ConfigError
from fluxjax.json_input import parse_json, read_json

PEFT_METADATA = "lora_adapter_metadata"
# True or filled, each changes more than low-rank products or needs other base weights.
_REFUSED = (
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)
_INITIAL = ("gaussian", "eva", "orthogonal")  # of the first weights; the others change the base
# Patterns may be regular expressions of strangers: few, and none that can backtrack for long.
_LITERAL = re.compile(r"\^?[\w.\-]+")
_SLOW = re.compile(r"[({]|\\[^.d]|[*+?].*[*+?]", re.DOTALL)
_MAX_EXPRESSIONS = 16
_MAX_LENGTH = 200
_FACTORED = {"LOHA": "LoHa", "LOKR": "LoKr"}
_USUAL = 8.0  # PEFT's alpha, and its rank, where a configuration does not say it
_MAX_TERMS = 100  # of a series that PEFT cuts after five


class Patterns:
    """PEFT's alpha_pattern or rank_pattern: the first that a module's name ends with counts."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._literal: dict[str, int] = {}
        expressions: list[tuple[int, str]] = []
        self._values = list(values.values())
        for number, pattern in enumerate(values):
            if _LITERAL.fullmatch(pattern):
                self._literal.setdefault(pattern, number)
                continue
            simple = pattern.isprintable() and not re.search(_SLOW, pattern)
            if not simple or len(pattern) > _MAX_LENGTH:
                raise ValueError(f"the pattern {pattern[:60]!r} is not read, only names are")
            expressions.append((number, rf"(?:.*\.)?(?:{pattern})"))
        if len(expressions) > _MAX_EXPRESSIONS:
            raise ValueError(f"{len(expressions)} patterns are expressions, not names")
        self._expressions = [(number, re.compile(text)) for number, text in expressions]

    def get(self, name: str, default: float | None) -> float | None:
        keys = [f"^{name}", *_suffixes(name)]
        found = [self._literal[key] for key in keys if key in self._literal]
        found += [n for n, expression in self._expressions if expression.fullmatch(name)]
        return self._values[min(found)] if found else default


def _suffixes(name: str) -> Iterable[str]:
    words = name.split(".")
    return (".".join(words[i:]) for i in range(len(words)))


@dataclass(frozen=True)
class PeftConfig:
    """`where` it stands, for errors; what is not said is None or empty."""

    where: str = ""
    alpha: float | None = None
    rank: float | None = None
    rank_stabilised: bool = False
    dora: bool = False
    lora_bias: bool = False
    turns_as: str = ""
    """OFT or BOFT, where the adapters turn weights as `cayley` says; "" is LoRA."""
    cayley: Cayley = field(default_factory=Cayley)
    alphas: Patterns = field(default_factory=lambda: Patterns({}))
    ranks: Patterns = field(default_factory=lambda: Patterns({}))
    targets: frozenset[str] = frozenset()
    factored_as: str = ""
    """LoHa or LoKr, where the adapters are nothing else."""

    def scale(self, module: str, rank: int) -> float:
        """Of a module, in the file's own name, whose A has `rank` rows.

        Raises ConfigError for a rank that is another than the one it was trained with.
        """
        trained = self.ranks.get(module, self.rank)
        if trained is not None and trained != rank:
            raise ConfigError(f"{module} has rank {rank}, and {self.where} says {trained:g}")
        alpha = self.alphas.get(module, self.alpha)
        alpha = float(rank) if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def scale_of_whole(self, module: str) -> float:
        """Of what has no rank: PEFT's LoKr of two whole factors has the scale of the others."""
        alpha, rank = self.alphas.get(module, self.alpha), self.ranks.get(module, self.rank)
        return alpha / rank if self.factored_as == "LoKr" and alpha and rank else 1.0

    def targeted(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are said to be adapted. What is one's whole name is of no other:
        PEFT also writes whole names, of which one may be the end of others."""
        names = list(names)
        ends = self.targets.difference(names)
        return [n for n in names if n in self.targets or not ends.isdisjoint(_suffixes(n))]


def read_peft_config(
    path: Path, metadata: Mapping[str, str], component: str, *, alone: bool = True
) -> PeftConfig:
    """Of one network's adapters in the file `path`: what its metadata say, else what lies beside
    it, which does not say of which network it is. `alone`: the file adapts no other network.

    Raises ConfigError for what is damaged, for metadata that do not say it of this network, and for
    adapters that are more than those that are read.
    """
    if PEFT_METADATA in metadata:
        where = f"its metadata under {PEFT_METADATA!r}"
        try:
            values = parse_json(metadata[PEFT_METADATA])
        except ValueError as error:
            raise ConfigError(f"{where} are damaged: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{where} are damaged: they are no JSON object")
        prefix = f"{component}."
        own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        # diffusers' networks write their own adapters without it.
        own = own or {k: v for k, v in values.items() if alone and "." not in k}
        if not own:
            raise ConfigError(f"{where} do not say how much it counts in the {component}")
        return _of_kind(own, where)
    if beside := peft_config_of(path):
        return _of_kind(read_json(beside), str(beside))
    return PeftConfig()


def _of_kind(values: Mapping[str, Any], where: str) -> PeftConfig:
    kind = str(values.get("peft_type", "LORA"))[:60]
    if kind in ("OFT", "BOFT"):
        return _turning(values, where)
    if kind in _FACTORED:
        return _factored(values, where)
    if kind != "LORA":
        raise ConfigError(f"{where} is of a {kind!r}; only LORA, LOHA, LOKR, OFT and BOFT are read")
    return _checked(values, where)


def _turning(values: Mapping[str, Any], where: str) -> PeftConfig:
    """Of PEFT's OFT or BOFT."""
    _refuse(values, _REFUSED, where)
    cayley = Cayley()
    try:
        if values["peft_type"] == "OFT" and _flag(values, "use_cayley_neumann"):
            terms = _number(values, "num_cayley_neumann_terms") or 5
            if terms > _MAX_TERMS:
                raise ValueError(f"num_cayley_neumann_terms is {terms:g}")
            cayley = Cayley(int(terms))
        if values["peft_type"] == "OFT" and _flag(values, "coft"):
            cayley = cayley._replace(largest=_number(values, "eps") or 6e-5)
    except ValueError as error:
        raise ConfigError(f"{where} does not say how its adapters turn: {error}") from None
    turns_as, targets = values["peft_type"], _targets(values)
    return PeftConfig(where=where, turns_as=turns_as, cayley=cayley, targets=targets)


def _factored(values: Mapping[str, Any], where: str) -> PeftConfig:
    """Of PEFT's LoHa or LoKr."""
    _refuse(values, _REFUSED, where)
    try:
        return PeftConfig(
            where=where,
            alpha=_number(values, "alpha") or _USUAL,
            rank=_number(values, "r") or _USUAL,
            alphas=_patterns(values, "alpha_pattern"),
            ranks=_patterns(values, "rank_pattern"),
            targets=_targets(values),
            factored_as=_FACTORED[values["peft_type"]],
        )
    except (ValueError, re.error) as error:
        raise ConfigError(f"{where} has no usable alpha and rank: {error}") from None


def _checked(values: Mapping[str, Any], where: str) -> PeftConfig:
    known = ("use_rslora", "use_dora")
    flags = [key for key in values if key.startswith("use_") and key not in known]
    initial = values.get("init_lora_weights", True)
    if isinstance(initial, str) and not initial.lower().startswith(_INITIAL):
        flags.append("init_lora_weights")
    _refuse(values, (*_REFUSED, *flags), where)
    try:
        return PeftConfig(
            where=where,
            alpha=_number(values, "lora_alpha") or _USUAL,
            rank=_number(values, "r"),
            rank_stabilised=_flag(values, "use_rslora"),
            dora=_flag(values, "use_dora"),
            lora_bias=_flag(values, "lora_bias"),
            alphas=_patterns(values, "alpha_pattern"),
            ranks=_patterns(values, "rank_pattern"),
            targets=_targets(values),
        )
    except (ValueError, re.error) as error:
        raise ConfigError(f"{where} has no usable alpha and rank: {error}") from None


def _refuse(values: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    more = [key for key in keys if values.get(key)]
    if values.get("bias", "none") not in ("none", None):
        more.append("bias")
    if more:
        raise ConfigError(
            f"{where} asks for {more[0][:60]} = {str(values[more[0]])[:60]}, which is more than "
            "such adapters and is not read"
        )


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key) or False
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {str(value)[:60]!r}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float | None:
    if key not in values:
        return None
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{key[:60]} is {str(value)[:60]}, and should be a number above 0")
    return float(value)


def _patterns(values: Mapping[str, Any], key: str) -> Patterns:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} is {str(patterns)[:60]}, and should map names to numbers")
    return Patterns({name: _number(patterns, name) or 0.0 for name in patterns})


def _targets(values: Mapping[str, Any]) -> frozenset[str]:
    """None where the config does not say plainly which modules are adapted."""
    targets = values.get("target_modules")
    narrowed = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if not isinstance(targets, list) or any(values.get(key) for key in narrowed):
        return frozenset()
    return frozenset(target for target in targets if isinstance(target, str))
