"""What `python -m fluxjax.diff` understands: the options of each command, and what it calls.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fluxjax import cli
from fluxjax.config.choices import ComparedNetwork
from fluxjax.parallel.mesh_shape import parse_mesh
from fluxjax.sample.override import override
from fluxjax.sample.settings import Settings
from fluxjax.side_output import check_side_output

if TYPE_CHECKING:
    from fluxjax.diff.report import Report

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Section = Literal[
    "model",
    "start",
    "transformer",
    "quantised",
    "video",
    "tools",
    "attention",
    "training",
    "diffusion",
    "diffusion-training",
    "gpu",
]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Compare with recorded outputs of the original PyTorch code; needs no torch.

    Exit code 1 if a tensor is beyond its bound: a forward 1e-5 relative L2, a sampling run 1e-4.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")]
    """Recorded files: safetensors with weights, inputs and outputs, or JSON with schedules."""
    mesh: str | None = None
    """Run ours on devices along data, fsdp, tensor and sequence, such as fsdp=4,tensor=2."""
    save: Path | None = None
    """Write our outputs under the recorded names; for one FILE."""
    json: Flag = False
    """Print JSON instead of tables."""

    def reports(self) -> list[Report]:
        if not self.files:
            raise ValueError("golden needs at least one recorded FILE")
        if self.save and len(self.files) != 1:
            raise ValueError(f"--save takes the outputs of one FILE, got {len(self.files)}")
        if self.save:
            check_side_output(self.save, "outputs")
        for path in self.files:
            if not path.is_file():
                raise FileNotFoundError(f"there is no recorded file {path}")
        parse_mesh(self.mesh or "")
        from fluxjax.diff.golden import check_golden, save_outputs

        reports = []
        for path in self.files:
            report, outputs = check_golden(path, self.mesh)
            reports.append(report)
            if self.save:
                save_outputs(self.save, outputs)
        return reports


@dataclass(frozen=True, kw_only=True)
class Live:
    """Run the same weights and inputs through PyTorch and ours, layer by layer.

    Names the first layer beyond its bound; exit code 1 if there is one.

    Bounds: float32 1e-5; bfloat16 2e-2 and 1.5 x PyTorch's own error.
    """

    folder: Folder = "tiny"
    """A diffusers pipeline folder, a hub's name, or "tiny" for the embedded model. Any network,
    ControlNets and others that are added to pipelines too, may also be a folder or file of its
    own."""
    component: Literal[ComparedNetwork, "pipeline"] = "transformer"
    """Which network; "pipeline" draws one picture on both sides."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    against: Path | None = None
    """Another pipeline folder whose weights ours reads, to find where two copies part."""
    mesh: str | None = None
    """Run ours on devices along data, fsdp, tensor and sequence, such as fsdp=4,tensor=2."""
    prompt: str = "a large red circle left of a small blue star"
    """For the pipeline."""
    seed: int = 7
    """For the pipeline."""
    steps: int | None = None
    """For the pipeline; by default the model's own."""
    json: Flag = False
    """Print JSON instead of the table."""
    plot: Path | None = None
    """Draw the error of every layer on a log axis into this picture file."""

    def reports(self) -> list[Report]:
        from fluxjax.checkpoint.pipeline_folder import require_folder
        from fluxjax.hub import find

        if self.plot:
            check_side_output(self.plot, "plot")
        parse_mesh(self.mesh or "")
        override(Settings(), {"seed": self.seed, "steps": self.steps})
        folder = find(self.folder)
        for path in (folder, self.against or folder):
            require_folder(path)
        # PyTorch and JAX are imported only for what can be compared.
        from fluxjax.diff.live import compare_network, require_torch

        require_torch()
        if self.component == "pipeline":
            from fluxjax.diff.pipeline import compare_pipeline

            report = compare_pipeline(
                folder,
                prompt=self.prompt,
                seed=self.seed,
                steps=self.steps,
                dtype=self.dtype,
                against=self.against,
                mesh=self.mesh,
            )
        else:
            report = compare_network(
                folder, self.component, dtype=self.dtype, against=self.against, mesh=self.mesh
            )
        return [report]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time ours beside PyTorch's diffusers: side by side, alternating, medians."""

    folder: Folder = "tiny"
    """A diffusers pipeline folder, or "tiny" for the embedded model."""
    only: tuple[Section, ...] = field(default=())
    """Sections to run (several after one --only); by default all, gpu only where there is one."""
    rounds: int = 5
    """Measurements of each side; the median counts."""
    threads: int = 2
    """PyTorch's threads."""
    json: Flag = False
    """Print JSON instead of the table."""


Command = (
    Annotated[Golden, tyro.conf.subcommand("golden")]
    | Annotated[Live, tyro.conf.subcommand("live")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)
VERBS = "golden", "live", "bench"


def execute(command: Golden | Live | Bench) -> int:
    """Run the command, print what it found; 0 if all is within bounds, else 1."""
    from rich.console import Console

    if isinstance(command, Bench):
        if command.rounds < 1 or command.threads < 1:
            given = f"{command.rounds} and {command.threads}"
            raise ValueError(f"--rounds and --threads must be at least 1, got {given}")
        cli.begin("fluxjax.diff.benchmarks.bench")
        from fluxjax.diff.benchmarks.bench import run_bench

        return run_bench(command)
    from fluxjax.diff.report import plot_report, print_report, to_json

    reports = command.reports()
    cli.begin()
    if command.json:
        print(to_json(reports))
    else:
        for report in reports:
            print_report(report, Console())
    if isinstance(command, Live) and command.plot:  # a full disk costs the plot alone
        plot_report(reports[0], command.plot)
    return 0 if all(report.passed for report in reports) else 1
