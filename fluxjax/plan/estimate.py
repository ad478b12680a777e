"""From compiled programs to an answer: bytes, FLOPs, and the time that no chip can go below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluxjax.chips import Chip
from fluxjax.plan.programs import Placed, Program

# What a device's memory holds besides our arrays: the runtime, programs, fragmentation.
USABLE = 0.92


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
    """On the fullest device: what stays there, and the most that a program adds."""
    return sum(placed.weights.values()) + placed.optimizer + activation_bytes(placed)


def activation_bytes(placed: Placed) -> int:
    """Temporaries (activations, gradients) and results of the program that needs most."""

    def extra(program: Program) -> int:
        structure = program.structure
        return structure.temporary_bytes + structure.output_bytes - structure.donated_bytes

    return max(extra(program) for program in placed.programs)


def fits(placed: Placed, chip: Chip) -> bool:
    return needed_bytes(placed) <= USABLE * chip.gigabytes * 1e9


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
        "programs": [
            {
                "name": program.name,
                "flops": program.structure.matmul_flops,
                "collective_bytes": program.structure.collective_bytes,
                "temporary_bytes": program.structure.temporary_bytes,
                "argument_bytes": program.structure.argument_bytes,
            }
            for program in placed.programs
        ],
        "chips": [
            {
                "name": chip.name,
                "fits": fits(placed, chip),
                "floor_seconds": {
                    program.name: floor(program, chip).seconds for program in placed.programs
                },
                "bound": {program.name: floor(program, chip).bound for program in placed.programs},
            }
            for chip in chips
        ],
        "notes": list(placed.notes),
    }
