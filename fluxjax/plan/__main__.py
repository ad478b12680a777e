"""python -m fluxjax.plan MODEL, or fluxjax plan MODEL"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fluxjax import cli

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fluxjax.plan") -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from fluxjax.command_options import parse_options
    from fluxjax.plan.options import Options, check, device_count

    options = parse_options(Options, sys.argv[1:] if arguments is None else arguments, prog)
    check(options)
    # JAX is imported only for what can be planned.
    import jax

    from fluxjax.plan.command import plan

    # No backend is up yet: the plan's devices are simulated, whatever this machine has.
    count = device_count(options)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    jax.config.update("jax_platforms", "cpu")
    cli.begin()
    return plan(options)


if __name__ == "__main__":
    cli.run(main)
