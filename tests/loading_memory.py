"""Writes a random transformer and prints the memory that loading it onto eight devices takes.

python tests/loading_memory.py FOLDER --gigabytes 4

The last line: MB of weights, MB of resident memory above them at the peak, MB of the largest tensor
of the file.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

KIBIBYTE = 1024 / 1e6  # in MB, as files are counted
BLOCK = 15 * 3072 * 3072  # numbers in one single block, without biases


def write(folder: Path, gigabytes: float) -> None:
    """A diffusers folder of float32 weights with single blocks, full-sized from 2 GB on."""
    from fluxjax.checkpoint import engine
    from fluxjax.checkpoint.safetensors_file import write_safetensors
    from fluxjax.checkpoint.templates import abstract_params
    from fluxjax.checkpoint.tensors import of_whole
    from fluxjax.config import FluxConfig

    width = 6 if gigabytes < 2 else 24  # many layers in either
    share = (width / 24) ** 2
    config = FluxConfig(
        num_layers=0,
        num_single_layers=round(gigabytes * 1e9 / (4 * BLOCK * share)),
        num_attention_heads=width,
    )
    rng = np.random.default_rng(0)
    tensors = {
        name: of_whole(
            leaf.shape,
            np.float32,
            lambda shape=leaf.shape: rng.random(shape, np.float32),
        )
        for name, leaf in engine.published_leaves(abstract_params(config)).items()
    }
    (folder / "transformer").mkdir(parents=True)
    write_safetensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", tensors)
    text = {"_class_name": "FluxTransformer2DModel", **asdict(config)}
    (folder / "transformer" / "config.json").write_text(json.dumps(text))


def load(folder: Path) -> None:
    import jax

    from fluxjax.checkpoint.safetensors_file import read_safetensors
    from fluxjax.checkpoint.source import open_component
    from fluxjax.checkpoint.templates import abstract_params
    from fluxjax.parallel.mesh import make_mesh
    from fluxjax.parallel.rules import param_shardings

    network = open_component(folder, "transformer")
    template = abstract_params(network.config, stacked=True)
    places = param_shardings(network.config, template, make_mesh("fsdp=4,tensor=2"))
    jax.device_put(np.ones(8)).block_until_ready()
    before = resident("VmRSS")
    params = network.params(stacked=True, shardings=places)
    jax.block_until_ready(params)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIBIBYTE
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
    # The file tells what should be there.
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = read_safetensors(file)[0]
    first = tensors["single_transformer_blocks.1.proj_out.weight"].read().T
    kernel = params["single_transformer_blocks"]["proj_out"]["kernel"]
    np.testing.assert_array_equal(np.asarray(kernel[1]), first)
    largest = max(tensor.nbytes for tensor in tensors.values()) / 1e6
    print(f"{before:.0f} MB before, {peak:.0f} MB at the peak")
    print(f"{weights:.0f} {peak - before - weights:.0f} {largest:.0f}")


def resident(field: str) -> float:
    """MB (of a million bytes), of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) * KIBIBYTE


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--load", action="store_true")
    chosen = parser.parse_args()
    if chosen.load:
        load(chosen.folder)
    else:
        write(chosen.folder, chosen.gigabytes)
        # A process of its own, whose peak is that of loading.
        flags = "--xla_force_host_platform_device_count=8"
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run(
            [sys.executable, __file__, chosen.folder, "--load"], check=True, env=environment
        )
