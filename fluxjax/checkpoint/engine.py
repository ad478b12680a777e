"""The one conversion engine: checkpoint names <-> published names <-> our parameter trees.

Our tree mirrors the published names (diffusers, transformers): dots nest, a number is joined to
the name before it (`transformer_blocks.0.attn.to_out.0.weight` is
`transformer_blocks_0/attn/to_out_0/kernel`), and a stacked group `transformer_blocks` carries a
leading layer axis. What a checkpoint calls otherwise is a `Table` of rules. Everything is checked
before anything is read: unknown, missing and mis-shaped tensors are listed all in one error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fluxjax.checkpoint import mapped_memory as memory
from fluxjax.checkpoint import tensors
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.models.names import flatten, is_stacked, published_name, unflatten
from fluxjax.models.quantised import Quantised
from fluxjax.networks.tables import Rule, Table


class MappingError(ValueError):
    """Tensors that do not fit the network; the message lists every one of them."""


_MOST_SHOWN = 5000

# Dense layers', pictures' and clips' convolutions.
_AXES = {"kernel2": (1, 0), "kernel4": (3, 2, 0, 1), "kernel5": (4, 3, 0, 1, 2)}  # ours -> theirs
_INVERSE_AXES = {"kernel2": (1, 0), "kernel4": (2, 3, 1, 0), "kernel5": (2, 3, 4, 1, 0)}


@dataclass(frozen=True)
class Leaf:
    """Where one published tensor lives in our tree: path, layer of a stacked leaf, layout."""

    path: tuple[str, ...]
    layer: int | None
    layout: str
    shape: tuple[int, ...]  # in the published layout


def published_leaves(template: Mapping[str, Any]) -> dict[str, Leaf]:
    """Every published name of a tree (arrays or ShapeDtypeStructs, stacked or per layer)."""
    leaves: dict[str, Leaf] = {}
    for path, value in flatten(template).items():
        stacked = is_stacked(path)
        shape = tuple(value.shape[1:] if stacked else value.shape)
        coded = isinstance(value, Quantised)  # its codes lie as published
        layout = f"kernel{len(shape)}" if path[-1] == "kernel" and not coded else "same"
        if layout in _AXES:
            shape = tuple(shape[axis] for axis in _AXES[layout])
        for layer in range(value.shape[0]) if stacked else (None,):
            leaves[published_name(path, layer)] = Leaf(path, layer, layout, shape)
    return leaves


@cache
def _pattern(module: str) -> re.Pattern[str]:
    return re.compile(re.escape(module).replace(r"\{\}", r"(\d+)"))


def match_rule(table: Table, name: str) -> tuple[Rule, list[str]] | None:
    """The rule for a name of theirs, and the published names of its parts."""
    module, _, leaf = name.rpartition(".")
    for rule in table.rules:
        found = _pattern(rule.theirs).fullmatch(module)
        ours = dict(rule.leaves).get(leaf)
        if found and ours:
            return rule, [_joined(part.format(*found.groups()), ours) for part in rule.ours]
    return None


def _joined(module: str, leaf: str) -> str:
    """A parameter of the network itself has no module before its name."""
    return f"{module}.{leaf}" if module else leaf


def to_published(
    source: Mapping[str, Tensor], table: Table, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """`source` under published names; `shapes` are all published names and shapes expected.

    Raises MappingError, listing every tensor that is unknown, missing, doubled or mis-shaped.
    """
    found: dict[str, Tensor] = {}
    errors: list[str] = []

    def ignored(theirs: str) -> bool:
        return any(re.fullmatch(pattern, theirs) for pattern in table.ignored)

    def put(name: str, tensor: Tensor, theirs: str) -> None:
        if name not in shapes:
            if not ignored(theirs):
                errors.append(f"unknown: {theirs} {list(tensor.shape)}")
        elif name in found and theirs != "encoder.embed_tokens.weight":
            errors.append(f"doubled: {theirs} is {name}, which the file holds too")
        elif tensor.shape != shapes[name]:
            got, want = list(tensor.shape), list(shapes[name])
            errors.append(f"shape: {theirs} is {got}, where {name} is {want}")
            found[name] = tensor
        else:
            found[name] = tensor

    # T5 files may hold the embedding twice; `shared` is read first and wins.
    for theirs in sorted(source, key=lambda name: (name == "encoder.embed_tokens.weight", name)):
        tensor = source[theirs]
        matched = match_rule(table, theirs)
        if matched is None:
            if theirs in shapes and table.identity:
                put(theirs, tensor, theirs)
            elif not ignored(theirs):
                errors.append(f"unknown: {theirs} {list(tensor.shape)}")
            continue
        rule, names = matched
        if rule.pointwise and tensor.shape[2:] == (1,) * rule.pointwise:
            tensor = tensors.reshape(tensor, tensor.shape[:2])
        if rule.transposed and len(tensor.shape) == 2:
            tensor = tensors.transpose(tensor, (1, 0))
        if rule.swap_halves:
            tensor = tensors.swap_halves(tensor)
        if rule.halved_heads and tensor.shape and tensor.shape[0] % rule.halved_heads == 0:
            tensor = tensors.interleave(tensor, rule.halved_heads)
        if rule.paired_heads and tensor.shape and tensor.shape[0] % rule.paired_heads == 0:
            tensor = tensors.deinterleave(tensor, rule.paired_heads)
        if len(names) == 1 or any(name not in shapes for name in names):
            put(names[0], tensor, theirs)
            continue
        sizes = [shapes[name][0] for name in names]
        if not tensor.shape or tensor.shape[0] != sum(sizes):
            want = [sum(sizes), *shapes[names[0]][1:]]
            errors.append(f"shape: {theirs} is {list(tensor.shape)}, expected {want}")
            found.update(dict.fromkeys(names, tensor))
            continue
        start = 0
        for name, size in zip(names, sizes, strict=True):
            put(name, tensors.slice_rows(tensor, start, start + size), theirs)
            start += size
    errors += [f"missing: {name} {list(shapes[name])}" for name in shapes if name not in found]
    if errors:
        raise MappingError(listed(f"do not fit the {table.name}", errors))
    return found


def listed(what: str, errors: list[str]) -> str:
    """Names come from files of strangers: control characters are shown, not obeyed, and of more
    than any network has only the first ones."""
    shown = errors[:_MOST_SHOWN]
    lines = [line if line.isprintable() else repr(line)[1:-1] for line in shown]
    more = [f"and {len(errors) - len(lines)} more"] * (len(errors) > len(lines))
    return "\n  ".join([f"{len(errors)} tensor(s) {what}:", *lines, *more])


def from_published(published: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The tensors under the table's names; the inverse of `to_published`.

    A table with `identity` changes nothing: its rules only read older names.
    Raises MappingError for published names that the table cannot express.
    """
    if table.identity:
        return dict(published)
    left = dict(published)
    theirs: dict[str, Tensor] = {}
    errors: list[str] = []
    for name in published:
        module, _, leaf = name.rpartition(".")
        for rule in table.rules:
            matched = _pattern(rule.ours[0]).fullmatch(module)
            their_leaf = {ours: theirs for theirs, ours in rule.leaves}.get(leaf)
            if matched is None or their_leaf is None:
                continue
            numbers = matched.groups()
            target = _joined(rule.theirs.format(*numbers), their_leaf)
            parts = [left.pop(_joined(ours.format(*numbers), leaf), None) for ours in rule.ours]
            if any(part is None for part in parts):
                errors.append(f"missing: a part of {target}")
                break
            try:
                tensor = tensors.concatenate([part for part in parts if part is not None])
            except ValueError as error:
                errors.append(f"{target}: {error}")
                break
            if rule.swap_halves:
                tensor = tensors.swap_halves(tensor)
            if rule.halved_heads:
                tensor = tensors.deinterleave(tensor, rule.halved_heads)
            if rule.paired_heads:
                tensor = tensors.interleave(tensor, rule.paired_heads)
            if rule.transposed:
                tensor = tensors.transpose(tensor, (1, 0))
            if rule.pointwise and leaf == "weight":
                tensor = tensors.reshape(tensor, (*tensor.shape, *(1,) * rule.pointwise))
            theirs[target] = tensor
            break
    errors += [f"no name: {name}" for name in left]
    if errors:
        raise MappingError(listed(f"cannot be written for the {table.name}", errors))
    return theirs


def to_tree(
    published: Mapping[str, Tensor],
    template: Mapping[str, Any],
    *,
    dtype: Any = None,
    place: Callable[[tuple[str, ...], Tensor], Any] | None = None,
) -> dict[str, Any]:
    """Our tree with the form (stacked or per layer) of `template`; every name must be there.

    `place(path, tensor)` makes the leaf from a lazy tensor, by default a numpy array. A stacked
    leaf is filled one layer at a time.
    """
    place = place or (lambda path, tensor: tensor.read())
    layers: dict[tuple[str, ...], list[Tensor]] = {}
    stacked: set[tuple[str, ...]] = set()
    for name, leaf in published_leaves(template).items():
        tensor = published[name]
        if leaf.layout in _INVERSE_AXES:
            tensor = tensors.transpose(tensor, _INVERSE_AXES[leaf.layout])
        if dtype is not None:
            tensor = tensors.astype(tensor, np.dtype(dtype))
        layers.setdefault(leaf.path, []).append(tensor)
        if leaf.layer is not None:
            stacked.add(leaf.path)
    return unflatten(
        {
            path: place(path, stack(parts) if path in stacked else parts[0])
            for path, parts in layers.items()
        }
    )


def stack(parts: list[Tensor]) -> Tensor:
    """Layers under one new leading axis."""

    def rows(start: int, stop: int) -> np.ndarray:
        if stop - start == 1:  # not copied
            return parts[start].read()[None]
        # Aligned, or JAX would copy it to a device that is the host.
        out = memory.empty((stop - start, *parts[0].shape), parts[0].dtype)
        for i in range(start, stop):
            out[i - start] = parts[i].read()
        return out

    return Tensor((len(parts), *parts[0].shape), parts[0].dtype, rows, by_rows=True)


def from_tree(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Published names -> lazy tensors in the published layout, of a stacked or per-layer tree.

    Leaves are arrays, `Tensor`s, or codes of them.
    """
    flat = flatten(params)
    published: dict[str, Tensor] = {}
    for name, leaf in published_leaves(params).items():
        value = flat[leaf.path]
        if isinstance(value, Quantised):
            codes, layer = value.map(tensors.as_tensor), leaf.layer
            if layer is not None:
                codes = codes.map(lambda part, i=layer: tensors.index(part, i))
            published[name] = tensors.unpacked(codes)
            continue
        tensor = tensors.as_tensor(value)
        if leaf.layer is not None:
            tensor = tensors.index(tensor, leaf.layer)
        if leaf.layout in _AXES:
            tensor = tensors.transpose(tensor, _AXES[leaf.layout])
        published[name] = tensor
    return published


def to_ours(
    source: Mapping[str, Any], table: Table, template: Mapping[str, Any], **options: Any
) -> dict[str, Any]:
    """A checkpoint's tensors (arrays or lazy) as our tree. Options are those of `to_tree`."""
    lazy = {name: tensors.as_tensor(value) for name, value in source.items()}
    shapes = {name: leaf.shape for name, leaf in published_leaves(template).items()}
    return to_tree(to_published(lazy, table, shapes), template, **options)
