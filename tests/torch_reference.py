"""Carrying a torch module's weights into our trees, and measuring the distance."""

import re

import numpy as np
import torch


def relative_l2(ours, expected) -> float:
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def from_torch(model: torch.nn.Module) -> dict:
    tree: dict = {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        module = modules[parent]
        value = tensor.float().numpy()
        if leaf == "weight":
            if isinstance(module, torch.nn.Embedding):
                leaf = "embedding"
            elif value.ndim == 1:
                leaf = "scale"
            else:
                leaf = "kernel"
                value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        path = re.sub(r"\.(\d+)", r"_\1", parent)
        path = path.replace("encoder.block_0.layer_0.SelfAttention.relative", "encoder.relative")
        if "embed_tokens" in path:
            continue
        node = tree
        for part in filter(None, path.split(".")):
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree
