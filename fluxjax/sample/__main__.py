"""python -m fluxjax.sample PROMPT, or fluxjax sample PROMPT"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fluxjax import cli

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fluxjax.sample") -> int:
    # XLA reports on its cached programs and on every fallback; a user has asked for a picture.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from fluxjax.command_options import parse_options
    from fluxjax.sample.options import Options

    options = parse_options(Options, sys.argv[1:] if arguments is None else arguments, prog)
    from fluxjax.sample.given_options import check

    check(options)
    # JAX, and all else, is imported only for what can be drawn.
    from fluxjax.parallel.hosts import joined_hosts
    from fluxjax.sample.command import draw

    cli.begin()
    with joined_hosts(options.coordinator, options.process_id, options.num_processes):
        return draw(options)


if __name__ == "__main__":
    cli.run(main)
