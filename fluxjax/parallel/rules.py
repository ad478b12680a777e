"""Where every parameter lies: one table, pattern of the path -> PartitionSpec, for all networks.

Two layers that follow each other share out the width between them over `tensor`: the first is split
by columns (its outputs: heads, MLP channels), the second by rows (its inputs), so that one sum over
the devices ends the pair. The inputs of each kernel are split over `fsdp`; such a kernel is
gathered where it is used. Leaves of a few thousand numbers are held by every device.

A pattern matches the end of a path. Thus moments, averages and LoRA, whose paths end in those of
the parameters, follow the same table, and so do stacked blocks, with a leading layer axis.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.models.stacking import GROUPS

_COLUMNS = (
    # FLUX; `norm...` are the modulations, `..._embedder` those of timestep, guidance and text.
    r"attn/to_[qkv]|attn/add_[qkv]_proj|net_0/proj|proj_mlp"
    r"|(?:norm|norm1|norm1_context|norm_out)/linear|(?:timestep|guidance|text)_embedder/linear_1"
    # T5.
    r"|SelfAttention/[qkv]|DenseReluDense/wi(?:_[01])?"
)
_ROWS = (
    r"attn/to_out_0|attn/to_add_out|net_2|single_transformer_blocks/proj_out"
    r"|(?:timestep|guidance|text)_embedder/linear_2"
    r"|SelfAttention/o|DenseReluDense/wo"
)
# Over fsdp only: FLUX's first and last layer, all of CLIP, and the autoencoder's one head.
_WHOLE = (
    r"x_embedder|context_embedder|(?<!single_transformer_blocks/)proj_out"
    r"|self_attn/(?:[qkv]|out)_proj|mlp/fc[12]|(?:text|visual)_projection"
    r"|attentions_0/to_(?:[qkv]|out_0)"
)
_CONVOLUTIONS = r"conv(?:[12]|_in|_out|_shortcut)?|(?:post_)?quant_conv|embeddings/patch_embedding"
_NORMS = (
    r"attn/norm_(?:added_)?[qk]|resnets_\d+/norm[12]|group_norm|conv_norm_out"
    r"|layer_norm[12]?|final_layer_norm|pre_layrnorm|post_layernorm"
)

RULES: tuple[tuple[str, P], ...] = (
    (rf"(?:{_COLUMNS})/kernel", P("fsdp", "tensor")),
    (rf"(?:{_ROWS})/kernel", P(("tensor", "fsdp"), None)),
    (rf"(?:{_WHOLE})/kernel", P("fsdp", None)),
    (rf"(?:{_CONVOLUTIONS})/kernel", P(None, None, None, "fsdp")),
    (rf"(?:{_COLUMNS})/bias", P("tensor")),
    (rf"(?:{_ROWS}|{_WHOLE}|{_CONVOLUTIONS}|{_NORMS})/bias", P()),
    (rf"(?:{_NORMS})/scale", P()),
    (r"(?:shared|token_embedding)/embedding", P(None, "fsdp")),
    (r"position_embedding/embedding", P()),
    (r"relative_attention_bias/embedding", P(None, "tensor")),
    (r"class_embedding", P()),
    # LoRA: x a b beside x kernel.
    (rf"(?:{_COLUMNS})/a", P("fsdp", None)),
    (rf"(?:{_COLUMNS})/b", P(None, "tensor")),
    (rf"(?:{_ROWS})/a", P(("tensor", "fsdp"), None)),
    (rf"(?:{_WHOLE})/a", P("fsdp", None)),
    (rf"(?:{_ROWS}|{_WHOLE})/b", P()),
    (rf"(?:{_COLUMNS}|{_ROWS}|{_WHOLE})/scale", P()),
)
_STACKED = re.compile(rf"(?:^|.*/)(?:{'|'.join(GROUPS)})/.*")
_NUMBERED = re.compile(rf"(?<![^/])({'|'.join(GROUPS)})_\d+(?=/)")


def matching_rules(path: str) -> list[tuple[str, P]]:
    """The rules for `a/b/kernel`; exactly one for every parameter."""
    return list(_matching(_NUMBERED.sub(r"\1", path)))


@cache
def _matching(path: str) -> tuple[tuple[str, P], ...]:
    return tuple(
        (pattern, spec) for pattern, spec in RULES if re.fullmatch(rf"(?:.*/)?(?:{pattern})", path)
    )


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P | None:
    """A leaf's spec; None if no rule has its path and rank.

    An axis that does not divide the leaf's dimension is left out, and so are axes of one device.
    """
    stacked = _STACKED.fullmatch(path) is not None
    for _, spec in matching_rules(path):
        axes = (*(None,) * stacked, *spec)
        if len(axes) == len(shape) or not any(axes):
            kept = [
                _dividing(axis, length, mesh) for axis, length in zip(axes, shape, strict=False)
            ]
            return P(*kept) if any(kept) else P()
    return None


def _dividing(axes: str | tuple[str, ...] | None, length: int, mesh: Mesh | AbstractMesh) -> Any:
    """Those of `axes` by which `length` can be divided, one after the other."""
    kept: list[str] = []
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        if mesh.shape[axis] > 1 and length % mesh.shape[axis] == 0:
            kept.append(axis)
            length //= mesh.shape[axis]
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of parameters (arrays or ShapeDtypeStructs) of any network.

    Raises ValueError, listing them, for parameters that no rule is for.
    """
    unknown: list[str] = []

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = _name(path)
        spec = spec_of(name, tuple(leaf.shape), mesh)
        if spec is None:
            unknown.append(f"{name} {list(leaf.shape)}")
        return NamedSharding(mesh, spec or P())

    shardings = jax.tree.map_with_path(place, params)
    if unknown:
        raise ValueError("\n  ".join(["no sharding rule is for:", *unknown]))
    return shardings


def state_shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedShardings of a tree that holds trees of parameters: averages, moments, LoRA.

    What no rule is for (counters, factored moments) is held by every device.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, spec_of(_name(path), tuple(leaf.shape), mesh) or P()
        ),
        state,
    )


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes that the fullest device holds of `tree` in these shardings."""
    each = jax.tree.map(
        lambda leaf, sharding: (
            math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
        ),
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(each))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
