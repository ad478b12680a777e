"""The command: what it prints, what it refuses, what it leaves behind, its memory."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import random_checkpoints as make
import tensorstore
from ctrl_c import heeding_ctrl_c
from parameter_trees import to_theirs

from fluxjax.atomic_write import whole_or_nothing
from fluxjax.checkpoint import engine
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor, of_array
from fluxjax.config import DEV, ConfigError
from fluxjax.convert import convert
from fluxjax.convert.__main__ import main
from fluxjax.lock import InUse
from fluxjax.networks import network_of
from fluxjax.networks.flux import BFL

COMMAND = [sys.executable, "-m", "fluxjax.convert"]


def command(*arguments):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "ae.safetensors"
    arrays = make.bfl_arrays(make.SMALL.vae)
    write_safetensors(path, {name: of_array(array) for name, array in arrays.items()})
    return path


def plan(source, destination, to="diffusers", **options):
    return convert.plan(source, destination, to, **options)


def test_command_converts_and_refuses_in_one_sentence(tmp_path, vae_file):
    done = command(vae_file, tmp_path / "vae")
    assert done.returncode == 0, done.stderr
    assert "FLUX autoencoder, 16 latent channels: 679,043 parameters, bfloat16" in done.stderr
    assert "MB/s" in done.stdout
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    again = command(vae_file, tmp_path / "vae")
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path / 'vae'} exists; give --overwrite to replace it\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_what_is_written_is_written_though_nobody_hears_of_it(tmp_path, vae_file):
    """A disk full of logs is no failure of the work that is done by then."""
    with open("/dev/full", "w") as full:
        sources = [str(vae_file), str(tmp_path / "out")]
        done = subprocess.run([*COMMAND, *sources], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "note: nothing more is printed: No space left on device"


@pytest.mark.slow
def test_a_mesh_is_for_orbax(tmp_path, vae_file):
    """It needs no devices: the command's own platform is one CPU."""
    folder = tmp_path / "orbax"
    done = command(vae_file, folder, "--to", "orbax", "--mesh", "fsdp=4")
    assert done.returncode == 0, done.stderr
    kvstore = {
        "driver": "ocdbt",
        "base": f"file://{folder}/params/",
        "path": "decoder.conv_in.kernel/",
    }
    stored = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    assert stored.shape == (3, 3, 16, 64)
    assert stored.chunk_layout.read_chunk.shape == (3, 3, 16, 64 // 4)
    refused = command(vae_file, tmp_path / "bfl", "--to", "bfl", "--mesh", "fsdp=4")
    assert refused.returncode == 2
    assert refused.stderr == "error: --mesh lays out an Orbax folder; bfl files have none\n"


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth"])
def test_pickles_are_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"is a pickle, which can run any code.*safetensors"):
        plan(path, tmp_path / "out")


def test_sources_that_are_none(tmp_path, vae_file):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        plan(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        plan(tmp_path, tmp_path.parent / "out")
    with pytest.raises(ValueError, match="GGUF"):
        (tmp_path / "flux.gguf").touch()
        plan(tmp_path / "flux.gguf", tmp_path / "out")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(vae_file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut.safetensors is no valid safetensors file"):
        plan(cut, tmp_path / "out")


def test_destinations_that_must_not_be_touched(tmp_path, vae_file):
    own = tmp_path / "letters"
    own.mkdir()
    (own / "letter.txt").write_text("dear")
    (own / "config.json").write_text("{}")  # many a program's
    with pytest.raises(FileExistsError, match="is no model, so it is not overwritten"):
        plan(vae_file, own, overwrite=True)
    with pytest.raises(ValueError, match="is or contains the source"):
        plan(vae_file, vae_file.parent, overwrite=True)
    with pytest.raises(ValueError, match="is or contains the source"):
        plan(vae_file, vae_file, "bfl", overwrite=True)
    folder = tmp_path / "folder"
    convert.run(plan(vae_file, folder))
    with pytest.raises(ValueError, match="lies inside the source"):
        plan(folder, folder / "inner", "orbax")
    with pytest.raises(ValueError, match="named like a single file"):
        plan(folder, tmp_path / "x.safetensors", "diffusers")


def test_an_empty_destination_is_not_the_current_folder(tmp_path, vae_file, monkeypatch):
    """Which --overwrite would replace with all that is in it."""
    convert.run(plan(vae_file, tmp_path / "mine"))
    monkeypatch.chdir(tmp_path / "mine")
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match="DESTINATION must be a path, got ''"):
        main([str(vae_file), "", "--overwrite"])
    assert sorted(os.listdir(tmp_path / "mine")) == before


def test_overwrite_replaces_the_whole(tmp_path, vae_file):
    folder = tmp_path / "folder"
    convert.run(plan(vae_file, folder))
    (folder / "stale.json").write_text("{}")
    convert.run(plan(vae_file, folder, "orbax", overwrite=True))
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "params",
        "params.sha256.json",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("failure", [OSError("disk on fire"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    destination = tmp_path / "model"
    destination.mkdir()
    (destination / "old").touch()
    with pytest.raises(type(failure)), whole_or_nothing(destination) as part:
        part.mkdir()
        (part / "new").touch()
        raise failure
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "model",
        "model/old",
    ]


def test_no_space(tmp_path, vae_file, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="not enough space"):
        convert.run(plan(vae_file, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_names_with_paths_are_only_names(tmp_path):
    arrays = {"../../outside": np.zeros(2, np.float32), **make.bfl_arrays(make.SMALL.vae)}
    path = tmp_path / "ae.safetensors"
    write_safetensors(path, {name: of_array(array) for name, array in arrays.items()})
    with pytest.raises(engine.MappingError, match=r"unknown: \.\./\.\./outside"):
        plan(path, tmp_path / "out")


def test_a_model_index_cannot_reach_outside(tmp_path):
    model = make.pipeline_folder(tmp_path / "models" / "model")
    (tmp_path / "models" / "secret.json").write_text("{}")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "..": ["a", "Tokenizer"]}))
    with pytest.raises(ConfigError, match=r"with \.\., which cannot be carried over"):
        plan(model, tmp_path / "out")


def test_torch_is_not_imported(tmp_path, vae_file):
    code = (
        "import sys, pathlib; from fluxjax.convert import convert\n"
        f"convert.run(convert.plan(pathlib.Path({str(vae_file)!r}), "
        f"pathlib.Path({str(tmp_path / 'out')!r}), 'orbax'))\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def big_file(path, blocks):
    """Random bits of a transformer of FLUX.1's width with `blocks` single blocks of 283 MB."""
    config = replace(DEV.transformer, num_layers=0, num_single_layers=blocks)
    rng = np.random.default_rng(0)

    def random(shape):
        def rows(start, stop):
            count = int(np.prod((stop - start, *shape[1:]), dtype=np.int64))
            data = np.frombuffer(rng.bytes(2 * count), ml_dtypes.bfloat16)
            return data.reshape(stop - start, *shape[1:])

        return Tensor(shape, np.dtype(ml_dtypes.bfloat16), rows, by_rows=True)

    leaves = engine.published_leaves(abstract_params(config))
    reference = {name: random(leaf.shape) for name, leaf in leaves.items()}
    write_safetensors(path, engine.from_published(reference, BFL))
    return path


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 1 GB is converted in well under 1 GB, imports and all."""
    source = big_file(tmp_path / "big.safetensors", 3)
    assert source.stat().st_size > 0.9e9
    for to in (["diffusers"], ["orbax"], ["orbax", "--mesh", "fsdp=4,tensor=2"]):
        code = (
            # Not ru_maxrss, which a new process takes over from the large one that started it.
            "import re; from fluxjax.convert.__main__ import main; main()\n"
            "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
            "assert peak < 700_000, peak"
        )
        arguments = [str(source), str(tmp_path / "out"), "--overwrite", "--to", *to]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            # Allocators that never give memory back would count it all.
            env={
                key: v for key, v in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))
            },
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_recipe_round_trip(tmp_path):
    """convert/round_trip.sh and convert/tensors.py, on a small random pipeline."""
    recipe = Path(__file__).resolve().parents[1] / "convert" / "round_trip.sh"
    model = make.pipeline_folder(tmp_path / "model")
    done = subprocess.run(
        ["bash", recipe, model, tmp_path / "work"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the same bits\n")


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    source = big_file(tmp_path / "big.safetensors", 2)
    process = subprocess.Popen(
        heeding_ctrl_c([*COMMAND, str(source), str(tmp_path / "out")]),
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(6000):
        time.sleep(0.01)
        if list(tmp_path.glob(".out*")):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["big.safetensors"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    """And nothing beside it, once somebody writes there again."""
    sources = []
    for seed in (0, 1):
        tree = make.random_tree(make.SMALL.vae, np.float32, seed)
        table = network_of(make.SMALL.vae).dialect("bfl").table(make.SMALL.vae)
        arrays = {n: t.read() for n, t in to_theirs(tree, table).items()}
        (tmp_path / f"{seed}").mkdir()
        sources.append(tmp_path / f"{seed}" / "ae.safetensors")
        write_safetensors(sources[-1], {name: of_array(array) for name, array in arrays.items()})
    out = tmp_path / "out" / "vae"
    whole = []
    for source in sources:
        convert.run(plan(source, out, overwrite=True))
        whole.append(make.read_arrays(out))
    program = (
        "import sys; from pathlib import Path; from fluxjax.convert import convert\n"
        "plans = [convert.plan(Path(s), Path(sys.argv[1]), 'diffusers', overwrite=True)\n"
        "         for s in sys.argv[2:]]\n"
        "while True:\n"
        "    for one in plans: convert.run(one); print('written', flush=True)\n"
    )
    chance = random.Random(0)
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", program, out, *sources], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"written\n"
            time.sleep(chance.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
        found = make.read_arrays(out)
        assert any(
            found.keys() == one.keys() and all((found[n] == one[n]).all() for n in one)
            for one in whole
        )
    convert.run(plan(sources[0], out, overwrite=True))
    assert [path.name for path in out.parent.iterdir()] == ["vae"]


def test_of_two_converts_one_is_refused(tmp_path, vae_file):
    """The one that planned first also, when it comes second."""
    first, second = (plan(vae_file, tmp_path / "out") for _ in range(2))
    with whole_or_nothing(tmp_path / "out") as part:
        with pytest.raises(InUse, match=r"out is in use by process \d+"):
            convert.run(first)
        part.mkdir()
        (part / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="give --overwrite"):
        convert.run(second)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "out",
        "out/model.safetensors",
    ]
