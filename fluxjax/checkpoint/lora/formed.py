"""One module's tensors in a file -> the changes of our parameters, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.finite import is_finite, not_finite
from fluxjax.checkpoint.lora import kinds
from fluxjax.checkpoint.lora.changes import Adapter, Change, Form, Formed, constant, low_rank
from fluxjax.checkpoint.lora.kinds import LORA, Kind
from fluxjax.checkpoint.lora.names import SPLIT_OFT, Group
from fluxjax.checkpoint.lora.peft_config import PeftConfig

_WORDS = {"a": "A (down)", "b": "B (up)", "b_bias": "the bias of B (up)", "magnitude": "magnitude"}
_WHOLE = ("on_input", "reshape_weight")  # numbers that are no weights
Found = tuple[dict[str, Change], list[str]]


class _Wrong(ValueError):
    """What is wrong with a group, one line for each fault."""


def changes_of(group: Group, config: PeftConfig) -> Found:
    """By published name of a parameter, and what is wrong with the group."""
    try:
        values = _read(group)
        inputs = _inputs(group, values)
        if set(values) == {"weight"} or "set_weight" in values:
            return _replaced(group, values, inputs), []
        if any(name.startswith(SPLIT_OFT) for name in values):
            return _turned_parts(group, values, config), []
        if values.get("oft_blocks", np.empty(0)).ndim == 4:
            values["boft_blocks"] = values.pop("oft_blocks")
        found: dict[str, Change] = {}
        kind = kinds.kind_of(values)
        if kind is not None:
            found = _weights(group, kind, values, inputs, config)
        if "bias" in values:
            found |= _biases(group, values.pop("bias"), 1.0)
        if not found or values:
            raise _Wrong(
                "\n".join(
                    f"unknown: {group.keys[part]} {list(group.tensors[part].shape)}"
                    for part in sorted(values) or group.keys
                )
            )
        return found, []
    except _Wrong as error:
        return {}, str(error).split("\n")


def _read(group: Group) -> dict[str, np.ndarray]:
    """Every tensor, float32; on_input and reshape_weight as they are."""
    values, damaged = {}, []
    for part, tensor in group.tensors.items():
        whole = part in _WHOLE
        is_weight = jnp.issubdtype(tensor.dtype, jnp.floating)
        # kohya's alpha is an integer where it is the rank.
        is_weight |= part == "alpha" and jnp.issubdtype(tensor.dtype, jnp.integer)
        if tensor.size > 8 if whole else not is_weight:
            raise _Wrong(f"no weights: {group.keys[part]} is {tensor.dtype} {list(tensor.shape)}")
        with np.errstate(over="ignore", invalid="ignore"):  # said below
            values[part] = tensor.read().astype(np.int64 if whole else np.float32)
        if not whole and not is_finite(values[part]):
            damaged.append(f"{_WORDS.get(part, part)} ({not_finite(values[part])})")
    if damaged:
        raise _Wrong(f"not finite: {group.module}: {', '.join(damaged)}")
    return values


def _inputs(group: Group, values: dict[str, np.ndarray]) -> int | None:
    """More inputs than the module has, which a first layer may be given to which nothing is joined
    yet: those that Control has joined are not those of Fill."""
    names, shapes = group.parts.names, group.network.shapes
    first = group.network.kind.widened[0]
    asked = values.pop("reshape_weight", None)
    has = shapes.get(f"{names[0]}.weight", (0,))
    if names != (first,) or len(has) != 2:
        if asked is not None:
            raise _Wrong(f"unknown: {group.keys['reshape_weight']}: only {first} may be widened")
        return None
    found = next(
        (
            values[p].shape[1]
            for p in ("a", "diff", "set_weight")
            if p in values and values[p].ndim == 2
        ),
        has[1],
    )
    if asked is not None and asked.tolist() != [has[0], found]:
        raise _Wrong(
            f"shape: {group.module} is reshaped to {asked.tolist()}, and is "
            f"{[has[0], found]} as its other tensors have it"
        )
    alone = shapes.get(f"{group.network.kind.last}.weight", has[1:])[0]
    _widen(values, has[1], alone)
    return found if found > has[1] == alone else None


def _widen(values: dict[str, np.ndarray], inputs: int, alone: int) -> None:
    """An adapter of a model to whose inputs nothing is joined, `alone`, changes those that follow
    by nothing, as in diffusers. A DoRA's norms are of all inputs, and it stays as it is."""
    for part in () if "magnitude" in values else ("a", "diff"):
        if part in values and values[part].ndim == 2 and values[part].shape[1] == alone < inputs:
            values[part] = np.pad(values[part], ((0, 0), (0, inputs - alone)))


def _sizes(group: Group, leaf: str) -> dict[str, int]:
    """Rows of each of our parameters, in the order in which the file has them."""
    names = [f"{name}.{leaf}" for name in group.parts.names]
    missing = [name for name in names if name not in group.network.shapes]
    if missing:
        raise _Wrong(
            "\n".join(
                f"unknown: {group.module} changes {n}, which the model has not" for n in missing
            )
        )
    return {name: group.network.shapes[name][0] for name in names}


def _weights(
    group: Group, kind: Kind, values: dict[str, np.ndarray], inputs: int | None, config: PeftConfig
) -> dict[str, Change]:
    """Takes what it uses out of `values`."""
    if kind.turns_as != config.turns_as:
        told = config.where or "no adapter_config.json beside it"
        raise _Wrong(
            f"unknown: {group.module} has tensors of {kind.name}, of which {told} says nothing"
        )
    if config.factored_as and kind.name != config.factored_as:
        raise _Wrong(
            f"unknown: {group.module} has tensors of {kind.name}, and {config.where} is of a "
            f"{config.factored_as}"
        )
    rows = _sizes(group, "weight")
    axes = group.network.shapes[next(iter(rows))]
    missing = [name for name in kind.shapes if name not in values]
    missing += ["magnitude"] if kind is LORA and config.dora and "magnitude" not in values else []
    missing += ["b_bias"] if kind is LORA and config.lora_bias and "b_bias" not in values else []
    if missing:
        raise _Wrong(
            "\n".join(f"missing: {_WORDS.get(name, name)} of {group.module}" for name in missing)
        )
    tensors = {name: values.pop(name) for name in kind.shapes}
    known = {"out": sum(rows.values()), "in": inputs or (math.prod(axes[1:]) if axes[1:] else 0)}
    if len(axes) == 1:
        if kind is not kinds.FULL:
            raise _Wrong(f"unknown: {group.module} has tensors of {kind.name}, and is no matrix")
        return _vector(group, tensors["diff"], rows, known["out"])
    known |= dict(
        zip(("channels", "height", "width"), (inputs or axes[1], *axes[2:]), strict=False)
    )
    tensors = {name: _as_matrix(array, kind.shapes[name], axes) for name, array in tensors.items()}
    if "on_input" in tensors:  # LyCORIS gives convolutions' factors axes of 1
        tensors = {name: _without_axes_of_one(array) for name, array in tensors.items()}
    sizes = _checked_sizes(group, kind, tensors, known)
    extras = {name: values.pop(name) for name in kind.may if name in values}
    scale = _how(group, kind, extras.get("alpha"), sizes.get(kind.rank, 0), config)
    found = _biases(group, extras["b_bias"], scale) if "b_bias" in extras else {}
    magnitude = extras.get("magnitude")
    if kind is LORA and magnitude is None and len(axes) == 2:
        return found | _products(group, tensors, scale, rows, inputs)
    if "rescale" in extras:
        if extras["rescale"].size != known["out"]:
            raise _Wrong(
                f"shape: {group.keys['rescale']} is {list(extras['rescale'].shape)}, "
                f"expected [{known['out']}, 1]"
            )
        tensors["rescale"] = extras["rescale"].reshape(-1, 1)
    form: Form = partial(kind.form, tensors, scale)
    if magnitude is not None:
        form = _with_magnitude(group, form, magnitude, known)
    formed = Formed(
        {name: group.network.shapes[name] for name in rows},
        form,
        uses_weight=kind.uses_weight or magnitude is not None,
        swap_halves=group.parts.swap_halves,
    )
    changes = {name: formed.change(name, inputs) for name in rows}
    if kind is LORA and magnitude is None and not inputs:
        (name,) = rows
        pair = _as_convolutions(tensors["a"], tensors["b"], axes)
        changes[name] = replace(changes[name], low_rank=Adapter(*pair, scale))
    return found | changes


def _as_convolutions(
    a: np.ndarray, b: np.ndarray, weight: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Two that do one after the other what the matrices do: the first has the kernel."""
    return a.reshape(len(a), *weight[1:]), b.reshape(*b.shape, *(1 for _ in weight[2:]))


def _as_matrix(array: np.ndarray, axes: tuple[str, ...], weight: tuple[int, ...]) -> np.ndarray:
    """A tensor of two `axes` that has a kernel after them: that of a convolution's `weight`, which
    is joined to the last of them, or one of a single place."""
    kernel = array.shape[2:]
    if len(axes) != 2 or len(kernel) < 2:
        return array
    if set(kernel) == {1}:
        return array.reshape(array.shape[:2])
    return array.reshape(len(array), -1) if kernel == weight[2:] else array


def _without_axes_of_one(array: np.ndarray) -> np.ndarray:
    return array.reshape([size for size in array.shape if size != 1])


def _turned_parts(
    group: Group, values: dict[str, np.ndarray], config: PeftConfig
) -> dict[str, Change]:
    """kohya's OFT: of each part of a module blocks of their own, or one set of all of it."""
    alpha = {"alpha": values.pop("alpha")} if "alpha" in values else {}
    whole = set(values) == {f"{SPLIT_OFT}0"}
    names = (group.parts.names,) if whole else [(name,) for name in group.parts.names]
    wanted = [f"{SPLIT_OFT}{i}" for i in range(len(names))]
    wrong = [f"missing: {n} of {group.module}" for n in wanted if n not in values]
    wrong += [
        f"unknown: {group.keys[n]}, a part that {group.module} has not"
        for n in values
        if n not in wanted
    ]
    if wrong or not alpha.get("alpha", np.ones(1)).any():
        raise _Wrong("\n".join(wrong) or f"alpha of {group.module} is 0, with which nothing turns")
    found: dict[str, Change] = {}
    for one, part in zip(names, wanted, strict=True):
        mine = replace(group, parts=group.parts._replace(names=one))
        turned = {"oft_blocks": values[part], **alpha}
        found |= _weights(mine, kinds.kind_named("OFT"), turned, None, config)
    return found


def _with_magnitude(
    group: Group, form: Form, magnitude: np.ndarray, known: Mapping[str, int]
) -> Form:
    (out, channels), shape = (known["out"], known["channels"]), magnitude.shape
    if len(shape) > 3 and set(shape[2:]) == {1}:  # a convolution's; PEFT has another order
        pefts = "lora_magnitude" in group.keys["magnitude"]
        shape = shape[1::-1] if pefts and shape[0] == 1 else shape[:2]
    over_rows = shape == (1, channels) and shape != (out, 1)
    if not over_rows and shape not in ((out,), (out, 1)):
        raise _Wrong(
            f"shape: {group.keys['magnitude']} is {list(magnitude.shape)}, expected [{out}] or "
            f"[{out}, 1], or [1, {channels}]"
        )
    over = channels if over_rows else None
    return lambda weight: kinds.with_magnitude(weight, form(weight), magnitude, over)


def _checked_sizes(
    group: Group, kind: Kind, tensors: Mapping[str, np.ndarray], known: Mapping[str, int]
) -> kinds.Sizes:
    shapes = {name: array.shape for name, array in tensors.items()}
    sizes = kinds.sizes_of(kind, shapes, known)
    if sizes is not None and "on_input" in tensors:
        over = known["channels"] if tensors["on_input"].item() else known["out"]
        sizes = sizes if sizes["changed"] == over else None
    if sizes is None:
        got = " and ".join(str(list(shape)) for shape in shapes.values())
        want = " and ".join(kinds.expected_shape(axes, known) for axes in kind.shapes.values())
        more = f" for a change of [{known['out']}, {known['in']}]" * (kind is not LORA)
        raise _Wrong(f"shape: {group.module} has {got}, expected {want}{more}")
    return sizes


def _how(group: Group, kind: Kind, alpha: np.ndarray | None, rank: int, config: PeftConfig) -> Any:
    """What the kind's form is told; a scale is alpha / rank, alpha being that of the tensors
    (kohya), of PEFT's config, or the rank."""
    if alpha is not None and alpha.size != 1:
        raise _Wrong(f"shape: {group.module}.alpha is {list(alpha.shape)}, expected one number")
    if kind.how == "cayley":
        return config.cayley
    if kind.how == "alpha":
        return 0.0 if alpha is None else float(alpha.reshape(()))
    if not kind.rank:
        return config.scale_of_whole(group.plain)
    if alpha is None:
        with np.errstate(over="ignore"):
            scale = np.float32(config.scale(group.plain, rank))
    else:
        scale = np.float32(alpha.reshape(()) / np.float32(rank))
        if config.alpha and not np.isclose(scale, config.scale(group.plain, rank), rtol=1e-2):
            raise _Wrong(
                f"unknown: how much {group.module} counts: its alpha is {alpha.item():g} of rank "
                f"{rank}, and {config.where} says another"
            )
    if scale == 0:
        raise _Wrong(f"alpha of {group.module} is 0, which some take for its rank and some for 0")
    if not np.isfinite(scale):
        raise _Wrong(f"not finite: {group.module}: alpha / rank")
    return float(scale)


def _products(
    group: Group,
    tensors: dict[str, np.ndarray],
    scale: float,
    rows: Mapping[str, int],
    inputs: int | None,
) -> dict[str, Change]:
    a, b = tensors["a"], tensors["b"]
    if group.parts.swap_halves:
        b = np.roll(b, len(b) // 2, axis=0)
    found = {}
    ends = np.cumsum(list(rows.values()))[:-1]
    for name, part in zip(rows, np.split(b, ends), strict=True):
        # Of a block-diagonal B, a part needs only the ranks that reach it.
        used = part.any(axis=0) if len(rows) > 1 and b.any() else np.ones(len(a), bool)
        if used.any():
            found[name] = low_rank(Adapter(a[used], part[:, used], scale), inputs)
    return found


def _vector(
    group: Group, diff: np.ndarray, rows: Mapping[str, int], out: int, scale: float = 1.0
) -> dict[str, Change]:
    """Of biases and of norms' scales."""
    if diff.shape != (out,):
        raise _Wrong(
            f"shape: {group.module} changes {', '.join(rows)} by {list(diff.shape)}, "
            f"expected [{out}]"
        )
    if group.parts.swap_halves:
        diff = np.roll(diff, out // 2)
    ends = np.cumsum(list(rows.values()))[:-1]
    parts = np.split(diff * np.float32(scale), ends)
    return {name: constant(part) for name, part in zip(rows, parts, strict=True)}


def _biases(group: Group, diff: np.ndarray, scale: float) -> dict[str, Change]:
    rows = _sizes(group, "bias")
    return _vector(group, diff, rows, sum(rows.values()), scale)


def _replaced(group: Group, values: dict[str, np.ndarray], inputs: int | None) -> dict[str, Change]:
    """Norms' scales that stand in a file whole, and what says that it is set."""
    part = "set_weight" if "set_weight" in values else "weight"
    value, rows = values.pop(part), _sizes(group, "weight")
    shape = group.network.shapes[next(iter(rows))]
    out = (sum(rows.values()), *shape[1:])
    if values or (part == "weight" and len(shape) != 1):
        keys = [group.keys[name] for name in values or (part,)]
        raise _Wrong("\n".join(f"unknown: {key} (a whole weight)" for key in keys))
    if value.shape != (out if inputs is None else (out[0], inputs)):
        raise _Wrong(f"shape: {group.keys[part]} is {list(value.shape)}, expected {list(out)}")
    if group.parts.swap_halves:
        value = np.roll(value, len(value) // 2, axis=0)
    ends = np.cumsum(list(rows.values()))[:-1]
    parts = zip(rows, np.split(value, ends), strict=True)
    return {name: Change(value=rows, inputs=inputs) for name, rows in parts}
