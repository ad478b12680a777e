"""A torch module's weights as our trees, and how far two arrays are apart."""

import numpy as np
import torch

from fluxjax.checkpoint.engine import to_ours
from fluxjax.checkpoint.tables import CLIP_TEXT, CLIP_VISION, T5
from fluxjax.checkpoint.templates import Config, abstract_params
from fluxjax.config import CLIPTextConfig, CLIPVisionConfig, T5Config


def relative_l2(ours, expected) -> float:
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def from_torch(model: torch.nn.Module, config: Config, *, with_projection: bool = False) -> dict:
    """A transformers model's weights as our tree, through the converter that ships."""
    tables = {T5Config: T5, CLIPTextConfig: CLIP_TEXT, CLIPVisionConfig: CLIP_VISION}
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    template = abstract_params(config, with_projection=with_projection)
    return to_ours(weights, tables[type(config)], template)
