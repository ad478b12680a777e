"""python -m fluxjax.convert SOURCE DESTINATION [--to diffusers|bfl|orbax] [--mesh AXIS=N,...]"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fluxjax.cli import run


@dataclass(frozen=True)
class Arguments:
    """Convert FLUX checkpoints: transformer, autoencoder, T5, CLIP, or a whole pipeline.

    The family and variant are told from the tensors' names and shapes.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """A diffusers or transformers folder, a BFL or ComfyUI .safetensors file, an Orbax folder."""
    destination: Annotated[Path, tyro.conf.Positional]
    """A folder; for one network --to bfl, also a .safetensors file."""
    to: Literal["diffusers", "bfl", "orbax"] = "diffusers"
    """The form to write."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Cast all tensors; keep changes no value (scaled fp8 becomes bfloat16, and fp8 again)."""
    mesh: str | None = None
    """With --to orbax: store each device's part by itself, for devices such as fsdp=4,tensor=2."""
    config: Path | None = None
    """config.json of a network whose shapes do not tell everything (heads other than 128)."""
    shard_gb: float = 10.0
    """Size of a shard of a diffusers folder, in GB."""
    overwrite: bool = False
    """Replace the destination if it exists."""


def main() -> int:
    arguments = tyro.cli(Arguments, prog="python -m fluxjax.convert")
    os.environ["JAX_PLATFORMS"] = "cpu"  # shapes are traced, nothing is computed
    from rich.console import Console

    from fluxjax.convert import convert
    from fluxjax.convert.progress import byte_progress
    from fluxjax.parallel.mesh import parse_mesh

    if not arguments.shard_gb > 0:
        raise ValueError(f"--shard-gb must be positive, got {arguments.shard_gb}")
    conversion = convert.plan(
        arguments.source, arguments.destination, arguments.to, dtype=arguments.dtype,
        mesh=None if arguments.mesh is None else parse_mesh(arguments.mesh),
        config_file=arguments.config, shard_bytes=int(arguments.shard_gb * 1e9),
        overwrite=arguments.overwrite,
    )  # fmt: skip
    console = Console(stderr=True, highlight=False)
    for line in conversion.summary():
        console.print(line, markup=False, soft_wrap=True)
    with byte_progress(console, conversion.nbytes) as progress:
        seconds = convert.run(conversion, progress)
    rate = conversion.nbytes / 1e6 / seconds
    print(f"{arguments.destination}: {conversion.nbytes / 1e6:.0f} MB in {seconds:.1f} s, "
          f"{rate:.0f} MB/s")  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
