"""Weights go straight into their sharding: the host holds a layer at a time beside them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loading_memory import resident

from fluxjax.checkpoint import mapped_memory as memory

SCRIPT = Path(__file__).with_name("loading_memory.py")


@pytest.mark.slow
def test_loading_onto_eight_devices_needs_little_more_than_the_weights(tmp_path):
    """About 0.5 GB of weights; with `--gigabytes 4` the same script loads eight times as many."""
    command = [sys.executable, SCRIPT, tmp_path, "--gigabytes", "0.5"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    print(result.stdout)
    weights, above, largest = (float(number) for number in result.stdout.split()[-3:])
    assert weights > 450
    # MB: two of the largest tensors that are read at once, and what JAX itself takes.
    assert above < 2 * largest + 140


def test_buffers_leave_nothing_with_the_allocator():
    """Small things that stay lie between large ones that go, as when a checkpoint is read."""
    memory.empty((2**23,), np.uint8)  # once freed, malloc keeps this size for itself
    before, large, small = resident("VmRSS"), [], []
    for _ in range(16):
        large.append(memory.empty((2**21,), np.float32))
        large[-1].fill(1)
        small.append(bytearray(100_000))
    assert resident("VmRSS") > before + 120
    large.clear()
    assert resident("VmRSS") < before + 20
