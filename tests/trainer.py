"""A small real training run that tests damage, and a server that starts many of them quickly.

Run as a program it reads lines of JSON, each a list of arguments (and where to write what the run
prints), and forks: Python's imports, most of the start of a process, are done once.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401  (by the server, once)
from drawn_files import ENCODERS

from fluxjax import cli
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import FluxConfig
from fluxjax.families import FLUX, Conditioning
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids
from fluxjax.parallel import hosts
from fluxjax.parallel.mesh import batch_sharding, make_mesh, replicated
from fluxjax.parallel.rules import state_shardings
from fluxjax.train.data.dataset import open_dataset
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.export import export_run
from fluxjax.train.flow_matching import Rows, finetune_loss
from fluxjax.train.loop import Run, RunSettings, run_folder
from fluxjax.train.settings import Objective
from fluxjax.train.step import init_state, make_step

CONFIG = FluxConfig(
    in_channels=8,
    out_channels=8,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    pooled_projection_dim=8,
    axes_dims_rope=(4, 6, 6),
)
BATCH, TEXT, SIDE = 4, 3, 2
QUICK = {
    name: {"kernel": jax.ShapeDtypeStruct(shape, "float32")}
    for name, shape in (("x_embedder", (64, 512)), ("proj_out", (512, 64)))
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--patience", type=int, default=50)
    parser.add_argument("--hang", type=float, default=60.0)
    parser.add_argument("--recipe", default="one")
    parser.add_argument("--source", help="pictures whose fingerprint the run has")
    parser.add_argument("--quick", action="store_true", help="few leaves, and no network")
    parser.add_argument("--coordinator")
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--silence", type=float, default=hosts.SILENCE)
    parser.add_argument("--nan", type=int, nargs=2, default=(0, 0), help="first step, how many")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds per step")
    parser.add_argument("--stuck", type=int, default=-1, help="the step that never ends")
    parser.add_argument("--linger", type=float, default=0.0, help="seconds before it exits")
    parser.add_argument("--full", type=int, nargs=2, default=(-1, -1), help="disk full from, to")
    return parser.parse_args(arguments)


def rows_of(step: int, bad: bool) -> Rows:
    """All rows of a step: data is a function of the step."""
    rng = np.random.default_rng(step)
    shapes = (BATCH, SIDE * SIDE, 8), (BATCH, TEXT, 16), (BATCH, 8)
    latents, text, pooled = (rng.standard_normal(shape, np.float32) for shape in shapes)
    index = np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.int32)
    latents *= np.float32(np.nan if bad else 1)
    return Rows(latents, Conditioning(text, None, pooled), index)


def fingerprint(source: str) -> str:
    """Of a folder of pictures, as a run's identity has it."""
    settings = DataSettings(source=source, resolution=32, bucket_step=16, cache=f"{source}.cache")
    return open_dataset(settings, ENCODERS, batch=BATCH, seed=0).fingerprint


def distance(params: Any, key: jax.Array, rows: Rows, *rest: Any) -> jax.Array:
    """Traced in no time; depends on all that the real loss depends on."""
    goal = jax.random.normal(key, ()) + rows.latents.mean()
    return sum(jnp.square(leaf - goal).mean() for leaf in jax.tree.leaves(params))


def train(arguments: list[str]) -> None:
    options = parse(arguments)
    given = (options.coordinator, options.process_id, options.num_processes)
    if options.linger:  # as on a busy machine
        exit_now = os._exit
        os._exit = lambda code: (time.sleep(options.linger), exit_now(code))
    with hosts.joined_hosts(*given, timeout=options.timeout, silence=options.silence):
        run(options)


def run(options: argparse.Namespace) -> None:
    # As `python -m fluxjax.train`: the recipe first, the data when they are read.
    hosts.agree({"recipe": options.recipe})
    with run_folder(options.folder):
        _train(options)


def _train(options: argparse.Namespace) -> None:
    data = fingerprint(options.source) if options.source else "drawn"
    identity = {"recipe": options.recipe, "data": data}
    mesh = make_mesh(f"fsdp={jax.device_count()}")
    model = FluxTransformer(CONFIG, scan_layers=False)
    optimizer = optax.adamw(1e-3)
    everywhere, ids = replicated(mesh), image_ids(2 * SIDE, 2 * SIDE)

    def place(x: Any, where: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    # Drawn by numpy: a program that draws so many leaves takes long to compile.
    rng = np.random.default_rng(0)
    shapes = QUICK if options.quick else abstract_params(CONFIG, stacked=False)
    drawn = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)
    start = partial(init_state, optimizer=optimizer)
    where = state_shardings(CONFIG, jax.eval_shape(start, drawn), mesh)
    params = jax.tree.map(place, drawn, where.params)
    state = jax.jit(start, out_shardings=where)(params)
    loss = distance if options.quick else finetune_loss(FLUX, model, Objective())
    step = make_step(
        loss,
        optimizer,
        seed=3,
        ema_decay=0.9,
        out_shardings=(where, everywhere),
    )
    empty = Conditioning(
        place(np.zeros((1, TEXT, 16), np.float32), everywhere),
        None,
        place(np.zeros((1, 8), np.float32), everywhere),
    )
    fixed = {}, empty, place(ids, everywhere), place(np.float32(0.5), everywhere)

    def batch(index: int) -> Rows:
        first, count = options.nan
        rows = rows_of(index, first <= index < first + count)
        return jax.tree.map(lambda x: place(x, batch_sharding(mesh)), rows)

    compiled = step.lower(state, batch(0), *fixed).compile()
    hosts.barrier("compiled")

    def advance(state: Any, index: int):
        full, free = options.full
        if index in (full, free):
            while any(options.folder.glob("checkpoints/*.saving")):
                time.sleep(0.01)
            soft = 40_000 if index == full else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
        if index == options.stuck:
            threading.Event().wait()
        time.sleep(options.pause)
        return compiled(state, batch(index), *fixed)

    settings = RunSettings(
        steps=options.steps,
        folder=options.folder,
        save_seconds=1e9,
        save_every=options.save_every,
        log_every=1,
        patience=options.patience,
        hang_seconds=options.hang,
    )
    state = Run(settings, advance, identity=identity).to_end(state)
    if options.coordinator is None:
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(state):
            digest.update(np.asarray(leaf).tobytes())
        print("digest", digest.hexdigest())


def export_endlessly(arguments: list[str]) -> None:
    """The LoRAs of a run's steps 1 and 2 in turn to the same file."""
    run, out = map(Path, arguments)
    for number in itertools.count():
        export_run(run, step=1 + number % 2, out=out)
        print("written", flush=True)


def precompute(arguments: list[str]) -> None:
    """Fill the cache of a folder of pictures, slowly enough to be killed amid it."""
    source, cache = arguments

    def slowly(images):
        time.sleep(0.05)
        return ENCODERS.encode_image(images)

    slow = ENCODERS._replace(encode_image=slowly)
    open_dataset(cached(source, cache), slow, batch=1, seed=0).fill()


def cached(source: str, cache: str) -> DataSettings:
    return DataSettings(source=source, resolution=48, bucket_step=8, cache=cache)


PROGRAMS = {"train": train, "export": export_endlessly, "precompute": precompute}


def serve() -> None:
    """Answers each line with the process id of the run, or with the exit code asked for."""
    warnings.filterwarnings("ignore", message=".*os.fork.*")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(_wait(request["wait"], request["timeout"])), flush=True)
        elif child := os.fork():
            print(child, flush=True)
        else:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.setsid()
            cli.run(partial(PROGRAMS[request["program"]], request["arguments"]))


def _wait(child: int, timeout: float) -> int | None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


if __name__ == "__main__":
    serve()
