"""Networks of Stable Diffusion and PixArt beside diffusers': a step of sampling, and of training.

A few blocks of the published widths with random weights, float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fluxjax.diff.benchmarks.bench import Measure, medians
from fluxjax.diff.benchmarks.training_step import our_step, their_step

BATCH = 4  # of a training step


class Case(NamedTuple):
    """diffusers' module, our configuration and family, and what both are given."""

    name: str
    theirs: Any
    config: Any
    family: Any
    x: np.ndarray
    """Latents, channels last."""
    heard: Any
    """`Conditioning`."""
    call: Callable[[Any, Any, Any], Any]
    """(module, latents, channels first, timesteps) -> the prediction."""
    path: Any
    """What is learnt, see `families.noise_path`."""

    def params(self) -> Any:
        import jax

        from fluxjax.checkpoint.placement import load_tree
        from fluxjax.checkpoint.templates import abstract_params
        from fluxjax.checkpoint.tensors import of_array
        from fluxjax.networks import network_of

        table = network_of(self.config).dialect("published").table(self.config)
        state = self.theirs.state_dict()
        source = {name: of_array(value.numpy()) for name, value in state.items()}
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = abstract_params(self.config)
        return load_tree(source, table, template, dtype=np.float32, shardings=place)

    def tensors(self) -> tuple[Any, Any]:
        """Latents, and a timestep for each."""
        import torch

        t = torch.full((len(self.x),), 500.0)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(self.x, -1, 1))), t


def unet(rows: int, side: int, widths: tuple[int, ...] = (320, 640)) -> Case:
    """Two resolutions of Stable Diffusion 1.5, with one residual block each."""
    import torch
    from diffusers import UNet2DConditionModel

    from fluxjax.config import SD15_UNET
    from fluxjax.families import STABLE_DIFFUSION, Conditioning
    from fluxjax.families.noise_path import DiffusionPath

    sizes: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    }
    config = dataclasses.replace(
        SD15_UNET, transformer_layers_per_block=(1, 1), attention_head_dim=(8, 8), **sizes
    )
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, **sizes)
    x, text = _normal((rows, side, side, 4), (rows, 77, 768))

    def call(module: Any, x: Any, t: Any) -> Any:
        return module(x, t, encoder_hidden_states=torch.from_numpy(text)).sample

    name = f"UNet, {' and '.join(map(str, widths))} channels, {rows} x {8 * side}²"
    path = DiffusionPath.of(_betas())
    heard = Conditioning(text, None, None)
    return Case(name, theirs, config, STABLE_DIFFUSION, x, heard, call, path)


def mmdit(rows: int, side: int, layers: int = 2) -> Case:
    """Blocks of Stable Diffusion 3 medium."""
    import torch
    from diffusers import SD3Transformer2DModel

    from fluxjax.config import SD3_MEDIUM
    from fluxjax.families import SD3, Conditioning
    from fluxjax.families.sd3 import PATH

    config = dataclasses.replace(SD3_MEDIUM, num_layers=layers)
    torch.manual_seed(0)
    width = config.inner_dim
    theirs = SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=config.num_attention_heads,
        caption_projection_dim=width,
        pos_embed_max_size=config.pos_embed_max_size,
    )
    x, text, pooled = _normal((rows, side, side, 16), (rows, 154, 4096), (rows, 2048))

    def call(module: Any, x: Any, t: Any) -> Any:
        return module(
            hidden_states=x,
            encoder_hidden_states=torch.from_numpy(text),
            pooled_projections=torch.from_numpy(pooled),
            timestep=t,
        ).sample

    name = f"MMDiT, {layers} blocks of width {width}, {rows} x {8 * side}²"
    heard = Conditioning(text, None, pooled)
    return Case(name, theirs, config, SD3, x, heard, call, PATH)


def pixart(rows: int, side: int, layers: int = 2) -> Case:
    """Blocks of PixArt-Sigma."""
    import torch
    from diffusers import PixArtTransformer2DModel

    from fluxjax.config import PIXART_SIGMA
    from fluxjax.families import PIXART, Conditioning
    from fluxjax.families.noise_path import DiffusionPath

    config = dataclasses.replace(PIXART_SIGMA, num_layers=layers)
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(
        num_layers=layers, sample_size=128, caption_channels=4096, use_additional_conditions=False
    )
    x, text = _normal((rows, side, side, 4), (rows, 120, 4096))

    def call(module: Any, x: Any, t: Any) -> Any:
        said = {"resolution": None, "aspect_ratio": None}
        heard = torch.from_numpy(text)
        out = module(x, encoder_hidden_states=heard, timestep=t, added_cond_kwargs=said).sample
        return out.chunk(2, dim=1)[0]

    # As published examples in PyTorch do it, without the variance.
    path = DiffusionPath.of(_betas())
    family = dataclasses.replace(PIXART, forward=_noise_alone)
    name = f"PixArt, {layers} blocks of width {config.inner_dim}, {rows} x {8 * side}²"
    return Case(name, theirs, config, family, x, Conditioning(text, None, None), call, path)


def _noise_alone(*arguments: Any, **options: Any) -> Any:
    from fluxjax.families import PIXART

    out = PIXART.forward(*arguments, **options)
    return out[..., : out.shape[-1] // 2]


def _normal(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def _betas() -> Any:
    from fluxjax.config.sampler import SamplerConfig

    return SamplerConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sampling_steps(rounds: int, cases: tuple[Case, ...] = ()) -> list[Measure]:
    """A forward of two passes at 256 x 256, eager on the other side."""
    return [_sampling(case, rounds) for case in cases or (unet(2, 32), mmdit(2, 32))]


def _sampling(case: Case, rounds: int) -> Measure:
    import jax
    import torch

    from fluxjax.diff.report import relative_l2
    from fluxjax.families import Extras
    from fluxjax.models.compilation import compiler_options
    from fluxjax.networks import network_of

    model, params = network_of(case.config).build(case.config), case.params()
    forward = jax.jit(
        lambda params, x, t, heard: case.family.forward(
            model, {"params": params}, x, t, heard, Extras(None)
        ),
        compiler_options=compiler_options(),
    )
    t = np.full(len(case.x), 500.0, np.float32)

    def ours() -> np.ndarray:
        return np.asarray(forward(params, case.x, t, case.heard))

    given = case.tensors()

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return case.call(case.theirs, *given).numpy()

    error = relative_l2(np.moveaxis(ours(), -1, 1), theirs())
    seconds = medians({"fluxjax": ours, "torch": theirs}, rounds)
    return Measure(
        what=f"{case.name}, float32: a step (apart by {error:.0e})",
        ours=seconds["fluxjax"],
        theirs=seconds["torch"],
        beside="diffusers eager",
        wanted="1.2",
    )


def training_steps(rounds: int, cases: tuple[tuple[Case, bool], ...] = ()) -> list[Measure]:
    """Forward, backward, clipping and AdamW: of the UNet all and a LoRA, of PixArt all."""
    made = cases or (
        (unet(BATCH, 32, (128, 256)), False),
        (unet(BATCH, 32, (128, 256)), True),
        (pixart(1, 32), False),
    )
    return [_training(case, rounds, lora=lora) for case, lora in made]


def _training(case: Case, rounds: int, *, lora: bool) -> Measure:
    import jax
    import jax.numpy as jnp
    import torch

    from fluxjax.config import LoraConfig
    from fluxjax.train.flow_matching import Learner, Rows

    adapter = LoraConfig(targets=("to_q", "to_k", "to_v", "to_out.0")) if lora else None
    heard = jax.tree.map(jnp.asarray, case.heard)
    rows = Rows(jnp.asarray(case.x), heard, jnp.arange(len(case.x)))
    clean, _ = case.tensors()
    left = torch.from_numpy(np.array(case.path.table))

    def loss() -> Any:
        t = torch.randint(0, len(left), (len(clean),))
        noise = torch.randn_like(clean)
        share = left[t][:, None, None, None]
        noisy = share.sqrt() * clean + (1 - share).sqrt() * noise
        return torch.nn.functional.mse_loss(case.call(case.theirs, noisy, t), noise)

    steps = {
        "fluxjax": our_step(
            case.family, case.config, case.params(), rows, Learner(case.path, "it"), adapter
        ),
        "torch": their_step(case.theirs, loss, adapter),
    }
    seconds = medians(steps, rounds)
    way = f"LoRA of rank {adapter.rank}" if adapter else "full"
    return Measure(
        what=f"{case.name}, float32: training step, {way}",
        ours=seconds["fluxjax"],
        theirs=seconds["torch"],
        beside="diffusers, AdamW",
        wanted="1.2",
    )
