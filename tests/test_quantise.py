"""convert --quantise: what is written is read back, by others too, and codes stay what they are."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from random_checkpoints import assert_same_bits, hf_arrays, read_arrays

from fluxjax.checkpoint.component_json import config_json, write_json
from fluxjax.checkpoint.orbax_params import read_orbax, write_orbax
from fluxjax.checkpoint.quantised.gguf import read_gguf
from fluxjax.checkpoint.quantised.quantise import quantised
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.tensors import Tensor, of_array
from fluxjax.config import ConfigError, FluxConfig, T5Config
from fluxjax.convert import convert
from fluxjax.convert.__main__ import main as convert_command
from fluxjax.convert.report import relative_error
from fluxjax.hub import tiny_folder
from fluxjax.models.quantised import Quantised
from fluxjax.parallel.mesh_shape import parse_mesh
from fluxjax.quantised_kinds import KINDS

# Rows of 256, so that the K types fit; shapes tell it all.
SMALL = FluxConfig(
    num_layers=1,
    num_single_layers=1,
    num_attention_heads=2,
    joint_attention_dim=32,
    pooled_projection_dim=64,
    mlp_ratio=1.0,
)
# Relative errors of normal numbers, and a little more.
ERRORS = {
    "int8": 0.01,
    "fp8": 0.03,
    "nf4": 0.1,
    "q8_0": 0.0062,
    "q6_k": 0.02,
    "q5_k": 0.04,
    "q4_k": 0.08,
    "q4_0": 0.095,
}
QUANTISED = "single_transformer_blocks.0.attn.to_q.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    arrays = hf_arrays(SMALL, ml_dtypes.bfloat16)
    tensors = {name: of_array(array) for name, array in arrays.items()}
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    write_json(folder / "config.json", config_json(SMALL))
    return folder


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """The folder of each kind, made when it is first asked for."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("written") / kind
            convert.run(convert.plan(source, made[kind], quantised=kind))
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_back(source, written, kind):
    plain = open_source(source)["transformer"].tensors
    network = open_source(written(kind))["transformer"]
    assert network.config == SMALL
    packed = {name for name, tensor in network.tensors.items() if tensor.packed}
    blocks = {
        name
        for name in plain
        if "blocks." in name and name.endswith(".weight") and "norm" not in name
    }
    # bitsandbytes' readers leave out `proj_out` at the top and in blocks, or neither.
    assert packed - blocks == ({"proj_out.weight"} if kind in ("int8", "nf4") else set())
    assert blocks <= packed
    for name, tensor in network.tensors.items():
        expected = plain[name].read().astype(np.float32)
        error = tensor.read().astype(np.float32) - expected
        limit = ERRORS[kind] if name in packed else 0
        assert np.linalg.norm(error) <= limit * np.linalg.norm(expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_codes_stay_as_they_are(written, tmp_path, kind):
    """Quantised once more, to the same kind: every bit."""
    convert.run(convert.plan(written(kind), tmp_path / "again", quantised=kind))
    if kind.startswith("q"):
        folders = (written(kind), tmp_path / "again")
        first, second = (next(folder.glob("*.gguf")).read_bytes() for folder in folders)
        assert first == second
    else:
        assert_same_bits(read_arrays(tmp_path / "again"), read_arrays(written(kind)))


@pytest.mark.parametrize(
    "kind", ["int8", "q4_k", *(pytest.param(k, marks=pytest.mark.slow) for k in ("fp8", "nf4"))]
)
def test_orbax_holds_codes(source, written, tmp_path, kind):
    """Those of the files of their kind; in parts for a mesh; and they are taken onto the device."""
    mesh = parse_mesh("fsdp=2") if kind == "int8" else None
    folder = tmp_path / "orbax"
    planned = convert.plan(source, folder, "orbax", quantised=kind, mesh=mesh)
    convert.run(planned)
    stored = jax.tree.leaves(read_orbax(folder / "params"))
    assert planned.nbytes == sum(tensor.nbytes for tensor in stored)
    network, files = open_source(folder)["transformer"], open_source(written(kind))["transformer"]
    plain = open_source(source)["transformer"].tensors
    assert network.config == SMALL
    packed = {name for name, tensor in network.tensors.items() if tensor.packed}
    assert packed == {n for n, tensor in files.tensors.items() if tensor.packed} - {
        "proj_out.weight"
    }
    for name in packed:
        found, expected = network.tensors[name].packed, files.tensors[name].packed
        assert found.kind == expected.kind and found.parts.keys() == expected.parts.keys()
        for part, tensor in found.parts.items():
            assert tensor.shape == expected.parts[part].shape
            if kind != "fp8":  # whose scales are those of BFL's joined tensors
                assert_same_bits({part: tensor.read()}, {part: expected.parts[part].read()})
        error = relative_error(network.tensors[name], plain[name])
        assert 0 < error < ERRORS[kind]
    params = network.params(stacked=True, dtype=np.float32, quantise="keep")
    kernel = params["single_transformer_blocks"]["proj_out"]["kernel"]
    assert isinstance(kernel, Quantised) and kernel.shape[0] == SMALL.num_single_layers


def test_damaged_codes_in_orbax_are_refused(tmp_path):
    codes = np.ones((4, 8), np.int8)
    for number, (kind, parts) in enumerate(
        [
            ("int8", {"codes": codes}),
            ("int8", {"codes": codes, "absmax": np.ones((3, 1), np.float32)}),
            ("nf4", {"codes": codes, "absmax": np.ones((4, 1), np.float32)}),
            ("int3", {"codes": codes, "absmax": np.ones((4, 1), np.float32)}),
        ]
    ):
        folder = tmp_path / str(number)
        write_orbax(folder, {"layer": {"kernel": {kind: parts}}})
        with pytest.raises(ValueError, match=f"no codes of the kind '{kind}' consist of"):
            read_orbax(folder)


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "q5_k", "q4_k", "q4_0"])
def test_llama_cpps_own_reader_gives_the_same_values(written, kind):
    gguf = pytest.importorskip("gguf")
    (path,) = written(kind).glob("*.gguf")
    ours = read_gguf(path)[0]
    theirs = gguf.GGUFReader(path).tensors
    assert {tensor.name for tensor in theirs} == ours.keys()
    for tensor in theirs:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = ours[tensor.name].read().astype(np.float32)
        np.testing.assert_array_equal(values.reshape(expected.shape), expected)


def test_what_bitsandbytes_needs_is_written(written):
    """Names, types and shapes as its own `state_dict` has them; all that is left out is listed."""
    arrays = read_arrays(written("nf4"))
    rows, columns = 256, 256
    state = json.loads(arrays[f"{QUANTISED}.quant_state.bitsandbytes__nf4"].tobytes())
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [rows, columns],
    }
    assert arrays[QUANTISED].shape == (rows * columns // 2, 1)
    assert arrays[f"{QUANTISED}.absmax"].shape == (rows * columns // 64,)
    assert arrays[f"{QUANTISED}.quant_map"].shape == (16,)
    values = json.loads((written("nf4") / "config.json").read_text())["quantization_config"]
    linear = {
        name.removesuffix(".weight")
        for name, array in arrays.items()
        if name.endswith(".weight") and array.ndim == 2 and array.dtype != np.uint8
    }
    assert set(values["llm_int8_skip_modules"]) == linear
    assert values["load_in_4bit"] and values["quant_method"] == "bitsandbytes"
    arrays = read_arrays(written("int8"))
    assert arrays[QUANTISED].dtype == np.int8
    scale = QUANTISED.replace("weight", "SCB")
    assert arrays[scale].shape == (rows,) and arrays[scale].dtype == np.float32
    assert arrays[QUANTISED.replace("weight", "weight_format")] == 0


def test_fp8_has_one_scale_and_the_marker(written):
    arrays = read_arrays(written("fp8"))
    layer = "single_blocks.0.linear1"
    assert arrays[f"{layer}.weight"].dtype == ml_dtypes.float8_e4m3fn
    assert arrays[f"{layer}.scale_weight"].shape == () and "scaled_fp8" in arrays
    assert np.abs(arrays[f"{layer}.weight"].astype(np.float32)).max() == 448


@pytest.mark.parametrize("kind", ["nf4", "q8_0"])
def test_t5(tmp_path, kind):
    config = T5Config(vocab_size=40, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)
    (tmp_path / "t5").mkdir()
    tensors = {name: of_array(array) for name, array in hf_arrays(config).items()}
    write_safetensors(tmp_path / "t5/model.safetensors", tensors)
    write_json(tmp_path / "t5/config.json", config_json(config))
    convert.run(convert.plan(tmp_path / "t5", tmp_path / "out", quantised=kind))
    network = open_source(tmp_path / "out")["text_encoder_2"]
    assert network.config == config
    packed = {name.rsplit(".", 2)[1] for name, tensor in network.tensors.items() if tensor.packed}
    # transformers keeps `wo` in float32 whatever it opens.
    assert packed == {"q", "k", "v", "o", "wi_0", "wi_1"} | ({"wo"} if kind == "q8_0" else set())


def test_the_command_reports_what_it_cost(source, tmp_path, capsys):
    assert (
        convert_command(
            [str(source), str(tmp_path / "out.gguf"), "--to", "bfl", "--quantise", "q8_0"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert any("MB before" in line for line in lines)
    (errors,) = (line for line in lines if "on average" in line)
    assert 0.004 < float(errors.split(" on average")[0].split()[-1]) < 0.0062
    (forward,) = (line for line in lines if "one forward" in line)
    assert 0 < float(forward.split()[-1]) < 0.1
    assert open_source(tmp_path / "out.gguf")["transformer"].config == SMALL


@pytest.mark.parametrize(
    "options, why",
    [
        ({"quantised": "int8", "target": "bfl"}, "as --to diffusers or orbax, not bfl"),
        ({"quantised": "q8_0", "target": "diffusers"}, "as --to bfl or orbax, not diffusers"),
        ({"destination": "x.gguf"}, r"ends in \.gguf"),
        ({"destination": "x.safetensors", "quantised": "q8_0"}, r"ends in \.safetensors.*\.gguf"),
        # It would be written as it is, to x.gguf too.
        (
            {"source": "vae", "destination": "x.gguf", "quantised": "q4_k"},
            "--quantise q4_k: the autoencoder is never quantised",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(source, tmp_path, options, why):
    destination = tmp_path / options.pop("destination", "out")
    source = tiny_folder() / options.pop("source") if "source" in options else source
    with pytest.raises(ConfigError, match=why):
        convert.plan(source, destination, **options)


def test_zeros_and_single_large_values_survive():
    x = np.zeros((3, 512), np.float32)
    x[1, 7], x[2] = 1000, np.linspace(-1e-3, 5, 512)
    for kind in KINDS:
        tensor = quantised(of_array(x), kind)
        assert tensor is not None
        values = tensor.read()
        assert np.isfinite(values).all() and not values[0].any(), kind
        assert values[1, 7] == pytest.approx(1000, rel=0.02) and not values[1, 256:].any(), kind
        np.testing.assert_array_equal(tensor.rows(1, 3), values[1:3], err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.25, -0.25])
def test_equal_values_survive(kind, value):
    """Of a whole row, and of every second 32 of one."""
    weight = 0.02 * np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    weight[0] = weight[1:, np.arange(512) // 32 % 2 == 1] = value
    decoded = quantised(of_array(weight), kind).read()
    np.testing.assert_allclose(decoded[weight == value], value, rtol=0.07)


def test_rows_that_are_no_whole_blocks_are_left():
    x = of_array(np.ones((2, 96), np.float32))
    assert quantised(x, "q4_k") is None and quantised(x, "nf4") is None
    assert quantised(x, "q8_0") is not None


@pytest.mark.parametrize("kind", ["int8", "nf4", "q8_0"])
def test_few_rows_are_quantised_at_once(kind, monkeypatch):
    """And become the codes that they become together."""
    values, asked = np.random.default_rng(0).standard_normal((7, 256), np.float32), list[int]()

    def rows(a: int, b: int) -> np.ndarray:
        asked.append(b - a)
        return values[a:b]

    def parts(tensor: Tensor) -> dict[str, np.ndarray]:
        found = quantised(tensor, kind)
        assert found is not None and found.packed is not None
        return {name: part.read() for name, part in found.packed.parts.items()}

    whole = parts(of_array(values))
    monkeypatch.setattr("fluxjax.checkpoint.quantised.quantise.AT_ONCE", 2 * 256)
    for name, part in parts(Tensor(values.shape, values.dtype, rows, by_rows=True)).items():
        np.testing.assert_array_equal(part, whole[name])
    assert set(asked) == {2, 1}


@pytest.mark.parametrize("kind", ["q8_0", "q4_k", "q4_0"])
def test_values_beyond_the_scales_of_gguf_are_refused(kind):
    """They became nan or 0."""
    large = np.full((2, 256), 1e30, np.float32)
    read = quantised(of_array(large), kind, "proj.weight")
    assert read is not None and read.packed is not None
    with pytest.raises(ConfigError, match=r"proj.weight holds 1e\+30; scales of .* int8"):
        read.packed.parts["blocks"].read()
