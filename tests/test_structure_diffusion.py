"""What UNets, MMDiT and PixArt hold, compute and send at their published sizes, as
tests/test_structure.py has it of FLUX; products are counted beside by PyTorch of diffusers' models.

Nothing is computed: shapes are lowered and compiled for eight simulated devices.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parameter_trees import parameter_count
from test_structure import placed, spec
from torch.utils.flop_counter import FlopCounterMode

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import PIXART_SIGMA, SD15_UNET, SD35_LARGE, SDXL_UNET
from fluxjax.models.attention import auto_attention, plain_attention
from fluxjax.networks import network_of
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.compiled_program import measure
from fluxjax.parallel.mesh import batch_sharding, make_mesh
from fluxjax.parallel.rules import param_shardings

FLOAT = 4
pytestmark = pytest.mark.slow


class Case(NamedTuple):
    theirs: Any
    config: Any
    latents: tuple[int, int, int]
    """Rows, columns, channels."""
    inputs: dict[str, tuple[int, ...]]
    """What else one picture comes with."""


CASES = {
    "1.5": Case(
        UNet2DConditionModel,
        SD15_UNET,
        (64, 64, 4),
        {"timestep": (), "encoder_hidden_states": (77, 768)},
    ),
    "XL": Case(
        UNet2DConditionModel,
        SDXL_UNET,
        (128, 128, 4),
        {
            "timestep": (),
            "encoder_hidden_states": (77, 2048),
            "text_embeds": (1280,),
            "time_ids": (6,),
        },
    ),
    "3.5 large": Case(
        SD3Transformer2DModel,
        SD35_LARGE,
        (128, 128, 16),
        {"timestep": (), "encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
    ),
    "PixArt-Sigma": Case(
        PixArtTransformer2DModel,
        PIXART_SIGMA,
        (128, 128, 4),
        {"timestep": (), "encoder_hidden_states": (300, 4096)},
    ),
}


def flops_by_torch(case: Case) -> int:
    """Of one picture; on PyTorch's "meta" device, which computes nothing."""
    values = {name: value for name, value in config_json(case.config).items() if name[0] != "_"}
    rows, columns, channels = case.latents
    with torch.device("meta"):
        model = case.theirs.from_config({**values, "_class_name": case.theirs.__name__})
        inputs: dict[str, Any] = {
            name: torch.zeros(1, *shape) for name, shape in case.inputs.items()
        }
        latents = torch.zeros(1, channels, rows, columns)
    sizes = ("text_embeds", "time_ids")
    told = {name: inputs.pop(name) for name in sizes if name in inputs}
    if case.theirs is PixArtTransformer2DModel:
        told = {"resolution": None, "aspect_ratio": None}
    if case.theirs is not SD3Transformer2DModel:
        inputs["added_cond_kwargs"] = told
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(latents, **inputs)
    return counter.get_total_flops()


def attend(q: Any, k: Any, v: Any, key_lengths: Any = None) -> Any:
    """What a UNet attends with, all at once: XLA counts what is in loops once."""
    return plain_attention(q, k, v, key_lengths, scale=q.shape[-1] ** -0.5)


def lowered(case: Case, text: str, batch: int, **fields: Any) -> Any:
    """A forward of so many pictures, split over the mesh, in float32."""
    mesh, network = make_mesh(text), network_of(case.config)
    stacked = bool(network.scanned)
    params = abstract_params(case.config, stacked=stacked)
    module = network.build(case.config, scan_layers=stacked, **fields)
    rows = batch_sharding(mesh)
    name = "sample" if network.component == "unet" else "hidden_states"
    shapes = {name: case.latents, **case.inputs}
    inputs = {key: spec((batch, *shape), rows) for key, shape in shapes.items()}
    apply = partial(apply_on, mesh, module)
    forward = jax.jit(
        lambda params, inputs: apply({"params": params}, **inputs),
        out_shardings=NamedSharding(mesh, P(("data", "fsdp"))),
    )
    with auto_attention(attend):
        return forward.lower(placed(params, param_shardings(case.config, params, mesh)), inputs)


def bytes_of(case: Case) -> int:
    return FLOAT * parameter_count(abstract_params(case.config))


def shares(sent: dict[str, float], whole: float) -> dict[str, float]:
    return {kind: round(size / whole, 4) for kind, size in sent.items()}


def test_a_unet_is_held_in_eighths_and_gathers_less_than_its_weights():
    """Of 1.5; but for the layers around its transformers, which every device holds."""
    case = CASES["1.5"]
    found = measure(lowered(case, "fsdp=8", 8).compile())
    names = engine.published_leaves(abstract_params(case.config))
    copied = sum(FLOAT * math.prod(leaf.shape) for name, leaf in names.items() if ".proj_" in name)
    assert 0.02 < copied / bytes_of(case) < 0.04
    held = (bytes_of(case) - copied) / 8
    assert found.argument_bytes == pytest.approx(held + copied, rel=0.02)
    assert found.matmul_flops == pytest.approx(flops_by_torch(case), rel=0.01)
    print(shares(found.collective_bytes, bytes_of(case)))
    assert set(found.collective_bytes) <= {"all-gather", "all-to-all"}
    # At 8 x 8 latents the kernels of convolutions stay, and what they see is gathered: it is less.
    assert sum(found.collective_bytes.values()) == pytest.approx(0.68 * 7 * held, rel=0.02)


def test_an_xl_unet_is_lowered_with_as_many_products():
    """Not compiled, which takes a minute: XLA counts what is lowered, not by itself products."""
    case = CASES["XL"]
    counted = lowered(case, "fsdp=8", 8).cost_analysis()["flops"]
    assert counted == pytest.approx(8 * flops_by_torch(case), rel=0.03)


def test_mmdit_by_ulysses_gathers_no_activation():
    """Of 3.5 large: weights on four devices, and two that share the tokens of a picture."""
    case = CASES["3.5 large"]
    found = measure(lowered(case, "fsdp=4,sequence=2", 4, attention="xla").compile())
    assert found.argument_bytes == pytest.approx(bytes_of(case) / 4, rel=0.05)
    assert found.matmul_flops == pytest.approx(flops_by_torch(case) / 2, rel=0.01)
    print(shares(found.collective_bytes, bytes_of(case)))
    # q, k, v and the output, of 4096 tokens of picture and 334 of text, in each of 38 blocks.
    exchanged = 38 * 4 * (4096 + 334) / 2 * 2432 * FLOAT / 2
    assert found.collective_bytes["all-to-all"] == pytest.approx(exchanged, rel=0.02)
    gathered = bytes_of(case) * 3 / 4
    assert found.collective_bytes["all-gather"] == pytest.approx(gathered, rel=0.05)


def test_pixart_by_tensor_sums_once_after_each_pair():
    """Of Sigma: after both attentions and the MLP of each of 28 blocks."""
    case = CASES["PixArt-Sigma"]
    found = measure(lowered(case, "fsdp=4,tensor=2", 4, attention="xla").compile())
    assert found.argument_bytes == pytest.approx(bytes_of(case) / 8, rel=0.05)
    assert found.matmul_flops == pytest.approx(flops_by_torch(case) / 2, rel=0.01)
    print(shares(found.collective_bytes, bytes_of(case)))
    sums = 28 * 3 * 4096 * 1152 * FLOAT * 2 * 1 / 2
    assert found.collective_bytes["all-reduce"] == pytest.approx(sums, rel=0.05)
