"""Malformed files are refused before anything in them is believed."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import random_checkpoints as make
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from fluxjax.checkpoint import engine, safetensors_file
from fluxjax.checkpoint.component_json import network_config
from fluxjax.checkpoint.file_format import pickle_refusal
from fluxjax.checkpoint.orbax_params import read_orbax, write_orbax
from fluxjax.checkpoint.pipeline_folder import (
    load_params,
    read_config,
    read_flux,
    save_params,
    write_config,
)
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.sharded import read_sharded
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.tensors import Tensor, of_array
from fluxjax.cli import sentence
from fluxjax.config import ConfigError
from fluxjax.file_hash import hash_file
from fluxjax.json_input import read_json
from fluxjax.sample.given_pictures import read_picture
from fluxjax.sample.prompts_file import read_prompts
from fluxjax.train.toml_file import read_toml

GOOD = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def entry(**changes):
    return {"x": {**GOOD["x"], **changes}}


def raw_file(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


MALFORMED = {
    "empty": b"",
    "only a length": (2**40).to_bytes(8, "little"),
    "header longer than the file": raw_file(GOOD, length=10**6),
    "not JSON": raw_file(b"{'x': 1}"),
    "not UTF-8": raw_file(b'{"\xff": 1}'),
    "a list": raw_file([1]),
    "deeply nested": raw_file(b"[" * 100_000),
    "no offsets": raw_file({"x": {"dtype": "F32", "shape": [2]}}),
    "unknown dtype": raw_file(entry(dtype="Q4_K")),
    "size against shape": raw_file(entry(shape=[3])),
    "negative length": raw_file(entry(shape=[-2])),
    "overflowing shape": raw_file(entry(shape=[2**63, 2**63])),
    "a float as length": raw_file(entry(shape=[2.0])),
    "offsets backwards": raw_file(entry(data_offsets=[8, 0])),
    "beyond the file": raw_file(entry(shape=[4], data_offsets=[0, 16])),
    "data left over": raw_file(GOOD, b"\0" * 9),
    "a gap": raw_file(entry(data_offsets=[4, 12]), b"\0" * 12),
    "overlap": raw_file({**GOOD, "y": GOOD["x"]}),
    "doubled name": raw_file(
        json.dumps(GOOD)[:-1].encode() + b", " + json.dumps(GOOD)[1:].encode()
    ),
    "metadata no strings": raw_file({"__metadata__": {"a": 1}, **GOOD}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(MALFORMED[name])
    with pytest.raises(ValueError, match="is no valid safetensors file"):
        read_safetensors(path)
    if name not in ("metadata no strings", "doubled name", "a float as length"):
        with pytest.raises(SafetensorError):
            safe_open(path, "np")


def test_huge_headers_and_many_tensors(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(GOOD))
    assert read_safetensors(path)[0]["x"].read().tolist() == [0, 0]
    for limit in ("MAX_HEADER_BYTES", "MAX_TENSORS"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="header"):
            patch.setattr(safetensors_file, limit, 0)
            read_safetensors(path)
    path.write_bytes(raw_file(b'{"x": [' + b"[]," * 2**21 + b"0]}"))
    with pytest.raises(ValueError, match="of its header, it is not JSON: it has more than 4194304"):
        read_safetensors(path)


def test_a_file_without_tensors_is_no_checkpoint(tmp_path):
    path = tmp_path / "x.safetensors"
    for header in ({}, {"__metadata__": {"format": "pt"}}):
        path.write_bytes(raw_file(header, b""))
        with pytest.raises(ConfigError, match=r"x\.safetensors holds no tensors$"):
            open_source(path)


def test_errors_of_reading_name_the_file():
    """A disk that fails while it is read, unlike a file that cannot be opened, says no name."""
    reads = open_source, read_json, read_toml, read_prompts, hash_file, read_safetensors
    for read in (*reads, lambda path: read_picture(path, "image")):
        with pytest.raises(OSError) as caught:
            read(Path("/proc/self/mem"))
        assert sentence(caught.value) == "/proc/self/mem: Input/output error"


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken(start, stop):
        raise OSError("disk on fire")

    tensors = {"x": Tensor((2,), np.dtype(np.float32), broken)}
    with pytest.raises(OSError, match="fire"):
        write_safetensors(tmp_path / "x.safetensors", tensors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_stays_in_its_folder(tmp_path, name):
    index = {"weight_map": {"x": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no file of its own folder"):
        read_sharded(tmp_path)


def test_only_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"is a pickle.*safetensors"):
        read_sharded(tmp_path)


@pytest.mark.slow
def test_the_line_that_saves_a_pickle_does_nothing_else(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "its \"model\" $(touch 'run').pt"
    torch.save({"module": {"x": torch.ones(2)}}, path)
    line = pickle_refusal(path).partition(" is: ")[2]
    subprocess.run(line.replace("python", sys.executable, 1), shell=True, cwd=tmp_path, check=True)
    assert set(tmp_path.iterdir()) == {path, path.with_suffix(".safetensors")}
    assert read_safetensors(path.with_suffix(".safetensors"))[0]["x"].shape == (2,)


def test_config_folder_round_trip(tmp_path):
    write_config(tmp_path, make.SMALL)
    assert read_config(tmp_path) == make.SMALL
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/config.json is missing"):
        read_config(tmp_path)


def test_published_configs(shared):
    from fluxjax.config import DEV, SCHNELL

    assert read_config(shared / "checkpoints/FLUX.1-dev") == DEV
    assert read_config(shared / "checkpoints/FLUX.1-schnell") == SCHNELL
    with pytest.raises(ConfigError, match="StableDiffusion3Pipeline"):
        read_flux(shared / "checkpoints/stable-diffusion-3-medium-diffusers")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (False, "relu")),
        ({"feed_forward_proj": "gated-gelu"}, (True, "gelu_new")),
        ({"is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"}, (True, "gelu_pytorch_tanh")),
    ],
)
def test_t5_activation_as_transformers_reads_it(tmp_path, values, expected):
    from transformers import T5Config

    config = network_config({"model_type": "t5", **values}, tmp_path)
    assert (config.is_gated_act, config.dense_act_fn) == expected
    theirs = T5Config(**values)
    assert (theirs.is_gated_act, theirs.dense_act_fn) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make.pipeline_folder(tmp_path_factory.mktemp("model") / "model", dtype=np.float32)


def test_load_stacked_and_per_layer_and_save(tmp_path, folder):
    config = make.SMALL.transformer
    layers = load_params(folder, "transformer", config, stacked=False)
    stacked = load_params(folder, "transformer", config, stacked=True)
    kernel = stacked["single_transformer_blocks"]["attn"]["to_q"]["kernel"]
    one = layers["single_transformer_blocks_2"]["attn"]["to_q"]["kernel"]
    assert (kernel[2] == one).all()
    file = make.read_arrays(folder / "transformer")
    assert (file["single_transformer_blocks.2.attn.to_q.weight"] == np.asarray(one).T).all()
    save_params(tmp_path, "transformer", stacked, config, None)
    make.assert_same_bits(make.read_arrays(tmp_path / "transformer"), file)


def test_weights_load_into_their_sharding(folder):
    """Sharded over a layer axis and a matrix axis: each device reads its part, layer by layer."""
    config = make.SMALL.text_encoder_2
    plain = load_params(folder, "text_encoder_2", config, stacked=True)
    mesh = jax.make_mesh((2, 4), ("layers", "wide"))

    def sharding(leaf):
        sharded = PartitionSpec("layers", None, "wide") if leaf.ndim == 3 else PartitionSpec()
        return NamedSharding(mesh, sharded)

    shardings = jax.tree.map(sharding, plain)
    loaded = load_params(
        folder, "text_encoder_2", config, stacked=True, dtype="bfloat16", shardings=shardings
    )
    for path, leaf in engine.flatten(loaded).items():
        expected = engine.flatten(plain)[path]
        assert leaf.sharding == sharding(expected)
        assert leaf.dtype == "bfloat16"
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected.astype("bfloat16")))


def test_blocks_cover_a_tensor_in_order():
    array = np.arange(70, dtype=np.int32).reshape(7, 10)
    blocks = list(of_array(array).blocks(max_bytes=90))
    assert [len(block) for block in blocks] == [2, 2, 2, 1]
    assert (np.concatenate(blocks) == array).all()


def test_orbax_itself_restores_what_we_stream(tmp_path):
    import orbax.checkpoint as ocp

    tree = make.random_tree(make.SMALL.text_encoder, np.float16)
    write_orbax(tmp_path / "params", jax.tree.map(of_array, tree))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree
    )
    restored = ocp.StandardCheckpointer().restore(tmp_path / "params", target)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)
    lazy = read_orbax(tmp_path / "params")
    jax.tree.map(lambda t, a: np.testing.assert_array_equal(t.read(), a), lazy, tree)


def test_a_full_disk_is_named_when_orbax_writes(tmp_path, capfd):
    """By a sentence that is not of the device's memory, with nothing beside it."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    tree = {name: of_array(np.arange(30_000, dtype=np.float32)) for name in "abcd"}
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_orbax(tmp_path / "params", tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "params")
    assert not capfd.readouterr().err


def test_a_lost_part_of_an_orbax_folder_is_not_read_as_zeros(tmp_path):
    """Also without the hashes that we write beside ours; zeros themselves are stored."""
    import tensorstore as ts

    tree = {"a": np.zeros((4, 4), np.float32), "b": np.ones(3, np.float32), "c": np.float32(0)}
    write_orbax(tmp_path / "params", tree, chunks={"a": (2, 2), "b": (3,), "c": ()})
    (tmp_path / "params.sha256.json").unlink()
    assert {name: float(t.read().sum()) for name, t in read_orbax(tmp_path / "params").items()} == {
        "a": 0,
        "b": 3,
        "c": 0,
    }
    base = {"driver": "ocdbt", "base": f"file://{tmp_path / 'params'}/"}
    store = ts.KvStore.open(base).result()
    for key, words in ((b"a/1.0", "a has 3 of its 4 parts"), (b"b/0", "b has 0 of its 1 parts")):
        value = store.read(key).result().value
        store.delete_range(ts.KvStore.KeyRange(key, key + b"\0")).result()
        with pytest.raises(ValueError, match=words):
            read_orbax(tmp_path / "params")
        store.write(key, value).result()
    lazy = read_orbax(tmp_path / "params")
    for file in (tmp_path / "params").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"params is damaged: a cannot be read$"):
        lazy["a"].read()
