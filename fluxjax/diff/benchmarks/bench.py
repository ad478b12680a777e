"""How fast ours is beside PyTorch: the same work, alternating, medians.

Each section returns `Measure`s. torch.compile is measured where a C compiler is at hand. On a GPU
see `bench_gpu`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from fluxjax.diff.commands import Bench

PROMPT = "a large red circle left of a small blue star"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Medians of one piece of work on both sides; `ratio` above 1 means that ours needs less."""

    what: str
    ours: float
    theirs: float | None = None
    beside: str = ""
    unit: str = "s"
    wanted: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.theirs / self.ours


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, run in turns after one run each to compile and warm up.

    Every other round goes backwards, so that no side always follows the same neighbour.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run_bench(command: Bench) -> int:
    """Run the sections and print each measure as soon as it is there; returns 0."""
    # Both frameworks share one GPU: JAX must not take three quarters of it at its start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from fluxjax.checkpoint.pipeline_folder import require_folder
    from fluxjax.diff.live import require_torch
    from fluxjax.hub import find

    folder = find(command.folder)
    require_folder(folder)
    torch = require_torch()
    torch.set_num_threads(command.threads)
    import jax

    from fluxjax.sample.cache import enable_cache

    enable_cache()
    on_gpu = jax.default_backend() == "gpu"
    sections: dict[str, Callable[[], list[Measure]]] = {
        "model": lambda: denoising(folder, command.rounds),
        "start": lambda: cold_start(folder, command.rounds),
        "transformer": lambda: _wide(command.rounds),
        "quantised": lambda: _quantised(command.rounds),
        "attention": lambda: attention(command.rounds),
        "video": lambda: _clips(command.rounds),
        "tools": lambda: _tools(folder, command.rounds),
        "training": lambda: _training(folder, command.rounds),
        "diffusion": lambda: _diffusion(command.rounds),
        "diffusion-training": lambda: _diffusion_training(command.rounds),
        "gpu": lambda: _gpu(command.rounds),
    }
    if "gpu" in command.only and not on_gpu:
        raise ValueError(
            "the section gpu needs a GPU that JAX can use: pip install 'fluxjax[cuda13]'"
        )
    chosen = command.only or tuple(name for name in sections if name != "gpu" or on_gpu)
    measures = []
    for name in chosen:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        measures += sections[name]()
    if command.json:
        print(json.dumps([dataclasses.asdict(m) | {"ratio": m.ratio} for m in measures], indent=1))
    else:
        print_measures(measures, Console())
    return 0


def print_measures(measures: list[Measure], console: Console) -> None:
    """As a table."""
    table = Table(title="medians; ratio above 1: fluxjax needs less", title_justify="left")
    for name in ("what", "fluxjax", "beside", "", "ratio", "wanted"):
        table.add_column(name, justify="left" if name in ("what", "beside", "wanted") else "right")
    for m in measures:
        ratio = "" if m.ratio is None else f"{m.ratio:.2f}"
        theirs = "" if m.theirs is None else f"{m.theirs:.3g} {m.unit}"
        cells = (m.what, f"{m.ours:.3g} {m.unit}", m.beside, theirs, ratio, m.wanted)
        table.add_row(*map(escape, cells))
    console.print(table)


def _gpu(rounds: int) -> list[Measure]:
    from fluxjax.diff.benchmarks.gpu import full_depth

    return full_depth(rounds)


def _wide(rounds: int) -> list[Measure]:
    from fluxjax.diff.benchmarks.wide_transformer import wide_transformer

    return wide_transformer(rounds)


def _tools(folder: Path, rounds: int) -> list[Measure]:
    from fluxjax.diff.benchmarks.tools import tools

    return tools(folder, rounds)


def _clips(rounds: int) -> list[Measure]:
    from fluxjax.diff.benchmarks.clips import clips

    return clips(rounds)


def _quantised(rounds: int) -> list[Measure]:
    from fluxjax.diff.benchmarks.wide_transformer import quantised_transformer

    return quantised_transformer(rounds)


def _training(folder: Path, rounds: int) -> list[Measure]:
    from fluxjax.diff.benchmarks.training_step import training

    return training(folder, rounds)


def _diffusion(rounds: int) -> list[Measure]:
    from fluxjax.diff.benchmarks.diffusion_networks import sampling_steps

    return sampling_steps(rounds)


def _diffusion_training(rounds: int) -> list[Measure]:
    from fluxjax.diff.benchmarks.diffusion_networks import training_steps

    return training_steps(rounds)


def denoising(folder: Path, rounds: int) -> list[Measure]:
    """One picture's denoising with the model's own settings, embeddings and noise given."""
    import torch
    from diffusers import FluxPipeline

    from fluxjax.sample.loading import load_pipeline
    from fluxjax.sample.override import override

    ours = load_pipeline(folder, dtype="float32")
    settings = override(ours.defaults, {"prompt": PROMPT})
    conditioning = ours.encode_prompt(PROMPT)
    noise = ours.draw_noise(settings, settings.seed)
    theirs = FluxPipeline.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    inputs = {
        "prompt_embeds": torch.from_numpy(np.array(conditioning.sequence)),
        "pooled_prompt_embeds": torch.from_numpy(np.array(conditioning.vector)),
        "latents": theirs._pack_latents(torch.from_numpy(np.array(noise)), *noise.shape),
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "height": settings.height,
        "width": settings.width,
        "output_type": "latent",
    }
    eager = theirs.transformer
    compiled = torch.compile(eager)

    def run_theirs(transformer: Any) -> None:
        theirs.transformer = transformer
        with torch.no_grad():
            theirs(**inputs)

    seconds = medians(
        {
            "fluxjax": lambda: ours.denoise(
                conditioning, noise, steps=settings.steps, guidance=settings.guidance
            ),
            "eager": lambda: run_theirs(eager),
            "compiled": lambda: run_theirs(compiled),
        },
        rounds,
    )
    what = f"{folder.name}: denoising, {settings.width}x{settings.height}, {settings.steps} steps"
    return [
        Measure(
            what=what,
            ours=seconds["fluxjax"],
            theirs=seconds[side],
            beside=f"diffusers {name}",
            wanted=wanted,
        )
        for side, name, wanted in (
            ("eager", "eager", "1.3"),
            ("compiled", "torch.compile", "1.0"),
        )
    ]


def cold_start(folder: Path, rounds: int) -> list[Measure]:
    """Seconds from the shell's command to the picture's file, in a new process each time."""
    model = str(folder.resolve())
    with tempfile.TemporaryDirectory() as temporary:
        environment = {**os.environ, "FLUXJAX_CACHE": f"{temporary}/cache"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        seconds = []
        for number in range(1 + max(1, min(rounds, 3))):
            out = f"{temporary}/{number}.png"
            command = [sys.executable, "-m", "fluxjax.sample", PROMPT, "--model", model]
            start = time.perf_counter()
            done = subprocess.run(
                [*command, "--out", out], env=environment, capture_output=True, text=True
            )
            seconds.append(time.perf_counter() - start)
            if done.returncode:
                raise ValueError(f"python -m fluxjax.sample failed: {done.stderr.strip()[-500:]}")
    name = folder.name
    return [
        Measure(what=f"{name}: first picture, nothing compiled", ours=seconds[0], wanted="<= 40 s"),
        Measure(
            what=f"{name}: picture from a new process, compiled before",
            ours=statistics.median(seconds[1:]),
            wanted="<= 12 s",
        ),
    ]


def attention(rounds: int) -> list[Measure]:
    """Attention alone at 24 heads, 1536 tokens (512x512 and 512 text tokens), float32."""
    import jax
    import torch

    from fluxjax.models.attention import dot_product_attention
    from fluxjax.models.compilation import compiler_options

    random = np.random.default_rng(0)
    arrays = [random.standard_normal((1, 1536, 24, 128), np.float32) for _ in range(3)]
    operands = [jax.device_put(array) for array in arrays]
    tensors = [torch.from_numpy(array).transpose(1, 2).contiguous() for array in arrays]
    run = jax.jit(dot_product_attention, compiler_options=compiler_options())
    sdpa: Any = torch.nn.functional.scaled_dot_product_attention
    # Tens of milliseconds each, so more turns cost nothing and steady the medians.
    seconds = medians(
        {
            "fluxjax": lambda: run(*operands).block_until_ready(),
            "torch": lambda: sdpa(*tensors),
        },
        max(rounds, 15),
    )
    return [
        Measure(
            what="attention (1, 24, 1536, 128), float32",
            ours=seconds["fluxjax"],
            theirs=seconds["torch"],
            beside="PyTorch's SDPA",
            wanted="0.9",
        )
    ]
