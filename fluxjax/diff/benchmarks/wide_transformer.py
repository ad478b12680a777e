"""A few blocks of FLUX.1's width beside diffusers: in float32, and in 8 bits."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fluxjax.diff.benchmarks.bench import Measure, medians


class Wide(NamedTuple):
    """diffusers' module with random weights, our configuration, and what a forward is given."""

    theirs: Any
    config: Any
    arrays: dict[str, np.ndarray]

    def run_theirs(self, module: Any) -> np.ndarray:
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in self.arrays.items()}
        with torch.no_grad():
            return module(**tensors).sample.numpy()

    def ours(self, kind: str | None, dtype: Any) -> Callable[[], np.ndarray]:
        """A forward in `dtype`, its blocks' products in codes of `kind`; as `sample` runs it."""
        import jax

        from fluxjax.checkpoint.placement import load_tree
        from fluxjax.checkpoint.templates import abstract_params, quantised_template
        from fluxjax.checkpoint.tensors import of_array
        from fluxjax.families import FLUX, Conditioning, Extras
        from fluxjax.models.compilation import compiler_options
        from fluxjax.models.flux import FluxTransformer
        from fluxjax.models.products import TILED
        from fluxjax.networks.flux import PUBLISHED

        template = abstract_params(self.config, stacked=True)
        if kind:
            template = quantised_template(template, self.config, kind)
        state = self.theirs.state_dict()
        source = {name: of_array(value.numpy()) for name, value in state.items()}
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = load_tree(source, PUBLISHED, template, dtype=dtype, shardings=place)
        precision = TILED if kind or dtype != np.float32 else None
        model = FluxTransformer(
            self.config, scan_layers=True, dtype=dtype, param_dtype=dtype, precision=precision
        )
        a = self.arrays
        text = Conditioning(a["encoder_hidden_states"], None, a["pooled_projections"])
        inputs = a["hidden_states"], a["timestep"], text, Extras(a["img_ids"], a["guidance"])
        forward = jax.jit(
            lambda params, *inputs: FLUX.forward(model, {"params": params}, *inputs),
            compiler_options=compiler_options(precision, integers=kind == "int8_dynamic"),
        )
        return lambda: np.asarray(forward(params, *inputs), np.float32)


def _random(heads: int, layers: tuple[int, int], pixels: int, text: int) -> Wide:
    """`layers`: double and single blocks; `pixels` on each side, and tokens of text."""
    import torch
    from diffusers import FluxTransformer2DModel

    from fluxjax.config import DEV
    from fluxjax.models.latents import image_ids, text_ids

    sizes: dict[str, Any] = {
        "num_layers": layers[0],
        "num_single_layers": layers[1],
        "num_attention_heads": heads,
    }
    config = dataclasses.replace(DEV.transformer, **sizes)
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**sizes, guidance_embeds=True)
    theirs = theirs.to_empty(device="cpu").eval()
    draw = torch.randn(2**22) * 0.02  # drawing 1.2 billion numbers would take longer than the rest
    for parameter in theirs.parameters():
        repeats = -(-parameter.numel() // draw.numel())
        parameter.data = draw.repeat(repeats)[: parameter.numel()].reshape(parameter.shape)
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    side = pixels // 8
    arrays = {
        "hidden_states": normal(1, (side // 2) ** 2, config.in_channels),
        "encoder_hidden_states": normal(1, text, config.joint_attention_dim),
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "timestep": np.array([0.5], np.float32),
        "img_ids": np.array(image_ids(side, side)),
        "txt_ids": np.array(text_ids(text)),
        "guidance": np.array([1.0], np.float32),
    }
    return Wide(theirs, config, arrays)


def wide_transformer(rounds: int, heads: int = 24) -> list[Measure]:
    """A forward of 2 double and 4 single blocks at 512x512; 24 heads are FLUX.1's width."""
    from fluxjax.diff.report import relative_l2

    wide = _random(heads, (2, 4), 512, 512)
    forward = wide.ours(None, np.float32)
    error = relative_l2(forward(), wide.run_theirs(wide.theirs))
    sides = {"fluxjax": forward, "eager": lambda: wide.run_theirs(wide.theirs)}
    seconds = medians(sides, rounds)
    width = wide.config.inner_dim
    return [
        Measure(
            what=f"2+4 blocks of width {width}, 512x512, float32 (apart by {error:.0e})",
            ours=seconds["fluxjax"],
            theirs=seconds["eager"],
            beside="diffusers eager",
            wanted="1.0",
        )
    ]


def quantised_transformer(rounds: int, heads: int = 24) -> list[Measure]:
    """A forward of a double and a single block at 256x256, in 8 bits and plain.

    Beside PyTorch's dynamic int8, which rounds activations as "int8_dynamic" does; float32 beside
    its float32. `apart` is the distance of ours to PyTorch's float32.
    """
    import jax.numpy as jnp
    import torch

    from fluxjax.diff.report import relative_l2

    wide = _random(heads, (1, 1), 256, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is to move into a package of its own
        eight = torch.ao.quantization.quantize_dynamic(
            wide.theirs, {torch.nn.Linear}, dtype=torch.qint8
        )
    ours = {
        "int8_dynamic": wide.ours("int8_dynamic", np.float32),
        "int8": wide.ours("int8", np.float32),
        "bfloat16": wide.ours(None, jnp.bfloat16),
        "float32": wide.ours(None, np.float32),
    }
    expected = wide.run_theirs(wide.theirs)
    errors = {name: relative_l2(run(), expected) for name, run in ours.items()}
    sides: dict[str, Callable[[], Any]] = {
        **ours,
        "torch int8": lambda: wide.run_theirs(eight),
        "torch float32": lambda: wide.run_theirs(wide.theirs),
    }
    seconds = medians(sides, rounds)
    what = f"1+1 blocks of width {wide.config.inner_dim}, 256x256"
    beside = dict.fromkeys(ours, "torch int8") | {"float32": "torch float32"}
    return [
        Measure(
            what=f"{name} of {what} (apart by {errors[name]:.0e})",
            ours=seconds[name],
            theirs=seconds[side],
            beside=f"PyTorch {side.removeprefix('torch ')}",
        )
        for name, side in beside.items()
    ]
