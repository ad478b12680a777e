"""The kinds of adapters, as data: which tensors each has, of which shapes, and what they add up to.

Formulas are those of PEFT and of LyCORIS' forward (its own merging applies alpha twice). All is
float32, in the published layout: W is (out, in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fluxjax.checkpoint.lora.rotations import (
    block_size,
    butterfly_turned,
    inputs_butterfly_turned,
    inputs_turned,
    outputs_turned,
)

Arrays = Mapping[str, np.ndarray]
Sizes = Mapping[str, int]
Form = Callable[[Arrays, Any, np.ndarray], np.ndarray]
"""(tensors, how, W) -> what is added to W. `how` is alpha / rank, or what `Kind.how` says. W is
empty for kinds that do not use it."""


@dataclass(frozen=True)
class Kind:
    """`shapes`: of each tensor that it needs, "out", "in" or the name of a size that is free."""

    name: str
    shapes: Mapping[str, tuple[str, ...]]
    form: Form
    rank: str = ""
    """The free size that alpha is divided by; "" where alpha counts for nothing."""
    may: tuple[str, ...] = ()
    uses_weight: bool = False
    fits: Callable[[Sizes], bool] = lambda sizes: True
    """Whether the sizes make up (out, in), where that is more than equality."""
    how: Literal["scale", "alpha", "cayley"] = "scale"
    """What its form is told: alpha / rank, alpha itself, or what PEFT's configuration says."""
    turns_as: str = ""
    """PEFT's name of it in that configuration."""


def _pair(t: Arrays, scale: float, weight: np.ndarray) -> np.ndarray:
    return (t["b"] @ t["a"]) * np.float32(scale)


def _factor(t: Arrays, name: str) -> np.ndarray:
    return t[name] if name in t else t[f"{name}_a"] @ t[f"{name}_b"]


def _lokr(t: Arrays, scale: float, weight: np.ndarray) -> np.ndarray:
    return np.kron(_factor(t, "lokr_w1"), _factor(t, "lokr_w2")) * np.float32(scale)


def _tucker(mid: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(rank, rows), (rank, columns) and a core (rank, rank, height, width) -> a matrix of rows x
    (columns, height, width)."""
    whole = np.einsum("ijhw,ip,jr->prhw", mid, rows, columns, optimize=True)
    return whole.reshape(len(whole), -1)


def _with_mid(t: Arrays, scale: float, weight: np.ndarray) -> np.ndarray:
    return _tucker(t["mid"], t["b"].T, t["a"]) * np.float32(scale)


def _lokr_with_mid(t: Arrays, scale: float, weight: np.ndarray) -> np.ndarray:
    second = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    return np.kron(_factor(t, "lokr_w1"), second) * np.float32(scale)


def _loha_with_mid(t: Arrays, scale: float, weight: np.ndarray) -> np.ndarray:
    first, second = (_tucker(t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in "12")
    return first * second * np.float32(scale)


def _loha(t: Arrays, scale: float, weight: np.ndarray) -> np.ndarray:
    return _factor(t, "hada_w1") * _factor(t, "hada_w2") * np.float32(scale)


def _glora(t: Arrays, scale: float, weight: np.ndarray) -> np.ndarray:
    return (t["b1"] @ t["b2"] + (weight @ t["a1"]) @ t["a2"]) * np.float32(scale)


def _ia3(t: Arrays, scale: float, weight: np.ndarray) -> np.ndarray:
    change = t["weight"].reshape(-1)
    if not t["on_input"].item():
        return weight * change[:, None]
    return weight * np.repeat(change, weight.shape[1] // len(change))[None]  # a kernel's have one


def _butterfly(sizes: Sizes, turned: str, *, halved: bool) -> bool:
    """Whether blocks make up what is turned, and can be paired as often as there are stages.
    `halved`: already in the first stage."""
    size, stages = sizes["size"], sizes["stages"]
    even = size % 2 == 0 or (stages == 1 and not halved)
    return (
        even
        and sizes["blocks"] * size == sizes[turned]
        and sizes["blocks"] % 2 ** (stages - 1) == 0
    )


def _fits_oft_of_inputs(sizes: Sizes) -> bool:
    size = block_size(sizes["above the diagonal"])
    blocks = sizes["in"] // size if size else 0
    return blocks * size == sizes["in"] and sizes["blocks"] in (1, blocks)


def _lokr_kind(first: tuple[str, ...], second: tuple[str, ...], *, mid: bool = False) -> Kind:
    """`mid`: the second is a convolution's, and has a core of the kernel's size."""
    sides = {
        "lokr_w1": ("rows of w1", "columns of w1"),
        "lokr_w2": ("rows of w2", "columns of w2"),
    }
    shapes: dict[str, tuple[str, ...]] = {}
    rank = ""
    for name, ends in (("lokr_w1", first), ("lokr_w2", second)):
        rows, columns = sides[name]
        if not ends:
            shapes[name] = (rows, columns)
            continue
        rank = f"rank of {name[-2:]}"  # that of w2 where both are decomposed
        turned = mid and name == "lokr_w2"
        shapes |= {
            f"{name}_a": (rank, rows) if turned else (rows, rank),
            f"{name}_b": (rank, columns),
        }
        shapes |= {"lokr_t2": (rank, rank, *_KERNEL)} if turned else {}

    def fits(sizes: Sizes) -> bool:
        return (
            sizes["rows of w1"] * sizes["rows of w2"] == sizes["out"]
            and sizes["columns of w1"] * sizes["columns of w2"]
            == sizes["channels" if mid else "in"]
        )

    form = _lokr_with_mid if mid else _lokr
    return Kind("LoKr", shapes, form, rank, may=("alpha", "magnitude"), fits=fits)


_AB = ("a", "b")
_KERNEL = ("height", "width")
_SCALED = ("alpha", "magnitude")
LORA = Kind(
    "LoRA", {"a": ("rank", "in"), "b": ("out", "rank")}, _pair, "rank", (*_SCALED, "b_bias")
)
_LOHA = {
    "hada_w1_a": ("out", "rank"),
    "hada_w1_b": ("rank", "in"),
    "hada_w2_a": ("out", "rank"),
    "hada_w2_b": ("rank", "in"),
}
_LOHA_WITH_MID = {name: ("rank", {"a": "out", "b": "channels"}[name[-1]]) for name in _LOHA} | {
    f"hada_t{n}": ("rank", "rank", *_KERNEL) for n in "12"
}
FULL = Kind("full difference", {"diff": ("out", "in")}, lambda t, scale, weight: t["diff"])
KINDS = (
    LORA,
    _lokr_kind((), ()),
    _lokr_kind(_AB, ()),
    _lokr_kind((), _AB),
    _lokr_kind(_AB, _AB),
    _lokr_kind((), _AB, mid=True),
    _lokr_kind(_AB, _AB, mid=True),
    Kind(
        "LoRA",
        {"a": ("rank", "channels"), "mid": ("rank", "rank", *_KERNEL), "b": ("out", "rank")},
        _with_mid,
        "rank",
        _SCALED,
    ),
    Kind("LoHa", _LOHA, _loha, "rank", _SCALED),
    Kind("LoHa", _LOHA_WITH_MID, _loha_with_mid, "rank", _SCALED),
    Kind(
        "GLoRA",
        {"a1": ("in", "rank"), "a2": ("rank", "in"), "b1": ("out", "rank"), "b2": ("rank", "in")},
        _glora,
        "rank",
        _SCALED,
        uses_weight=True,
    ),
    Kind(
        "OFT",
        {"oft_blocks": ("blocks", "size", "size")},
        outputs_turned,
        how="alpha",
        may=("alpha", "rescale"),
        uses_weight=True,
        fits=lambda sizes: sizes["blocks"] * sizes["size"] == sizes["out"],
    ),
    Kind(
        "BOFT",
        {"boft_blocks": ("stages", "blocks", "size", "size")},
        butterfly_turned,
        how="alpha",
        may=("alpha", "rescale"),
        uses_weight=True,
        fits=lambda sizes: _butterfly(sizes, "out", halved=True),
    ),
    Kind(
        "PEFT's OFT",
        {"oft_R": ("blocks", "above the diagonal")},
        inputs_turned,
        how="cayley",
        turns_as="OFT",
        uses_weight=True,
        fits=_fits_oft_of_inputs,
    ),
    Kind(
        "PEFT's BOFT",
        {"boft_R": ("stages", "blocks", "size", "size"), "boft_s": ("out", "one")},
        inputs_butterfly_turned,
        how="cayley",
        turns_as="BOFT",
        uses_weight=True,
        fits=lambda sizes: sizes["one"] == 1 and _butterfly(sizes, "in", halved=False),
    ),
    Kind("(IA)3", {"weight": ("changed",), "on_input": ()}, _ia3, uses_weight=True),
    FULL,
)


def kind_of(parts: Mapping[str, object]) -> Kind | None:
    """The kind with most of its tensors among the parts; None if there is none of any."""
    found = max(KINDS, key=lambda kind: _share(kind, parts))
    return found if _share(found, parts)[0] else None


def kind_named(name: str) -> Kind:
    """Of KINDS."""
    return next(kind for kind in KINDS if kind.name == name)


def _share(kind: Kind, parts: Mapping[str, object]) -> tuple[int, int]:
    there = sum(name in parts for name in kind.shapes)
    return there, there - len(kind.shapes)


def expected_shape(axes: tuple[str, ...], known: Sizes) -> str:
    """In words: sizes that are known, names of those that are not."""
    return f"[{', '.join(str(known.get(axis, axis)) for axis in axes)}]"


def sizes_of(
    kind: Kind, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, int]
) -> Sizes | None:
    """Every size of an adapter of that kind, beside those of W; None if its tensors do not fit
    each other or W."""
    sizes = dict(known)
    for name, axes in kind.shapes.items():
        shape = shapes[name]
        if len(shape) != len(axes):
            return None
        for axis, size in zip(axes, shape, strict=True):
            if size < 1 or sizes.setdefault(axis, size) != size:
                return None
    return sizes if kind.fits(sizes) else None


def with_magnitude(
    weight: np.ndarray, delta: np.ndarray, magnitude: np.ndarray, channels: int | None
) -> np.ndarray:
    """What DoRA adds to W: m (W + delta) / ||W + delta|| - W.

    The norm is over the inputs of each row, or (older LyCORIS), where it is told how many
    `channels` of inputs there are, over all that each of them has.
    """
    new = weight + delta
    parts = new.reshape(len(new), channels or 1, -1)
    norm = np.sqrt(np.square(parts, dtype=np.float64).sum(axis=(0 if channels else 1, 2)))
    ratio = (magnitude.reshape(norm.shape) / norm).astype(np.float32)
    each = ratio[None, :, None] if channels else ratio[:, None, None]
    return (parts * each).reshape(new.shape) - weight
