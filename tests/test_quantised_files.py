"""Quantised files of every form are read as the values that their own libraries give them."""

import json
import os
import re
import struct
import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from gguf_files import gguf_bytes, info, key, text
from random_checkpoints import bfl_arrays, hf_arrays

from fluxjax.checkpoint.component_json import config_json, write_json
from fluxjax.checkpoint.quantised.comfy import METADATA_KEY, hadamard, with_markers
from fluxjax.checkpoint.quantised.gguf import read_gguf
from fluxjax.checkpoint.quantised.reader import unquantised
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.source import open_file, open_folder, open_source
from fluxjax.checkpoint.source_record import dequantise
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import LLAMA3_8B, ConfigError, FluxConfig, LlamaConfig, T5Config
from fluxjax.convert.__main__ import main as convert_command
from fluxjax.models.gguf_blocks import BLOCK_TYPES
from fluxjax.models.quantised import NF4
from fluxjax.networks import network_of


def recorded(shared, name):
    return {
        k: t.read() for k, t in read_safetensors(shared / f"goldens/quantised/{name}")[0].items()
    }


def lazy(arrays):
    return {name: of_array(array) for name, array in arrays.items()}


def bits(array):
    return array.dtype, array.shape, array.tobytes()


@pytest.mark.parametrize("kind", [*BLOCK_TYPES, "F16", "BF16"])
@pytest.mark.parametrize("case", ["fit", "bits"])
def test_gguf_blocks(shared, tmp_path, kind, case):
    blocks = recorded(shared, "gguf_blocks.safetensors")
    expected, data = blocks[f"{kind}|{case}|values"], blocks[f"{kind}|{case}|bytes"]
    numbers = {"F16": 1, "BF16": 30}
    number = numbers.get(kind) or BLOCK_TYPES[kind].number
    (tmp_path / "x.gguf").write_bytes(gguf_bytes({"x": (number, expected.shape, data.tobytes())}))
    tensor = read_gguf(tmp_path / "x.gguf")[0]["x"]
    assert bits(tensor.read().astype(np.float32)) == bits(expected)
    assert bits(tensor.rows(0, 1).astype(np.float32)) == bits(expected[:1])


@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4", "int8"])
@pytest.mark.parametrize("prefix", ["", "blocks.0.mlp."])
def test_bitsandbytes(shared, name, prefix):
    arrays = recorded(shared, "bitsandbytes.safetensors")
    parts = {k.split("|")[1]: v for k, v in arrays.items() if k.startswith(f"{name}|")}
    expected = parts.pop("values")
    if name == "int8":
        parts["weight_format"] = np.array(0, np.uint8)
    parts["bias"] = np.ones(24, np.float32)
    plain = unquantised(lazy({prefix + part: array for part, array in parts.items()}))
    assert plain.keys() == {f"{prefix}weight", f"{prefix}bias"}
    weight = plain[f"{prefix}weight"]
    assert bits(weight.read().astype(np.float32)) == bits(expected)
    assert bits(weight.rows(3, 7).astype(np.float32)) == bits(expected[3:7])
    assert weight.packed is not None and weight.packed.kind == name.removesuffix("_nested")


@pytest.mark.parametrize("storage", [np.int8, ml_dtypes.bfloat16, np.float16, np.float32])
def test_bytes_of_nf4_may_be_stored_as_numbers(shared, storage):
    """As QLoRA over FSDP needs them: `bnb_4bit_quant_storage`."""
    arrays = recorded(shared, "bitsandbytes.safetensors")
    parts = {k.split("|")[1]: v for k, v in arrays.items() if k.startswith("nf4|")}
    expected = parts.pop("values")
    parts["weight"] = parts["weight"].reshape(-1).view(storage)[:, None]
    weight = unquantised(lazy(parts))["weight"]
    assert bits(weight.read().astype(np.float32)) == bits(expected)
    assert bits(weight.rows(3, 7).astype(np.float32)) == bits(expected[3:7])
    parts["weight"] = parts["weight"][1:]
    with pytest.raises(ValueError, match="two to a byte"):
        unquantised(lazy(parts))


def test_nf4_of_rows_that_are_no_whole_blocks(shared):
    arrays = recorded(shared, "bitsandbytes.safetensors")
    parts = {k.split("|")[1]: v for k, v in arrays.items() if k.startswith("nf4|")}
    state = "weight.quant_state.bitsandbytes__nf4"
    values = json.loads(parts[state].tobytes()) | {"shape": [48, 96]}
    parts[state] = np.frombuffer(json.dumps(values).encode(), np.uint8)
    read = unquantised(lazy({k: v for k, v in parts.items() if k != "values"}))["weight"]
    assert bits(read.read().astype(np.float32)) == bits(parts["values"].reshape(48, 96))


@pytest.mark.parametrize(
    "change, why",
    [
        ({"shape": [24, 193]}, "two to a byte"),
        ({"shape": [2**39, 2**39]}, "two to a byte"),
        ({"shape": "x"}, "has the shape"),
        ({"blocksize": 0}, "blocks of 0"),
        ({"blocksize": 128}, "should have 36 values"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_states_of_nf4_that_lie_are_refused(shared, change, why):
    arrays = recorded(shared, "bitsandbytes.safetensors")
    parts = {k.split("|")[1]: v for k, v in arrays.items() if k.startswith("nf4|")}
    state = "weight.quant_state.bitsandbytes__nf4"
    values = json.loads(parts[state].tobytes()) | change
    parts[state] = np.frombuffer(json.dumps(values).encode(), np.uint8)
    with pytest.raises(ValueError, match=why):
        unquantised(lazy({k: v for k, v in parts.items() if k != "values"}))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_all_codes_of_fp8(shared, name):
    floats = recorded(shared, "floats8.safetensors")
    dtype = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    values = floats[f"{name}|codes"].view(dtype).astype(np.float32)
    np.testing.assert_array_equal(values, floats[f"{name}|values"])


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_fp8(shared, spelling):
    floats = recorded(shared, "floats8.safetensors")
    codes = floats["scaled|codes"].view(ml_dtypes.float8_e4m3fn)
    raw = {"a.weight": codes, f"a.{spelling}": floats["scaled|scale_weight"]}
    weight = dequantise(unquantised(lazy(raw)))[0]["a.weight"]
    expected = floats["scaled|values"]
    assert bits(weight.read()) == bits(expected.astype(ml_dtypes.bfloat16))
    assert weight.packed is not None
    from fluxjax.checkpoint.tensors import unpacked

    assert bits(unpacked(weight.packed).read()) == bits(expected)


@pytest.mark.parametrize(
    "scales, why",
    [
        ({"a.scale_weight": 1, "a.weight_scale": 1}, "a.weight has a scale_weight and a weight_sc"),
        ({"a.scale_weight": 3}, r"the scale \[3\] of a.weight \[4, 8\] does not fit"),
        ({"b.weight_scale": 1}, "b.weight, which the file does not hold"),
        ({"a.scale_weight": 1, "b.scale_input": 1}, "b.weight, which the file does not hold"),
    ],
)
def test_scales_of_fp8_that_do_not_fit_are_refused(scales, why):
    codes = np.zeros((4, 8), ml_dtypes.float8_e4m3fn)
    arrays = {name: np.ones(count, np.float32) for name, count in scales.items()}
    with pytest.raises(ValueError, match=why):
        dequantise(unquantised(lazy({"a.weight": codes} | arrays)))


def test_codes_without_their_scale_are_not_taken_for_values(tmp_path):
    marked = {
        "a.weight": np.zeros((4, 8), ml_dtypes.float8_e4m3fn),
        "a.comfy_quant": marker(format="float8_e4m3fn"),
    }
    with pytest.raises(ValueError, match=r"'a\.weight' is said to be scaled, and its scale is mis"):
        dequantise(unquantised(lazy(marked)))
    arrays = bfl_arrays(HEADS, np.float16)
    name = "single_blocks.0.linear2.weight"
    arrays[name] = np.ones(arrays[name].shape, np.int8)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, lazy(arrays))
    with pytest.raises(
        ConfigError, match=r"whole numbers, .*:\n  single_.*proj_out.weight int8 \["
    ):
        open_file(path)


def int8(rng, rows=8, columns=512):
    codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    return codes, (rng.random((rows, 1)) * 0.01 + 0.001).astype(np.float32)


def marker(**values):
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def test_int8_of_comfyui_torchao_and_quanto():
    codes, scale = int8(np.random.default_rng(0))
    expected = codes.astype(np.float32) * scale
    forms = {
        "comfyui": {
            "a.weight": codes,
            "a.weight_scale": scale,
            "a.input_scale": np.ones((), "f"),
            "a.comfy_quant": marker(format="int8_tensorwise"),
        },
        "torchao": {
            "a._weight_qdata": codes,
            "a._weight_scale": scale,
            "a._weight_zero_point": np.zeros((8, 1), np.int8),
        },
        "quanto": {
            "a.weight._data": codes,
            "a.weight._scale": scale,
            "a.input_scale": np.ones((), "f"),
            "a.output_scale": np.ones((), "f"),
            "norm.input_scale": np.ones((), "f"),  # where activations are quantised
            "norm.output_scale": np.ones((), "f"),
        },
    }
    for form, arrays in forms.items():
        plain = unquantised(lazy(arrays))
        assert plain.keys() == {"a.weight"}, form
        assert bits(plain["a.weight"].read()) == bits(expected), form
        assert bits(plain["a.weight"].rows(2, 5)) == bits(expected[2:5]), form
        assert plain["a.weight"].packed.kind == "int8", form
    one = {"a.weight": codes, "a.weight_scale": scale[0, 0]}
    assert bits(unquantised(lazy(one))["a.weight"].read()) == bits(codes * scale[0, 0])


def test_a_zero_point_counts():
    codes, scale = int8(np.random.default_rng(0))
    zero = np.arange(8, dtype=np.int8)[:, None]
    raw = {"a._weight_qdata": codes, "a._weight_scale": scale, "a._weight_zero_point": zero}
    expected = (codes.astype(np.float32) - zero) * scale
    assert bits(unquantised(lazy(raw))["a.weight"].read()) == bits(expected)


def test_classes_of_pytorch_scale_rows_groups_and_convolutions():
    """One scale for each group of columns (torchao's IntxUnpackedToInt8Tensor); quanto quantises
    the convolutions of UNets and autoencoders too. Scales of columns are not taken for rows'."""
    rng = np.random.default_rng(0)
    codes, _ = int8(rng, 8, 64)
    groups, zeros = rng.random((8, 2)).astype(np.float32), rng.integers(-3, 4, (8, 2))
    raw = {"a._weight_qdata": codes, "a._weight_scale": groups}
    scales, shifts = (np.repeat(each, 32, axis=1) for each in (groups, zeros.astype(np.float32)))
    for zero, expected in (
        (0 * zeros, codes.astype(np.float32) * scales),
        (zeros, (codes.astype(np.float32) - shifts) * scales),
    ):
        read = unquantised(lazy({**raw, "a._weight_zero_point": zero.astype(np.int8)}))
        assert read.keys() == {"a.weight"}
        assert bits(read["a.weight"].read()) == bits(expected)
        assert bits(read["a.weight"].rows(3, 5)) == bits(expected[3:5])
    kernel = codes.reshape(8, 4, 4, 4)
    for scale in (groups[:, :1].reshape(8, 1, 1, 1), groups[:1, :1].reshape(())):
        read = unquantised(lazy({"a.weight._data": kernel, "a.weight._scale": scale}))["a.weight"]
        assert bits(read.read()) == bits(kernel.astype(np.float32) * scale)
        assert bits(read.rows(3, 5)) == bits(read.read()[3:5])
    square = codes[:, :8]
    for names in (("a.weight._data", "a.weight._scale"), ("a._weight_qdata", "a._weight_scale")):
        for scale in (np.ones((1, 8), "f"), np.ones((4, 2), "f"), np.ones(0, "f")):
            with pytest.raises(ValueError, match=r"scale .* does not fit .*: one scale, or"):
                unquantised(lazy(dict(zip(names, (square, scale), strict=True))))
        with pytest.raises(ValueError, match="scale is bool, and should be of floats"):
            unquantised(lazy(dict(zip(names, (square, np.ones(8, bool)), strict=True))))


def test_fp8_of_quanto_and_of_each_row():
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((8, 64)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.random((8, 1)).astype(np.float32)
    expected = codes.astype(np.float32) * scale
    quanto = unquantised(lazy({"a.weight._data": codes, "a.weight._scale": scale}))
    assert bits(quanto["a.weight"].read()) == bits(expected)
    rows = dequantise(lazy({"a.weight": codes, "a.weight_scale": scale}))[0]["a.weight"]
    assert bits(rows.read()) == bits(expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("size", [16, 256])
def test_rotated_weights_are_rotated_back(size):
    """The rotation written out as the Kronecker power that it is defined by."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 512)).astype(np.float32)
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    turn = four
    while len(turn) < size:
        turn = np.kron(turn, four)
    assert np.allclose(turn @ turn, np.eye(size)) and np.allclose(hadamard(size), turn)
    rotated = np.concatenate([weight[:, i : i + size] @ turn for i in range(0, 512, size)], 1)
    scale = (np.abs(rotated).max(1, keepdims=True) / 127).astype(np.float32)
    form = marker(format="int8_tensorwise", convrot=True, convrot_groupsize=size)
    codes = np.rint(rotated / scale).astype(np.int8)
    raw = {"a.weight": codes, "a.weight_scale": scale, "a.comfy_quant": form}
    read = unquantised(lazy(raw))["a.weight"]
    assert np.linalg.norm(read.read() - weight) / np.linalg.norm(weight) < 0.01
    np.testing.assert_allclose(read.rows(2, 4), read.read()[2:4], atol=1e-6)


def tiled(scales):
    """cuBLAS' order: tiles of 128 x 4; in one, (r, c) is at (r % 32) 16 + (r // 32) 4 + c."""
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    out = np.zeros(rows * columns, scales.dtype)
    for (r, c), value in np.ndenumerate(scales):
        tile = (r // 128) * (columns // 4) + c // 4
        out[512 * tile + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = value
    return out.reshape(rows, columns)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def layers_in_metadata(*names, **form):
    return {
        METADATA_KEY: json.dumps({"format_version": "1.0", "layers": dict.fromkeys(names, form)})
    }


@pytest.mark.parametrize("marked", ["layer", "a", "model.diffusion_model.a", ""])
@pytest.mark.parametrize("rows, columns", [(160, 96), (128, 64)])
def test_nvfp4(marked, rows, columns):
    """Marked by a tensor, or by metadata that name the layer as the file does or otherwise."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
    scales = rng.random((rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
    factors = scales.astype(np.float32) * np.float32(0.3)
    expected = E2M1[codes].reshape(rows, -1, 16) * factors[..., None]
    even, odd = codes[:, ::2], codes[:, 1::2]
    raw = {
        "a.weight": even << 4 | odd if marked else even | odd << 4,
        "a.weight_scale": tiled(scales) if marked else scales,
        "a.weight_scale_2": np.float32([0.3]).reshape(()),
    }
    if marked == "layer":
        raw["a.comfy_quant"] = marker(format="nvfp4")
    told = layers_in_metadata(marked, "gone", format="nvfp4") if marked not in ("layer", "") else {}
    whole = with_markers(lazy(raw), told)
    if not marked and rows == 128:
        with pytest.raises(ValueError, match=r"a\.weight_scale \[128, 4\] may lie in rows or in"):
            unquantised(whole)
        return
    read = unquantised(whole)["a.weight"]
    assert bits(read.read()) == bits(expected.reshape(rows, columns))
    assert bits(read.rows(5, 9)) == bits(expected.reshape(rows, columns)[5:9])


def test_metadata_of_other_layers_are_refused(tmp_path):
    """And those of a folder's files are heeded."""
    raw = lazy({"a.weight": np.zeros((4, 8), np.int8), "a.weight_scale": np.ones(1, np.float32)})
    path = tmp_path / "model.safetensors"
    for layer, why in (("net.a", "1 .* missing:\n  net.a$"), ("a", "which is not read")):
        write_safetensors(path, raw, layers_in_metadata(layer, format="int3"))
        for opened in (path, tmp_path):
            with pytest.raises(ValueError, match=why):
                open_file(opened) if opened is path else open_folder(opened)


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.float8_e8m0fnu])
def test_mxfp8(dtype):
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((160, 96)).astype(ml_dtypes.float8_e4m3fn)
    exponents = rng.integers(120, 130, (160, 3)).astype(np.uint8)
    factors = 2.0 ** (exponents.astype(np.float32) - 127)
    expected = (codes.astype(np.float32).reshape(160, 3, 32) * factors[..., None]).reshape(160, 96)
    for scale, extra in (
        (exponents, {}),
        (tiled(exponents), {"a.comfy_quant": marker(format="mxfp8")}),
    ):
        raw = {"a.weight": codes, "a.weight_scale": scale.view(dtype), **extra}
        assert bits(unquantised(lazy(raw))["a.weight"].read()) == bits(expected.astype(np.float32))


@pytest.mark.parametrize(
    "arrays, why",
    [
        ({"a.comfy_quant": marker(format="asym_w4a8_int8")}, "asym_w4a8_int8"),
        ({"a.comfy_quant": marker(format=None)}, "None"),
        ({"a.comfy_quant": np.frombuffer(b"{", np.uint8)}, "damaged"),
        ({"a.comfy_quant": marker(format="nvfp4")}, "not a matrix of uint8"),
        (
            {"a.comfy_quant": marker(format="int8_tensorwise", convrot=1, convrot_groupsize=100)},
            "100",
        ),
        ({"a.weight_scale": np.ones((3, 1), np.float32)}, "does not fit"),
        ({"a.SCB": np.ones(3, np.float32)}, "does not scale"),
        ({"a.weight_format": np.uint8([2]), "a.SCB": np.ones(8, "f")}, "only old GPUs"),
    ],
)
def test_layers_that_do_not_fit_are_refused(arrays, why):
    codes, scale = int8(np.random.default_rng(0))
    with pytest.raises(ValueError, match=why):
        unquantised(lazy({"a.weight": codes, "a.weight_scale": scale} | arrays))


@pytest.mark.parametrize(
    "names, why",
    [
        (("blocks.0.qkv.qweight", "blocks.0.qkv.wscales", "blocks.0.qkv.lora_down"), "nunchaku"),
        (("a.qweight", "a.qzeros", "a.scales"), "GPTQ"),
    ],
)
def test_packed_for_kernels_is_refused_by_name(tmp_path, names, why):
    write_safetensors(
        tmp_path / "x.safetensors", lazy(dict.fromkeys(names, np.zeros((2, 2), "i1")))
    )
    with pytest.raises(ValueError, match=why):
        open_file(tmp_path / "x.safetensors")


def tiny_config(shared, name):
    c = json.loads((shared / f"goldens/quantised/{name}.json").read_text())["config"]
    return FluxConfig(
        num_layers=c["double"],
        num_single_layers=c["single"],
        attention_head_dim=c["head_dim"],
        num_attention_heads=c["heads"],
        joint_attention_dim=c["context"],
        pooled_projection_dim=c["pooled"],
        axes_dims_rope=(8, 12, 12),
    )


@pytest.fixture(scope="module", params=["tiny_flux_q8_0", "tiny_flux_q4_k"])
def tiny(request, shared):
    path = shared / f"goldens/quantised/{request.param}.gguf"
    return path, tiny_config(shared, request.param)


def test_every_weight_of_a_gguf_file(shared, tiny):
    path, _ = tiny
    expected = recorded(shared, f"{path.stem}_weights.safetensors")
    tensors = read_gguf(path)[0]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        flat = tensor.read().astype(np.float64).reshape(-1)
        head = [flat.sum(), (flat**2).sum(), np.abs(flat).max()]
        summary = np.float32([*head, *flat[:: max(1, len(flat) // 64)][:64]])
        np.testing.assert_allclose(summary, expected[name], rtol=1e-6, err_msg=name)


def test_what_a_gguf_file_does_not_tell_is_asked_for(tiny, tmp_path):
    path, config = tiny
    with pytest.raises(ConfigError, match=r"heads of 32.*config\.json"):
        open_source(path)
    write_json(tmp_path / "config.json", config_json(config))
    assert open_source(path, tmp_path / "config.json")["transformer"].config == config


def test_the_forward_of_a_gguf_file(shared, tiny):
    import jax

    path, config = tiny
    arrays = recorded(shared, f"{path.stem}_forward.safetensors")
    expected = arrays.pop("output")
    network = open_file(path, config)["transformer"]
    params = network.params(stacked=False, dtype=np.float32)
    ours = network_of(config).build(config)
    got = jax.jit(lambda p, a: ours.apply({"params": p}, **a))(params, arrays)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 2e-6


HEADS = FluxConfig(
    num_layers=1,
    num_single_layers=1,
    num_attention_heads=1,
    joint_attention_dim=32,
    pooled_projection_dim=64,
)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
def test_a_prefix_of_all_names_is_none(tmp_path, prefix):
    arrays = hf_arrays(HEADS, np.float16)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, lazy({prefix + name: array for name, array in arrays.items()}))
    (network,) = open_source(path).values()
    assert network.config == HEADS and network.component == "transformer"


@pytest.mark.parametrize("shape", [(64, 128), (256, 64), (), (128,), (0, 64), (128, 0)])
@pytest.mark.parametrize("name", ["img_in", "txt_in"])
def test_a_first_layer_of_another_width_is_named(tmp_path, name, shape):
    arrays = bfl_arrays(HEADS, np.float16) | {f"{name}.weight": np.zeros(shape, np.float16)}
    path = tmp_path / "flux1-x.safetensors"
    write_safetensors(path, lazy(arrays))
    why = rf"x\.safetensors: {name}\.weight is {re.escape(str(list(shape)))}, and should be \[128,"
    with pytest.raises(ConfigError, match=why):
        open_file(path)


def test_a_shape_that_no_size_can_be_read_from_is_named(tmp_path):
    name = "double_blocks.0.img_mlp.2.weight"
    arrays = bfl_arrays(HEADS, np.float16) | {name: np.zeros(5, np.float16)}
    path = tmp_path / "flux1-x.safetensors"
    write_safetensors(path, lazy(arrays))
    with pytest.raises(
        ConfigError, match=rf"{re.escape(name)} \[5\]: one of these cannot be right"
    ):
        open_file(path)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_sizes_of_a_gguf_file_are_told_by_its_shapes(tmp_path, prefix):
    arrays = bfl_arrays(HEADS, np.float16)
    tensors = {prefix + name: (1, a.shape, a.tobytes()) for name, a in arrays.items()}
    architecture = key("general.architecture", 8, text("flux"))
    long = key("tokens", 9, struct.pack("<IQ", 8, 100) + text("a") * 100)
    (tmp_path / "flux1-x.gguf").write_bytes(gguf_bytes(tensors, [architecture, long]))
    for path in (tmp_path / "flux1-x.gguf", tmp_path):  # the file, and a folder with it
        network = open_source(path)["transformer"]
        assert network.config == HEADS and network.dialect == "bfl"
        query = network.tensors["transformer_blocks.0.attn.to_k.weight"].read()
        assert bits(query) == bits(arrays["double_blocks.0.img_attn.qkv.weight"][128:256])


def test_t5_of_gguf(tmp_path):
    config = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    arrays = hf_arrays(config, np.float16)
    names = {
        "SelfAttention.relative_attention_bias": "attn_rel_b",
        "0.layer_norm": "attn_norm",
        "1.layer_norm": "ffn_norm",
        "wi_0": "ffn_gate",
        "wi_1": "ffn_up",
        "wo": "ffn_down",
        **{f"SelfAttention.{x}": f"attn_{x}" for x in "qkvo"},
    }
    theirs = {
        "shared.weight": "token_embd.weight",
        "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    }
    for name in arrays.keys() - theirs.keys():
        part = next(new for old, new in names.items() if name.endswith(f"{old}.weight"))
        theirs[name] = f"enc.blk.{name.split('.')[2]}.{part}.weight"
    tensors = {theirs[name]: (1, a.shape, a.tobytes()) for name, a in arrays.items()}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(tensors))
    network = open_source(tmp_path / "x.gguf")["text_encoder_2"]
    assert network.config == config and network.tensors.keys() == arrays.keys()
    for name, tensor in network.tensors.items():
        assert bits(tensor.read()) == bits(arrays[name]), name


def test_language_model_of_gguf(tmp_path):
    """llama.cpp rotates neighbouring channels of a head, and so writes q and k in that order."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        stops_after=2,
    )
    arrays = hf_arrays(replace(config, stops_after=None), np.float16)
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    tensors = {"rope_freqs.weight": (0, (4,), bytes(16)), "output.weight": (1, (1,), bytes(2))}
    for name, array in arrays.items():
        theirs = {"embed_tokens.weight": "token_embd", "norm.weight": "output_norm"}.get(name)
        if theirs is None:
            layer, part = name.removeprefix("layers.").removesuffix(".weight").split(".", 1)
            theirs = f"blk.{layer}.{parts[part]}"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                array = array.reshape(-1, 2, 4, 32).swapaxes(1, 2).reshape(array.shape)
        tensors[f"{theirs}.weight"] = (1, array.shape, array.tobytes())
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(tensors))
    network = open_file(tmp_path / "x.gguf", config)["text_encoder"]
    assert network.tensors.keys() == {
        n for n in arrays if "layers.2" not in n and n != "norm.weight"
    }
    for name, tensor in network.tensors.items():
        assert bits(tensor.read()) == bits(arrays[name]), name
    with pytest.raises(ConfigError, match="3 layers of width 32, cannot be told from shapes"):
        open_file(tmp_path / "x.gguf")
    at_size = {"token_embd.weight": (128320, 4096), "blk.31.attn_q.weight": (4096, 4096)}
    found = network_of(LLAMA3_8B).dialect("gguf").infer(at_size, "")
    assert found == replace(LLAMA3_8B, stops_after=None)


def whole(kind=0, shape=(2, 8), offset=0, name="x", data=b"\0" * 64, keys=(), tensors=1, **header):
    start = b"GGUF" + struct.pack("<IQQ", header.get("version", 3), tensors, len(keys))
    start += b"".join(keys) + info(name, shape, kind, offset)
    return start + bytes(-len(start) % 32) + data


HOSTILE = {
    "empty": (b"", "cut short"),
    "another format": (b"GGML" + bytes(100), "does not begin with GGUF"),
    "version 1": (whole(version=1), "version is 1"),
    "big-endian": (whole(version=3 << 24), "big-endian"),
    "2**63 tensors": (whole(tensors=2**63), "of at most"),
    "more tensors than are there": (whole(tensors=99_999), "cut short|characters"),
    "2**60 key-values": (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60), "of at most"),
    "a name of 2**62 bytes": (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 2**62), "cut short"),
    "a long name": (whole(name="x" * 2000), "unprintable|more than"),
    "a text of 2**40 bytes": (whole(keys=[key("a", 8, struct.pack("<Q", 2**40))]), "cut short"),
    "an array of 2**50 texts": (
        whole(keys=[key("a", 9, struct.pack("<IQ", 8, 2**50))]),
        "more than .* items",
    ),
    "an array of 2**60 numbers": (
        whole(keys=[key("a", 9, struct.pack("<IQ", 10, 2**60))]),
        "cut short",
    ),
    "arrays in arrays": (whole(keys=[key("a", 9, struct.pack("<IQ", 9, 1))]), "unknown type 9"),
    "an unknown value": (whole(keys=[key("a", 77, b"")]), "unknown type 77"),
    "a key twice": (whole(keys=[key("a", 0, b"1")] * 2), "twice"),
    "alignment 0": (whole(keys=[key("general.alignment", 4, struct.pack("<I", 0))]), "alignment 0"),
    "alignment 48": (
        whole(keys=[key("general.alignment", 4, struct.pack("<I", 48))]),
        "alignment 48",
    ),
    "alignment of letters": (whole(keys=[key("general.alignment", 8, text("x"))]), "alignment"),
    "nine axes": (whole(shape=(1,) * 9), "9 axes"),
    "2**62 values": (whole(shape=(2**31, 2**31)), "has the shape"),
    "2**64 values": (whole(shape=(2**40, 2**24)), "has the shape"),
    "no value": (whole(shape=(0, 2**63)), "has the shape"),
    "a type that is not read": (whole(kind=16), "IQ2_XXS, which is not read"),
    "a type that is unknown": (whole(kind=1000), "number 1000"),
    "half a block": (whole(kind=12, shape=(2, 128)), "no whole number of Q4_K blocks"),
    "beyond the end": (whole(shape=(2, 9)), "ends at byte"),
    "an offset of 2**63": (whole(offset=2**63), "ends at byte"),
    "an offset between": (whole(offset=1), "not a multiple of 32"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf_is_refused(tmp_path, name):
    data, why = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=why) as error:
        open_file(tmp_path / "x.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(tmp_path / "x.gguf") in str(error.value) and peak < 2**22


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="is not a file"):
        open_file(tmp_path / "x.gguf")


def test_gguf_tensors_that_overlap_or_share_a_name_are_refused(tmp_path):
    for names, offsets, why in (("ab", (0, 32), "overlaps"), ("aa", (0, 64), "one name")):
        start = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
        for name, offset in zip(names, offsets, strict=True):
            start += info(name, (2, 8), 0, offset)
        (tmp_path / "x.gguf").write_bytes(start + bytes(-len(start) % 32) + bytes(128))
        with pytest.raises(ValueError, match=why):
            read_gguf(tmp_path / "x.gguf")


def test_a_shape_that_was_flattened_is_restored(tmp_path):
    values = np.arange(64, dtype=np.float32).reshape(2, 8, 2, 2)
    shape = key("comfy.gguf.orig_shape.x", 9, struct.pack("<IQ4i", 5, 4, 2, 8, 2, 2))
    data = gguf_bytes({"x": (0, (64,), values.tobytes())}, [shape])
    (tmp_path / "x.gguf").write_bytes(data)
    assert bits(read_gguf(tmp_path / "x.gguf")[0]["x"].read()) == bits(values)
    wrong = key("comfy.gguf.orig_shape.x", 9, struct.pack("<IQ2i", 5, 2, 2, 33))
    (tmp_path / "x.gguf").write_bytes(gguf_bytes({"x": (0, (64,), values.tobytes())}, [wrong]))
    with pytest.raises(ValueError, match="original shape"):
        read_gguf(tmp_path / "x.gguf")


def test_a_gguf_file_becomes_a_plain_folder(tmp_path, tiny):
    """Through the command; the values are those that the file stands for, in float32."""
    path, config = tiny
    write_json(tmp_path / "config.json", config_json(config))
    out, command = tmp_path / "out", ["--config", str(tmp_path / "config.json")]
    assert convert_command([str(path), str(out), *command]) == 0
    folder, file = open_source(out)["transformer"], open_source(path, tmp_path / "config.json")
    assert folder.config == config
    for name, tensor in file["transformer"].tensors.items():
        assert bits(folder.tensors[name].read()) == bits(tensor.read()), name


def test_a_folder_of_nf4_becomes_plain_and_says_so_no_more(tmp_path):
    """diffusers would look for the codes where config.json names a quantisation."""
    folder = nf4_folder(tmp_path / "nf4")
    assert convert_command([str(folder), str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in values and values["_class_name"]
    source, written = (
        open_source(folder)["transformer"],
        open_source(tmp_path / "out")["transformer"],
    )
    for name, tensor in source.tensors.items():
        assert bits(written.tensors[name].read()) == bits(tensor.read()), name


def nf4_folder(folder):
    """A transformer of which one layer is nf4, as diffusers saves one."""
    arrays = hf_arrays(HEADS, ml_dtypes.bfloat16)
    name = "transformer_blocks.0.ff.net.2.weight"
    rows, columns = arrays[name].shape
    rng = np.random.default_rng(0)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    arrays |= {
        name: rng.integers(0, 256, (rows * columns // 2, 1)).astype(np.uint8),
        f"{name}.absmax": rng.random(rows * columns // 64).astype(np.float32),
        f"{name}.quant_map": np.asarray(NF4, np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": marker(**state),
    }
    folder.mkdir()
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", lazy(arrays))
    values = config_json(HEADS) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    write_json(folder / "config.json", values)
    return folder
