"""The memory that a picture is said to need at least, beside what XLA counts."""

import pytest

import fluxjax
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


def test_with_offload_the_largest_networks_that_work_at_once_count():
    held, offloaded = (
        weight_bytes(fluxjax.load_pipeline("tiny", offload=o)) for o in (False, True)
    )
    assert 0.5 * held < offloaded < held
