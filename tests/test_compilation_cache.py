"""The compilation cache heals: what cannot be read is removed, compiled and kept anew."""

import os
import shutil
import subprocess
import sys

import pytest

from fluxjax.sample.cache import remove_damaged

PROGRAM = """
import sys
from fluxjax.sample.cache import enable_cache
assert enable_cache() is None
import jax
@jax.jit
def one(x): return x * 2 + 1
@jax.jit
def other(x): return x * 3
print(float(one(1.0)), [float(other(jax.numpy.ones(n)).sum()) for n in (2, 3)])
"""


def compile_all(folder, variable="FLUXJAX_CACHE"):
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    environment |= {variable: str(folder), "XLA_FLAGS": ""}
    if variable != "FLUXJAX_CACHE":
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    assert ended.stdout == "3.0 [6.0, 9.0]\n"
    return {path.name: path.stat() for path in folder.glob("*-cache")}


@pytest.mark.parametrize("variable", ["FLUXJAX_CACHE", "JAX_COMPILATION_CACHE_DIR"])
def test_damaged_entries_are_replaced_in_silence(tmp_path, variable):
    folder = tmp_path / "compiled"
    folder.mkdir(mode=0o700)
    before = compile_all(folder, variable)
    others = sorted(name for name in before if name.startswith("jit_other-"))
    one = next(name for name in before if name.startswith("jit_one-"))
    assert len(others) == 2
    cut, flipped = folder / one, folder / others[0]
    cut.write_bytes(cut.read_bytes()[:50])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    after = compile_all(folder, variable)
    assert after.keys() == before.keys()
    assert after[one].st_size == before[one].st_size
    assert after[others[1]].st_mtime_ns == before[others[1]].st_mtime_ns, "the sound one stayed"
    again = compile_all(folder, variable)
    times = {name: status.st_mtime_ns for name, status in after.items()}
    assert {name: status.st_mtime_ns for name, status in again.items()} == times


def test_an_entry_that_is_a_folder_is_replaced(tmp_path):
    folder = tmp_path / "compiled"
    folder.mkdir(mode=0o700)
    for name in compile_all(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
        (folder / name / "x").touch()
    compile_all(folder)
    assert all((folder / name).is_file() for name in compile_all(folder))


def test_entries_that_all_decompress_all_go(tmp_path):
    import zlib

    for name in ("jit_a-1-cache", "jit_a-2-cache", "jit_ab-3-cache"):
        (tmp_path / name).write_bytes(zlib.compress(b"no program"))
    remove_damaged(tmp_path, "jit_a")
    assert [path.name for path in tmp_path.iterdir()] == ["jit_ab-3-cache"]
    shutil.rmtree(tmp_path)
    remove_damaged(tmp_path, "jit_a")
