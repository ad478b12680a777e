"""All forms in which tensors of a safetensors file may be quantised, beside scaled fp8."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from fluxjax.checkpoint.quantised import bitsandbytes, comfy, torch_classes
from fluxjax.checkpoint.quantised.parts import Found
from fluxjax.checkpoint.tensors import Tensor

_PLAIN = "take this model in bfloat16, fp8, nf4 or as GGUF"
_REFUSED = (
    (
        r"(.*\.)?(wscales|smooth_factor(_orig)?|smooth|wtscale|wcscales)",
        "is quantised with SVDQuant (nunchaku), packed for its own CUDA kernels, and cannot be "
        f"read: {_PLAIN}",
    ),
    (r"(.*\.)?qzeros", f"is quantised with GPTQ or AWQ, which is not read: {_PLAIN}"),
)


def refuse_packed(names: Collection[str]) -> None:
    """Raises ValueError, naming it, for a quantisation that only its own kernels can read."""
    if not any(name.endswith("qweight") for name in names):
        return
    for pattern, why in _REFUSED:
        if found := next((name for name in names if re.fullmatch(pattern, name)), None):
            raise ValueError(f"it {why} (it holds {found[:100]!r})")


def unquantised(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are there, and those that are quantised under the names of their weights.

    Raises ValueError for parts that are missing, doubled or do not fit together.
    """
    found = list(_found(raw))
    if not found:
        return dict(raw)
    used = {name for one in found for name in one.used}
    plain = {name: tensor for name, tensor in raw.items() if name not in used}
    for one in found:
        if one.name in plain:
            raise ValueError(f"{one.name} is there twice, quantised and not")
        plain[one.name] = one.tensor
    return plain


def _found(raw: Mapping[str, Tensor]) -> Iterator[Found]:
    for read in (
        bitsandbytes.read,
        torch_classes.read_torchao,
        torch_classes.read_quanto,
        comfy.read,
    ):
        yield from read(raw)
