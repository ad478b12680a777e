"""The memory that a picture is said to need at least, beside what XLA counts."""

from dataclasses import replace

import jax
import pytest

import fluxjax
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import PIXART_SIGMA, SD35_MEDIUM, UNetConfig
from fluxjax.networks import network_of
from fluxjax.sample.memory_estimate import activation_bytes, weight_bytes
from fluxjax.sample.programs import programs
from fluxjax.sample.settings import Settings


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(96, 96), (256, 128)])
def test_the_estimate_is_below_what_the_programs_take_and_not_far(width, height):
    """Measured at 96, 256 and 512 pixels a side: 2.5 times the estimate."""
    pipe = fluxjax.load_pipeline("tiny")
    settings = Settings(
        prompt="a star", width=width, height=height, steps=1, max_sequence_length=32
    )
    needed = max(
        pipe.executables.compile(program).memory_analysis().temp_size_in_bytes
        for program in programs(
            pipe.family,
            pipe.config,
            settings,
            dtype=pipe.dtype,
            rows=pipe.executables.rows,
            padded=False,
        )
    )
    estimate = activation_bytes(pipe, settings)
    assert estimate <= needed <= 4 * estimate, (estimate, needed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "text"),
    [
        (replace(SD35_MEDIUM, num_layers=3, dual_attention_layers=(0,)), 333),
        (replace(PIXART_SIGMA, num_layers=2), 300),
        (
            UNetConfig(
                block_out_channels=(320,),
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
                transformer_layers_per_block=(1,),
                attention_head_dim=(8,),
            ),
            77,
        ),
    ],
    ids=["SD3", "PixArt", "UNet"],
)
def test_so_is_what_other_networks_hold(config, text):
    """Of their real widths, with few blocks, for 512 x 512 pixels."""
    network, inputs = network_of(config), network_of(config).inputs(config)
    shapes = {
        "hidden_states": (1, 64, 64, config.in_channels),
        "sample": (1, 64, 64, config.in_channels),
        "encoder_hidden_states": (1, text, inputs["encoder_hidden_states"].shape[-1]),
        "encoder_attention_mask": (1, text),
    }
    given = {
        name: jax.ShapeDtypeStruct(shapes.get(name, (1, *x.shape[1:])), x.dtype)
        for name, x in inputs.items()
    }
    module = network.build(config)
    forward = jax.jit(lambda params, given: module.apply({"params": params}, **given))
    program = forward.lower(abstract_params(config), given).compile()
    needed = program.memory_analysis().temp_size_in_bytes
    held = 4 * network.held(config, 64 * 64, text)
    print(f"{needed / held:.2f}")
    assert held <= needed <= 4 * held


def test_with_offload_the_largest_networks_that_work_at_once_count():
    held, offloaded = (
        weight_bytes(fluxjax.load_pipeline("tiny", offload=o)) for o in (False, True)
    )
    assert 0.5 * held < offloaded < held
