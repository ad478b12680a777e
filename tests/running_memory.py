"""Prints the memory that converting, reading and running a random transformer takes, on a CPU.

python tests/running_memory.py FOLDER --quantise int8 --to orbax

2 + 6 blocks of FLUX.1's width in bfloat16 (3.2 GB) are written to FOLDER where it has none,
converted, read and run as `sample` does, each in a process of its own. MB of resident memory. With
JAX_COMPILATION_CACHE_DIR set, a second run takes the program from there.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from loading_memory import KIBIBYTE, resident


def write(folder: Path) -> None:
    from fluxjax.checkpoint import engine
    from fluxjax.checkpoint.component_json import config_json, write_json
    from fluxjax.checkpoint.sharded import write_sharded
    from fluxjax.checkpoint.templates import abstract_params
    from fluxjax.checkpoint.tensors import Tensor
    from fluxjax.config import FluxConfig

    config = FluxConfig(num_layers=2, num_single_layers=6)
    random = np.random.default_rng(0).standard_normal(2**22, np.float32)
    values = (0.02 * random).astype(ml_dtypes.bfloat16)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        def rows(start: int, stop: int) -> np.ndarray:
            return np.resize(values, (stop - start, *shape[1:]))

        return Tensor(shape, values.dtype, rows, by_rows=True)

    folder.mkdir(parents=True)
    leaves = engine.published_leaves(abstract_params(config))
    write_json(folder / "config.json", config_json(config, "bfloat16"))
    tensors = {name: tensor(leaf.shape) for name, leaf in leaves.items()}
    write_sharded(folder, "diffusion_pytorch_model", tensors)


def convert(source: Path, out: Path, options: list[str]) -> None:
    from fluxjax.convert.__main__ import main

    if code := main([str(source), str(out), *options]):
        raise SystemExit(code)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE
    print(f"converting: {peak:.0f} MB at the peak, {resident('VmRSS'):.0f} MB at the end")


def run(path: Path) -> None:
    import jax
    import jax.numpy as jnp

    from fluxjax.checkpoint import mapped_memory
    from fluxjax.checkpoint.source import open_source
    from fluxjax.models.compilation import compiler_options
    from fluxjax.models.lora import variables
    from fluxjax.models.products import TILED
    from fluxjax.networks import network_of

    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    before, start = resident("VmRSS"), time.perf_counter()
    (network,) = open_source(path).values()
    params = network.params(stacked=False, dtype="bfloat16", quantise="keep", shardings=place)
    seconds, loaded = time.perf_counter() - start, resident("VmRSS")
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "precision": TILED}
    module = network_of(network.config).build(network.config, **types)
    random = np.random.default_rng(0)
    shapes = {"hidden_states": (1, 256, 64), "encoder_hidden_states": (1, 64, 4096)}
    shapes |= {"pooled_projections": (1, 768), "img_ids": (256, 3), "txt_ids": (64, 3)}
    inputs = {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    inputs |= dict.fromkeys(("timestep", "guidance"), np.ones(1, np.float32))
    forward = jax.jit(lambda params, inputs: module.apply(variables(params), **inputs))
    compiled = forward.lower(params, inputs).compile(compiler_options=compiler_options(TILED))
    mapped_memory.release()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    step = time.perf_counter()
    for _ in range(2):
        jax.block_until_ready(compiled(params, inputs))
    step = (time.perf_counter() - step) / 2
    peak = resident("VmHWM")
    print(f"file {size:.0f} MB, read in {seconds:.1f} s ({size / seconds:.0f} MB/s)")
    print(f"before {before:.0f}, loaded {loaded:.0f}, running {peak:.0f} ({peak / size:.3f} x)")
    print(f"without Python and JAX {(peak - before) / size:.3f} x; a forward {step:.2f} s")
    print(
        f"of these {resident('RssFile'):.0f} MB are pages of libraries, which the system may drop"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--do", choices=["write", "convert", "run"])
    chosen, options = parser.parse_known_args()
    source = chosen.folder / "bfloat16"
    out = chosen.folder / "_".join(option.strip("-") for option in options) if options else source
    if chosen.do == "write":
        write(source)
    elif chosen.do == "convert":
        convert(source, out, options)
    elif chosen.do == "run":
        run(next(iter(out.glob("*.gguf")), next(iter(out.glob("flux*.safetensors")), out)))
    else:
        steps = [("write", source), ("convert", out), ("run", None)]
        for step in [step for step, made in steps if made is None or not made.exists()]:
            command = [sys.executable, __file__, str(chosen.folder), "--do", step, *options]
            subprocess.run(command, check=True)
