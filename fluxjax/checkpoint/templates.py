"""The parameter tree of a network as shapes only: what a checkpoint must fill."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.tensors import Tensor
from fluxjax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    FluxConfig,
    T5Config,
)
from fluxjax.models.stacking import unstack_layers

Config = FluxConfig | AutoencoderConfig | CLIPTextConfig | CLIPVisionConfig | T5Config


def abstract_params(
    config: Config, *, stacked: bool = False, with_projection: bool = False
) -> dict[str, Any]:
    """Tree of float32 ShapeDtypeStructs, without the outer {"params": ...}. Computes nothing.

    `stacked`: repeated blocks carry a leading layer axis, as the networks with scan_layers=True
    expect. `with_projection` is CLIP's.
    """
    # Scanned networks are traced in a time that does not grow with the layers, and once.
    with _LOCK:
        tree = _traced(config, with_projection)
    return jax.tree.map(lambda leaf: leaf, tree) if stacked else unstack_layers(tree)


_LOCK = threading.Lock()


@cache
def _traced(config: Config, with_projection: bool) -> dict[str, Any]:
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    if isinstance(config, FluxConfig):
        from fluxjax.models.flux import FluxTransformer

        module = FluxTransformer(config, scan_layers=True)
        inputs = [
            spec(1, 4, config.in_channels), spec(1, 2, config.joint_attention_dim),
            spec(1, config.pooled_projection_dim), spec(1), spec(4, 3), spec(2, 3),
            spec(1) if config.guidance_embeds else None,
        ]  # fmt: skip
    elif isinstance(config, AutoencoderConfig):
        from fluxjax.models.autoencoder import Autoencoder

        module = Autoencoder(config)
        inputs = [spec(1, config.scale * 2, config.scale * 2, config.in_channels)]
    elif isinstance(config, T5Config):
        from fluxjax.models.t5 import T5Encoder

        module = T5Encoder(config, scan_layers=True)
        inputs = [spec(1, 4, dtype=jnp.int32)]
    elif isinstance(config, CLIPTextConfig):
        from fluxjax.models.clip import CLIPTextModel

        module = CLIPTextModel(config, scan_layers=True, with_projection=with_projection)
        inputs = [spec(1, config.max_position_embeddings, dtype=jnp.int32)]
    else:
        from fluxjax.models.clip import CLIPVisionModel

        module = CLIPVisionModel(config, scan_layers=True, with_projection=with_projection)
        inputs = [spec(1, config.image_size, config.image_size, config.num_channels)]
    return jax.eval_shape(module.init, key, *inputs)["params"]


def parameter_count(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.shape, dtype=np.int64))
        for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Tensor))
    )
