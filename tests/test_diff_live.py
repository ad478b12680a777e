"""`python -m fluxjax.diff live`: every network against PyTorch, and a planted fault."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_pipeline import random_pipeline  # noqa: F401

from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.config import ConfigError
from fluxjax.diff import live
from fluxjax.diff.commands import Golden, Live, execute
from fluxjax.diff.live import compare_network
from fluxjax.diff.pipeline import compare_pipeline

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def folder(random_pipeline, tmp_path_factory):  # noqa: F811
    """The random pipeline with small pictures, and no scale left at one or bias at zero."""
    copy = tmp_path_factory.mktemp("live") / "pipeline"
    shutil.copytree(random_pipeline, copy)
    random = np.random.default_rng(0)
    for path in sorted(copy.glob("*/*.safetensors")):
        tensors = load_file(path)
        for name, value in tensors.items():
            if path.parent.name == "text_encoder_2":
                # Drawn so wide that PyTorch's own bfloat16 is 4 % off.
                tensors[name] = value * np.float32(0.3 if value.ndim == 2 else 1.0)
            elif value.ndim == 1:
                tensors[name] = value + random.normal(0, 0.1, value.shape).astype(np.float32)
            elif name.endswith("conv2.weight"):
                # Residual branches of full strength are 2 % off in either's bfloat16.
                tensors[name] = value * np.float32(0.3)
        save_file(tensors, path, {"format": "pt"})
    small = {"max_sequence_length": 32, "steps": 2, "guidance": 3.5, "width": 64, "height": 48}
    (copy / "fluxjax.json").write_text(json.dumps(small))
    return copy


@pytest.mark.parametrize("network", NETWORKS)
def test_float32(folder, network):
    report = compare_network(folder, network)
    assert report.passed, report.first_failure
    assert all(row.bound == 1e-5 for row in report.rows)
    names = [row.tensor for row in report.rows]
    expected = {
        "transformer": ["transformer_blocks.0.attn.norm_added_k", "norm_out.linear", "proj_out"],
        "vae": ["encoder.mid_block.attentions.0.to_q", "decoder.up_blocks.3.resnets.1.norm2"],
        "text_encoder": ["encoder.layers.1.self_attn.q_proj", "final_layer_norm"],
        "text_encoder_2": ["encoder.block.1.layer.1.DenseReluDense.wi_1"],
    }[network]
    for name in expected:
        assert name in names
    assert names[-1].startswith("output ")


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16(folder, network):
    report = compare_network(folder, network, dtype="bfloat16")
    assert report.passed, report.first_failure
    output = report.rows[-1]
    assert output.tensor.startswith("output ")
    assert output.bound == min(2e-2, 1.5 * output.own_error) and output.own_error > 1e-4


@pytest.mark.slow
def test_on_a_mesh(folder, shared, monkeypatch):
    loaded, load = [], OpenNetwork.params
    monkeypatch.setattr(
        OpenNetwork, "params", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    report = compare_network(folder, "transformer", mesh="fsdp=2,tensor=4")
    assert report.passed, report.first_failure
    kernel = loaded[0]["transformer_blocks_0"]["ff"]["net_2"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    recording = shared / "goldens" / "bfl_autoencoder.safetensors"
    assert execute(Golden(files=(recording,), mesh="fsdp=8")) == 0
    for command in (Golden(files=(recording,), mesh="fsdp=3"), Live(mesh="fsdp=3")):
        with pytest.raises(ConfigError, match="does not fit 8 devices"):
            execute(command)


@pytest.fixture(scope="module")
def faulty(folder, tmp_path_factory):
    """A copy in which norm_out's halves, scale and shift, are swapped."""
    copy = tmp_path_factory.mktemp("faulty") / "copy"
    shutil.copytree(folder, copy)
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in ("norm_out.linear.weight", "norm_out.linear.bias"):
        tensors[name] = np.roll(tensors[name], len(tensors[name]) // 2, axis=0)
    save_file(tensors, path, {"format": "pt"})
    return copy


def test_planted_fault_is_named(folder, faulty, tmp_path, capsys):
    command = Live(folder=str(folder), against=faulty, json=True, plot=tmp_path / "errors.png")
    assert execute(command) == 1
    (parsed,) = json.loads(capsys.readouterr().out)
    assert parsed["first_failure"] == "norm_out.linear"
    failed = [row["tensor"] for row in parsed["rows"] if not row["passed"]]
    assert failed == ["norm_out.linear", "norm_out", "proj_out", "output sample"]
    assert (tmp_path / "errors.png").stat().st_size > 10_000


@pytest.mark.slow
def test_fault_is_named_where_tokens_are_split(folder, faulty):
    """12 text and 30 image tokens on eight devices: both are padded, and every layer is whole."""
    report = compare_network(folder, "transformer", against=faulty, mesh="sequence=8")
    names = [row.tensor for row in report.rows]
    assert "transformer_blocks.0.ff_context" in names
    assert "single_transformer_blocks.0.attn.norm_q" in names
    failed = [row.tensor for row in report.rows if not row.passed]
    assert failed == ["norm_out.linear", "norm_out", "proj_out", "output sample"]


@pytest.mark.slow
def test_fault_shows_in_the_picture(folder, faulty):
    options = {"prompt": "a red circle", "seed": 42}
    report = compare_pipeline(folder, **options)
    assert report.passed, report.first_failure
    tensors = [row.tensor for row in report.rows]
    assert tensors == ["prompt_embeds", "pooled", "noise", "latents", "picture", "picture (bytes)"]
    report = compare_pipeline(folder, against=faulty, **options)
    assert report.first_failure.tensor == "latents"
    assert not report.rows[-1].passed


def test_bad_folders_are_one_sentence(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        execute(Live(folder=str(tmp_path / "nowhere")))
    half = tmp_path / "half"
    shutil.copytree(folder, half, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises((OSError, ValueError), match="safetensors"):
        execute(Live(folder=str(half), component="vae"))


def test_missing_torch_names_the_extra(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        live.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    with pytest.raises(ValueError, match=r"torch.*fluxjax\[test\]"):
        execute(Live(folder=str(folder)))
