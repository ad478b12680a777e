"""From compiled programs to an answer: bytes, FLOPs, and the time that no chip can go below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluxjax.chips import Chip
from fluxjax.plan.programs import Placed, Program

# What a device's memory holds besides our arrays: the runtime, programs, fragmentation.
USABLE = 0.92
CARDS = (80, 48, 24, 16, 12, 8)
"""GB of memory that devices have."""


@dataclass(frozen=True)
class Floor:
    """Seconds that each of a chip's three limits asks for; the program takes no less than any."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        limits = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(limits, key=lambda name: limits[name])


def floor(program: Program, chip: Chip) -> Floor:
    """At the chip's bfloat16 peak, with every weight read once a step, all links busy."""
    moved = sum(program.structure.collective_bytes.values())
    return Floor(
        program.structure.matmul_flops / (chip.tera_flops * 1e12),
        program.reads / (chip.gigabytes_per_second * 1e9),
        moved / (chip.link_gigabytes_per_second * 1e9),
    )


def needed_bytes(placed: Placed) -> int:
    """On the fullest device, while the program runs that needs most."""
    return placed.optimizer + max(peak_bytes(program) for program in placed.programs)


def peak_bytes(program: Program) -> int:
    """The weights that are there while it runs, and what it adds."""
    return program.held + added_bytes(program)


def added_bytes(program: Program) -> int:
    """Its temporaries (activations, gradients) and results."""
    structure = program.structure
    return structure.temporary_bytes + structure.output_bytes - structure.donated_bytes


def activation_bytes(placed: Placed) -> int:
    """What the program adds that adds most."""
    return max(map(added_bytes, placed.programs))


def fits(placed: Placed, gigabytes: float | int) -> bool:
    """Whether memory of so many GB is enough."""
    return needed_bytes(placed) <= USABLE * gigabytes * 1e9


def as_json(placed: Placed, chips: tuple[Chip, ...], made: dict[str, Any]) -> dict[str, Any]:
    """Everything of the tables, in bytes, FLOPs and seconds, per device."""
    return {
        **made,
        "bytes_per_device": {
            "weights": placed.weights,
            "optimizer": placed.optimizer,
            "activations": activation_bytes(placed),
            "total": needed_bytes(placed),
        },
        "fits_gigabytes": {str(size): fits(placed, size) for size in CARDS},
        "programs": [
            {
                "name": program.name,
                "flops": program.structure.matmul_flops,
                "collective_bytes": program.structure.collective_bytes,
                "weight_bytes": program.held,
                "peak_bytes": peak_bytes(program),
                "temporary_bytes": program.structure.temporary_bytes,
                "argument_bytes": program.structure.argument_bytes,
            }
            for program in placed.programs
        ],
        "chips": [
            {
                "name": chip.name,
                "fits": fits(placed, chip.gigabytes),
                "floor_seconds": {
                    program.name: floor(program, chip).seconds for program in placed.programs
                },
                "bound": {program.name: floor(program, chip).bound for program in placed.programs},
            }
            for chip in chips
        ],
        "notes": list(placed.notes),
    }
