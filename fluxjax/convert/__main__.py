"""python -m fluxjax.convert SOURCE DESTINATION [--to diffusers|bfl|orbax] [--quantise KIND]"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from fluxjax import cli

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fluxjax.convert") -> int:
    from fluxjax.command_options import parse_options
    from fluxjax.convert.options import Options

    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(Options, arguments, prog)
    options.check()
    from fluxjax.checkpoint.lora.scaled_file import found
    from fluxjax.hub import find
    from fluxjax.parallel.mesh_shape import parse_mesh
    from fluxjax.terminal import print_line

    mesh = None if options.mesh is None else parse_mesh(options.mesh)
    source = find(options.source, "checkpoint")
    if not source.exists():
        raise FileNotFoundError(f"there is no file {source}")
    loras = found(options.lora)
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes are traced, nothing is computed
    cli.begin("fluxjax.convert.command")
    if options.to in ("peft", "kohya", "comfy") or options.difference_from is not None:
        from fluxjax.convert.command import write_adapter

        print_line(f"{options.destination}: {write_adapter(source, options)}")
        return 0
    from fluxjax.convert import convert
    from fluxjax.convert.command import run

    conversion = convert.plan(
        source,
        options.destination,
        options.to,
        quantised=options.quantise,
        dtype=options.dtype,
        loras=loras,
        mesh=mesh,
        config_file=options.config,
        family=options.family,
        shard_bytes=int(options.shard_gb * 1e9),
        overwrite=options.overwrite,
    )
    run(conversion, report=options.quantise is not None)
    return 0


if __name__ == "__main__":
    cli.run(main)
