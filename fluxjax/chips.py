"""What known accelerators can do at most: products, memory and links between them."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """Dense bfloat16 matrix products, memory, and what one chip sends to its neighbours at once."""

    name: str
    tera_flops: float
    gigabytes: float
    gigabytes_per_second: float
    link_gigabytes_per_second: float


# As JAX names them (Device.device_kind), lower case; the first that occurs in the name is taken.
# NVIDIA's data sheets (dense, without sparsity; NVLink, for the 4090 PCIe 4.0 x 16) and
# docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x (v4: jax-ml.github.io/scaling-book/tpus).
# Links are stated for both directions together: half of that is sent.
CHIPS: dict[str, Chip] = {
    "h200": Chip("H200", 989.0, 141.0, 4800.0, 450.0),
    "h100 pcie": Chip("H100 PCIe", 756.0, 80.0, 2000.0, 300.0),
    "h100": Chip("H100 SXM", 989.0, 80.0, 3350.0, 450.0),
    "a100": Chip("A100", 312.0, 80.0, 2039.0, 300.0),
    "4090": Chip("RTX 4090", 165.2, 24.0, 1008.0, 32.0),
    "tpu v4": Chip("TPU v4", 275.0, 32.0, 1228.0, 270.0),
    "tpu v5 lite": Chip("TPU v5e", 197.0, 16.0, 819.0, 200.0),
    "tpu v5e": Chip("TPU v5e", 197.0, 16.0, 819.0, 200.0),
    "tpu v5": Chip("TPU v5p", 459.0, 95.0, 2765.0, 600.0),
    "tpu v6": Chip("TPU v6e", 918.0, 32.0, 1640.0, 400.0),
    "tpu7": Chip("TPU v7", 2307.0, 192.0, 7370.0, 600.0),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for those whose peak is not known."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind.lower()), None)
