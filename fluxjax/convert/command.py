"""A planned conversion, run before the eyes of a user."""

from __future__ import annotations

from rich.console import Console

from fluxjax.convert import convert
from fluxjax.convert.progress import byte_progress
from fluxjax.convert.report import report as report_of


def run(conversion: convert.Conversion, *, report: bool) -> None:
    """Says what it is, writes it with a bar, and says what was written; see `convert.run`.

    `report`: what quantising it cost.
    """
    console = Console(stderr=True, highlight=False)
    for line in conversion.summary():
        console.print(line, markup=False, soft_wrap=True)
    with byte_progress(console, conversion.nbytes) as progress:
        seconds = convert.run(conversion, progress)
    rate = conversion.nbytes / 1e6 / seconds
    print(
        f"{conversion.destination}: {conversion.nbytes / 1e6:.0f} MB in {seconds:.1f} s, "
        f"{rate:.0f} MB/s"
    )
    for line in report_of(conversion) if report else ():
        print(line)
