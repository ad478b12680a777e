"""The plan as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from fluxjax.chips import Chip
from fluxjax.plan.estimate import CARDS, activation_bytes, fits, floor, needed_bytes, peak_bytes
from fluxjax.plan.programs import Placed


def gigabytes(count: int | float) -> str:
    """Bytes in words, of few in megabytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def seconds(value: float) -> str:
    """Seconds in words, of few in milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def print_tables(placed: Placed, chips: tuple[Chip, ...], made: dict[str, Any]) -> None:
    """What a plan has found, of memory, programs and chips; `made` says of what it is."""
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in made.items()), highlight=False)
    memory = Table("on each device", "bytes", title_justify="left")
    for name, size in placed.weights.items():
        memory.add_row(f"weights: {name}", gigabytes(size))
    if placed.optimizer:
        memory.add_row("optimizer", gigabytes(placed.optimizer))
    memory.add_row("activations, gradients", gigabytes(activation_bytes(placed)))
    memory.add_row("at most at once", gigabytes(needed_bytes(placed)), style="bold")
    console.print(memory)
    cards = Table("a card of", *(f"{size} GB" for size in CARDS))
    cards.add_row("fits", *("yes" if fits(placed, size) else "no" for size in CARDS))
    console.print(cards)
    work = Table(
        "program", "weights there", "with all", "TFLOP on each device", "sent by each device"
    )
    for program in placed.programs:
        sent = program.structure.collective_bytes
        listed = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in sorted(sent.items()))
        work.add_row(
            program.name,
            gigabytes(program.held),
            gigabytes(peak_bytes(program)),
            f"{program.structure.matmul_flops / 1e12:.3f}",
            listed or "nothing",
        )
    console.print(work)
    names = [program.name for program in placed.programs]
    speed = Table("chip", "memory", "fits", *names, "no faster than")
    for chip in chips:
        floors = [floor(program, chip) for program in placed.programs]
        total = sum(one.seconds for one in floors)
        speed.add_row(
            chip.name,
            f"{chip.gigabytes:g} GB",
            "yes" if fits(placed, chip.gigabytes) else "no",
            *(f"{seconds(one.seconds)} ({one.bound})" for one in floors),
            seconds(total),
        )
    console.print(speed)
    for note in placed.notes:
        console.print(note, highlight=False)
