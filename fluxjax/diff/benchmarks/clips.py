"""HunyuanVideo's networks at their full width beside diffusers, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fluxjax.diff.benchmarks.bench import Measure, medians


def clips(rounds: int, heads: int = 24, widths: tuple[int, ...] = (128, 256, 512, 512)) -> list:
    """A forward of 2 double and 4 single blocks, and the autoencoder's decoding of five frames."""
    return [_transformer(rounds, heads), _decoding(rounds, widths)]


def _transformer(rounds: int, heads: int) -> Measure:
    """Of two latent frames of 256 x 256 and 64 tokens of text, of which 40 are real."""
    from diffusers import HunyuanVideoTransformer3DModel

    from fluxjax.config import HUNYUAN_VIDEO

    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_layers": 2,
        "num_single_layers": 4,
    }
    config = dataclasses.replace(HUNYUAN_VIDEO, **sizes)
    theirs = _random(lambda: HunyuanVideoTransformer3DModel(**sizes))
    random = np.random.default_rng(0)
    arrays = {
        "hidden_states": random.standard_normal((1, 16, 2, 32, 32)),
        "timestep": np.array([500.0]),
        "encoder_hidden_states": random.standard_normal((1, 64, config.joint_attention_dim)),
        "encoder_attention_mask": np.arange(64)[None] < 40,
        "pooled_projections": random.standard_normal((1, config.pooled_projection_dim)),
        "guidance": np.array([6000.0]),
    }
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    ours = _ours(theirs, config, "__call__")
    given = {**arrays, "guidance": arrays["guidance"] / 1000}  # which diffusers' callers multiply
    return _beside(
        f"HunyuanVideo, 2+4 blocks of width {config.inner_dim}, 2 x 256 x 256, float32",
        lambda: ours(**given),
        lambda tensors: theirs(**tensors).sample,
        arrays,
        rounds,
        "1.1",
    )


def _decoding(rounds: int, widths: tuple[int, ...]) -> Measure:
    """Of two latent frames of 64 x 64."""
    from diffusers import AutoencoderKLHunyuanVideo

    from fluxjax.config import CausalAutoencoderConfig

    config = CausalAutoencoderConfig(block_out_channels=widths)
    published: Any = AutoencoderKLHunyuanVideo
    theirs = _random(lambda: published(block_out_channels=widths))
    latents = np.random.default_rng(0).standard_normal((1, 16, 2, 8, 8)).astype(np.float32)
    ours = _ours(theirs, config, "decode")
    return _beside(
        f"causal autoencoder of width {widths[0]}, decoding 5 x 64 x 64, float32",
        lambda: np.moveaxis(ours(np.moveaxis(latents, 1, -1)), -1, 1),
        lambda tensors: theirs.decode(tensors["latents"]).sample,
        {"latents": latents},
        rounds,
        "1.0",
    )


def _beside(
    what: str,
    ours: Callable[[], np.ndarray],
    theirs: Callable[[dict[str, Any]], Any],
    arrays: dict[str, np.ndarray],
    rounds: int,
    wanted: str,
) -> Measure:
    import torch

    from fluxjax.diff.report import relative_l2

    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}

    def run() -> np.ndarray:
        with torch.no_grad():
            return theirs(tensors).numpy()

    error = relative_l2(ours(), run())
    seconds = medians({"fluxjax": ours, "eager": run}, rounds)
    return Measure(
        what=f"{what} (apart by {error:.0e})",
        ours=seconds["fluxjax"],
        theirs=seconds["eager"],
        beside="diffusers eager",
        wanted=wanted,
    )


def _random(build: Callable[[], Any]) -> Any:
    """diffusers' module, all of whose parameters are views of one buffer of random numbers: both
    sides then fit where one does."""
    import torch

    with torch.device("meta"):
        module = build().eval()
    largest = max(parameter.numel() for parameter in module.parameters())
    draw = torch.randn(largest) * 0.02
    module = module.to_empty(device="meta")
    for name, parameter in list(module.named_parameters()):
        holder = module.get_submodule(name.rpartition(".")[0])
        values = draw[: parameter.numel()].view(parameter.shape)
        setattr(holder, name.rpartition(".")[2], torch.nn.Parameter(values, requires_grad=False))
    return module


def _ours(theirs: Any, config: Any, method: str) -> Callable[..., np.ndarray]:
    """A compiled `method` of our network with those weights, as `sample` runs it."""
    import jax

    from fluxjax.checkpoint.placement import load_tree
    from fluxjax.checkpoint.templates import abstract_params
    from fluxjax.checkpoint.tensors import of_array
    from fluxjax.models.compilation import compiler_options
    from fluxjax.networks import network_of

    network = network_of(config)
    source = {name: of_array(value.numpy()) for name, value in theirs.state_dict().items()}
    params = load_tree(
        source,
        network.dialect("published").table(config),
        abstract_params(config),
        shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    module = network.build(config)
    run = jax.jit(
        lambda params, *inputs, **named: module.apply(
            {"params": params}, *inputs, **named, method=method
        ),
        compiler_options=compiler_options(),
    )
    return lambda *inputs, **named: np.asarray(run(params, *inputs, **named))
