"""A torch module's weights as our trees, and how far two arrays are apart."""

import numpy as np
import torch

from fluxjax.checkpoint.engine import to_ours
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.networks import Config, network_of


def relative_l2(ours, expected) -> float:
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def from_torch(model: torch.nn.Module, config: Config) -> dict:
    """A transformers model's weights as our tree, through the converter that ships."""
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    table = network_of(config).dialect("published").table(config)
    return to_ours(weights, table, abstract_params(config))
