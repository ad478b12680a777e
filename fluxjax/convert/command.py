"""What `python -m fluxjax.convert` does once it is told what: a planned conversion, run before the
eyes of a user, or an adapter's file."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from fluxjax.convert import convert
from fluxjax.convert.adapters import convert_adapters
from fluxjax.convert.difference import extract_adapter
from fluxjax.convert.options import Options
from fluxjax.convert.progress import byte_progress
from fluxjax.convert.report import report as report_of
from fluxjax.hub import find
from fluxjax.terminal import print_line, shown


def run(conversion: convert.Conversion, *, report: bool) -> None:
    """Says what it is, writes it with a bar, and says what was written; see `convert.run`.

    `report`: what quantising it cost.
    """
    console = Console(stderr=True, highlight=False)
    for line in conversion.summary():
        console.print(shown(line), markup=False, soft_wrap=True)
    with byte_progress(console, conversion.nbytes) as progress:
        seconds = convert.run(conversion, progress)
    rate = conversion.nbytes / 1e6 / seconds
    print_line(
        f"{conversion.destination}: {conversion.nbytes / 1e6:.0f} MB in {seconds:.1f} s, "
        f"{rate:.0f} MB/s"
    )
    for line in report_of(conversion) if report else ():
        print_line(line)


def write_adapter(source: Path, options: Options) -> str:
    """Write the adapter's file that is asked for; returns what it is, in words."""
    destination, overwrite = options.destination, options.overwrite
    dtype = None if options.dtype == "keep" else jnp.dtype(options.dtype)
    if options.difference_from is not None:
        base = find(options.difference_from, "checkpoint")
        rank = 64 if options.rank is None else options.rank
        return extract_adapter(
            source, base, destination, rank=rank, dtype=dtype, overwrite=overwrite
        )
    assert options.to in ("peft", "kohya", "comfy")
    return convert_adapters(
        source,
        destination,
        options.to,
        config=options.config,
        dtype=options.dtype,
        overwrite=overwrite,
    )
