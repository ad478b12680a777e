"""Every layer's output by name, from PyTorch through hooks and from ours through captures.

Names are PyTorch's (`transformer_blocks.0.attn.to_q`). Ours are the same with numbers joined to the
word before, so one function turns either into the common form. torch is touched only through the
module that the caller hands in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

if TYPE_CHECKING:
    import torch

Outputs = tuple[np.ndarray, ...]


class Layer(NamedTuple):
    """What one call of one module returned; `call` counts the calls of a module used twice."""

    name: str
    call: int
    outputs: Outputs


def common_name(name: str) -> str:
    """One spelling for both sides: `a.0.b` and `a_0/b` become `a_0/b`.

    transformers 5 drops the outer `text_model` and `vision_model` from CLIP's module names, while
    its files and our trees keep them; they are dropped here.
    """
    words: list[str] = []
    for word in name.replace("/", ".").split("."):
        if word.isdigit() and words:
            words[-1] += f"_{word}"
        else:
            words.append(word)
    if words[0] in ("text_model", "vision_model"):
        words = words[1:]
    common = "/".join(words)
    return _RENAMED.get(common, common)


# T5: the table of position biases lies in the first block there and serves all blocks here.
# IP-Adapters: diffusers names the projection otherwise than its files do.
_RENAMED = {
    "image_proj/image_embeds": "image_proj/proj",
    "encoder/embed_tokens": "shared",
    "encoder/block_0/layer_0/SelfAttention/relative_attention_bias": (
        "encoder/relative_attention_bias"
    ),
}


@contextlib.contextmanager
def recorded(network: torch.nn.Module) -> Iterator[list[Layer]]:
    """Record every submodule's outputs, in the order in which the calls return.

    A module returns after its children, so the first wrong entry is the innermost fault. In a
    convolutional network, and from what holds a convolution, pictures (b, c, h, w) and clips
    (b, c, t, h, w) come out with channels last, as ours are laid out.
    """
    import torch

    def holds(module: torch.nn.Module, kind: type) -> bool:
        return any(isinstance(part, kind) for part in module.modules())

    convolutional = holds(network, torch.nn.GroupNorm)
    layers: list[Layer] = []
    calls: dict[str, int] = {}

    def hook_for(name: str, module: torch.nn.Module):
        pictures = convolutional or any(
            holds(module, kind) for kind in (torch.nn.Conv2d, torch.nn.Conv3d)
        )
        group_norm = isinstance(module, torch.nn.GroupNorm)

        def hook(_module: object, _inputs: object, output: object) -> None:
            outputs = []
            for tensor in _tensors(output):
                # numpy has no bfloat16; the copy guards against later in-place changes.
                array = tensor.detach().float().cpu().numpy().copy()
                # GroupNorm has its channels second even on the flattened (b, c, h w).
                if pictures and (array.ndim in (4, 5) or (group_norm and array.ndim == 3)):
                    array = np.moveaxis(array, 1, -1)
                outputs.append(array)
            layers.append(Layer(name, calls.get(name, 0), tuple(outputs)))
            calls[name] = calls.get(name, 0) + 1

        return hook

    handles = [
        child.register_forward_hook(hook_for(name, child))
        for name, child in network.named_modules()
        if name
    ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: object) -> list[torch.Tensor]:
    """The tensors of whatever a module returned: a tensor, a tuple, a ModelOutput."""
    import torch

    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, tuple | list):
        return [t for value in output for t in _tensors(value)]
    return []


def captured(intermediates: Mapping) -> dict[str, list[Outputs]]:
    """Turn flax's `capture_intermediates` tree into common name -> outputs of each call."""
    found: dict[str, list[Outputs]] = {}

    def walk(node: Mapping, path: tuple[str, ...]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, (*path, key))
            elif key == "__call__" and path:
                found[common_name("/".join(path))] = [
                    tuple(np.asarray(leaf).astype(np.float32) for leaf in jax.tree.leaves(call))
                    for call in value
                ]

    walk(intermediates, ())
    return found


class Pair(NamedTuple):
    """Our tensor and PyTorch's, under PyTorch's name."""

    name: str
    ours: np.ndarray
    expected: np.ndarray


def pair_layers(expected: list[Layer], ours: dict[str, list[Outputs]]) -> list[Pair]:
    """Pair what both sides have, in PyTorch's execution order.

    Modules that only one side has (dropout, activations, containers) are left out: a fault in
    one shows in the next module that both have.
    """
    pairs: list[Pair] = []
    for layer in expected:
        common = common_name(layer.name)
        calls = ours.get(common, []) if common else []
        if layer.call >= len(calls):
            continue
        name = layer.name if layer.call == 0 else f"{layer.name} (call {layer.call + 1})"
        aligned = _align(calls[layer.call], layer.outputs)
        for index, (a, b) in enumerate(aligned):
            label = name if len(aligned) == 1 else f"{name} [{index}]"
            pairs.append(Pair(label, _laid_out_as(a, b), b))
    return pairs


def _laid_out_as(ours: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The same values with axes merged (heads, height and width) are the same tensor, and so are
    they with heads before tokens."""
    if ours.ndim == 4 and ours.shape != expected.shape == ours.swapaxes(1, 2).shape:
        return ours.swapaxes(1, 2)
    return ours.reshape(expected.shape) if ours.size == expected.size else ours


def _align(ours: Outputs, expected: Outputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Match the outputs of one call one to one."""
    if len(ours) == 1 and len(expected) > 1:
        # Text and image may be one joint sequence here and two tensors there.
        lengths = [r.shape[1] for r in expected if r.ndim == ours[0].ndim]
        if len(lengths) == len(expected) and ours[0].shape[1] == sum(lengths):
            return [(ours[0], np.concatenate(expected, axis=1))]
    swapped = [array.shape for array in ours[::-1]]
    if len(ours) == 2 and swapped == [r.shape for r in expected] != swapped[::-1]:
        ours = ours[::-1]  # (image, text) here, (text, image) there
    # What one side returns beyond the other (attention's position bias) is no layer's output.
    return list(zip(ours, expected, strict=False))
