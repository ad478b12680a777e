"""Weights that stay quantised on the device: the same as their values, in less memory."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fluxjax
from fluxjax.checkpoint.finite import only_finite_codes
from fluxjax.checkpoint.quantised.quantise import quantised
from fluxjax.checkpoint.source import open_component, open_source
from fluxjax.checkpoint.templates import abstract_params, quantised_template
from fluxjax.checkpoint.tensors import astype, of_array
from fluxjax.config import ConfigError
from fluxjax.convert import convert
from fluxjax.models import tiled_product
from fluxjax.models.compilation import IN_PLACE, compiler_options
from fluxjax.models.dense import Dense
from fluxjax.models.dynamic_product import _rounded_product, dynamic_product
from fluxjax.models.gguf_blocks import BLOCK_TYPES
from fluxjax.models.lora import LoraConfig, adapt, init_lora, variables
from fluxjax.models.names import flatten
from fluxjax.models.products import TILED, affine
from fluxjax.models.quantised import Quantised, abstract, decode
from fluxjax.networks import network_of
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings
from fluxjax.quantised_kinds import DYNAMIC, KINDS
from fluxjax.sample.picture_formats import read_record
from fluxjax.sample.picture_record import remembered

ASSETS = Path(fluxjax.__file__).parent / "assets" / "tiny"


SLOWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("nf4", "fp8", "q8_0", "q4_0")]


@pytest.fixture(scope="module")
def tiny():
    return open_component(ASSETS, "transformer")


@pytest.fixture(scope="module")
def forward(tiny):
    """The embedded transformer's, its blocks scanned."""
    module = network_of(tiny.config).build(tiny.config, scan_layers=True)
    inputs = network_of(tiny.config).inputs(tiny.config)

    @jax.jit
    def run(params, inputs):
        return module.apply(variables(params), **inputs)

    return lambda params: np.asarray(run(params, inputs))


@pytest.mark.parametrize("kind", ["int8", *SLOWER])
def test_codes_on_the_device_compute_what_their_values_do(tiny, forward, tmp_path, kind):
    """Against the file that `convert` writes with the same codes, its values loaded plain."""
    params = tiny.params(stacked=True, dtype=np.float32, quantise=kind)
    blocks = params["single_transformer_blocks"]
    assert isinstance(blocks["proj_mlp"]["kernel"], Quantised)
    assert not isinstance(blocks["norm"]["linear"]["kernel"], Quantised)
    values = jax.tree.map(
        lambda leaf: _kernel(leaf) if isinstance(leaf, Quantised) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Quantised),
    )
    expected = forward(values)
    assert np.linalg.norm(forward(params) - expected) <= 1e-5 * np.linalg.norm(expected)
    plain = forward(tiny.params(stacked=True, dtype=np.float32))
    error = np.linalg.norm(expected - plain) / np.linalg.norm(plain)
    assert 0.003 < error < {"int8": 0.03, "q8_0": 0.02, "fp8": 0.06}.get(kind, 0.3)


def _kernel(leaf):
    return jnp.swapaxes(decode(leaf), -1, -2)


def test_shapes_are_those_of_the_weights(tiny):
    for kind in KINDS:
        for stacked in (True, False):
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float32),
                quantised_template(
                    abstract_params(tiny.config, stacked=stacked), tiny.config, kind
                ),
            )
            if (kind, stacked) not in (("nf4", False), ("int8", True), ("q4_k", True)):
                continue
            params = tiny.params(stacked=stacked, dtype=np.float32, quantise=kind)
            assert jax.tree.structure(params) == jax.tree.structure(shapes)
            assert [x.shape for x in jax.tree.leaves(params)] == [
                x.shape for x in jax.tree.leaves(shapes)
            ]


def test_a_file_s_own_codes_are_taken(tmp_path):
    """nf4 of a folder of nf4: not decoded and made anew."""
    convert.run(convert.plan(ASSETS / "transformer", tmp_path / "nf4", quantised="nf4"))
    network = open_source(tmp_path / "nf4")["transformer"]
    name = "single_transformer_blocks.0.proj_mlp.weight"
    packed = network.tensors[name].packed
    params = network.params(stacked=False, dtype=np.float32, quantise="nf4")
    kernel = params["single_transformer_blocks_0"]["proj_mlp"]["kernel"]
    for part, tensor in packed.parts.items():
        np.testing.assert_array_equal(kernel.parts[part], tensor.read())


def test_a_lora_stays_beside(tiny, forward):
    params = tiny.params(stacked=True, dtype=np.float32, quantise="int8")
    template = abstract_params(tiny.config, stacked=True)
    lora = init_lora(jax.random.key(0), template, LoraConfig(rank=2, targets=("attn.to_q",)))
    same = forward(adapt(params, lora))
    np.testing.assert_allclose(same, forward(params), atol=1e-5)
    lora = jax.tree.map(lambda leaf: leaf + 0.05, lora)
    assert np.abs(forward(adapt(params, lora)) - same).max() > 1e-2


def test_one_layer_is_decoded_at_a_time():
    """What the compiled program holds beside its arguments does not grow with the layers."""

    def scanned(layers):
        def body(x, kernel):
            return Dense(256, use_bias=False).apply({"params": {"kernel": kernel}}, x), None

        kernels = abstract("int8", (layers, 256, 256))
        x = jax.ShapeDtypeStruct((4, 256), np.float32)
        program = jax.jit(lambda x, k: jax.lax.scan(body, x, k)[0]).lower(x, kernels).compile()
        return program.memory_analysis()

    few, many = scanned(4), scanned(32)
    assert many.argument_size_in_bytes > 7 * few.argument_size_in_bytes
    assert many.temp_size_in_bytes < few.temp_size_in_bytes + 4 * 256 * 256


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("kind", ["int8", "nf4", None])
def test_little_is_decoded_at_a_time(monkeypatch, scanned, kind):
    """Beside weights in codes or 16 bits a program holds a tile of one of them in float32.

    By default XLA converts all of them before the first product, and scanned 16 bits too.
    """
    monkeypatch.setattr(tiled_product, "TILE", 2**14)
    shape, layers = (256, 256), 8

    def compiled(precision):
        layer = Dense(256, use_bias=False, dtype=jnp.bfloat16, precision=precision)

        def body(x, kernel):
            return layer.apply({"params": {"kernel": kernel}}, x), None

        def run(x, kernels):
            if scanned:
                return jax.lax.scan(body, x, kernels)[0]
            for kernel in kernels:
                x, _ = body(x, kernel)
            return x

        def one(*layers):
            whole = (*layers, *shape)
            return abstract(kind, whole) if kind else jax.ShapeDtypeStruct(whole, jnp.bfloat16)

        kernels = one(layers) if scanned else [one() for _ in range(layers)]
        x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
        lowered = jax.jit(run).lower(x, kernels)
        program = lowered.compile(compiler_options=compiler_options(precision))
        return program.memory_analysis()

    decoded = 4 * math.prod(shape)
    tiled, plain = compiled(TILED), compiled(None)
    own = tiled.argument_size_in_bytes // layers  # of a scan's body, a layer of its own
    assert tiled.temp_size_in_bytes < decoded / 2 + scanned * own
    assert plain.temp_size_in_bytes > decoded


@pytest.mark.parametrize("kind", ["int8", "nf4", "q8_0", None])
@pytest.mark.parametrize("columns", [96, 97])
def test_tiles_compute_the_product(monkeypatch, kind, columns):
    """96 columns in three tiles of 32; 97 cannot be shared out."""
    monkeypatch.setattr(tiled_product, "TILE", 32 * 64)
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, 64)).astype(np.float32)
    values = random.normal(size=(columns, 64)).astype(np.float32)
    kernel: Any = jnp.asarray(values.T, jnp.bfloat16)
    whole = np.asarray(kernel, np.float32)
    if kind:
        made = quantised(of_array(values), kind)
        assert made is not None and made.packed is not None
        kernel = made.packed.map(lambda part: jnp.asarray(part.read()))
        whole = made.read().T
    assert tiled_product.is_large(kernel)
    y = jax.jit(tiled_product.tiled_product)(kernel, x)
    np.testing.assert_allclose(y, x @ whole, rtol=1e-5, atol=1e-5)
    parts = jax.jit(affine, static_argnames="precision")(
        (x[..., :24], x[..., 24:]), kernel, precision=TILED
    )
    np.testing.assert_allclose(parts, x @ whole, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def layer():
    """Rows, of which one is zero, and a matrix (k, n)."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 64)).astype(np.float32)
    x[1, 2] = 0
    return x, random.normal(size=(48, 64)).astype(np.float32)


def _dynamic(values, kind):
    made = quantised(of_array(values), DYNAMIC[kind])
    assert made is not None and made.packed is not None
    return Quantised(kind, made.packed.map(lambda part: jnp.asarray(part.read())).parts)


def test_int8_products_are_numpy_s(layer):
    """Exactly: codes of rows and columns, sums as integers, one multiplication for each scale."""
    x, values = layer
    kernel = _dynamic(values, "int8_dynamic")
    dense = Dense(48, use_bias=False)
    y = jax.jit(lambda k, x: dense.apply({"params": {"kernel": k}}, x))(kernel, x)
    codes, absmax = (np.asarray(kernel.parts[name]) for name in ("codes", "absmax"))
    inverse = np.float32(1 / 127)
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.where(largest > 0, largest * inverse, np.float32(1))
    rounded = np.rint(x / scale)
    sums = np.einsum("abk,nk->abn", rounded.astype(np.int32), codes.astype(np.int32))
    expected = sums.astype(np.float32) * scale * (absmax[:, 0] * inverse)
    np.testing.assert_array_equal(y, expected)
    assert np.abs(rounded).max() == 127 and not np.asarray(y)[1, 2].any()
    exact = x @ values.T
    assert 1e-3 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 2e-2


def test_fp8_products_are_of_fp8_on_cuda_and_plain_elsewhere(layer):
    x, values = layer
    kernel = _dynamic(values, "fp8_dynamic")
    run = jax.jit(dynamic_product)
    plain = x @ np.asarray(decode(kernel)).T
    np.testing.assert_allclose(run(x, kernel), plain, rtol=1e-5, atol=1e-5)
    texts = {
        platform: run.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    fp8 = r"dot_general .*: \(tensor<10x64xf8E4M3FN>, tensor<48x64xf8E4M3FN>\) -> tensor<10x48xf32>"
    found = {platform: bool(re.search(fp8, text)) for platform, text in texts.items()}
    assert found == {"cpu": False, "cuda": True, "tpu": False}
    rounded = _rounded_product(jnp.asarray(x.reshape(-1, 64)), kernel).reshape(plain.shape)
    assert 1e-3 < np.linalg.norm(rounded - plain) / np.linalg.norm(plain) < 5e-2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("int8_dynamic", "i8"), ("fp8_dynamic", "f8E4M3FN")])
def test_all_products_of_the_blocks_are_of_8_bits_on_cuda(tiny, kind, code):
    """Of the whole transformer, scanned, in the program that is lowered for NVIDIA GPUs."""
    network, template = network_of(tiny.config), tiny.template(stacked=True, quantise=kind)[0]
    module = network.build(tiny.config, scan_layers=True)
    forward = jax.jit(lambda params, inputs: module.apply(variables(params), **inputs))
    traced = forward.trace(template, network.inputs(tiny.config))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    operands = rf"\(tensor<\d+x\d+x{code}>, tensor<\d+x\d+x{code}>\)"
    leaves = jax.tree.leaves(template, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    kept = sum(isinstance(leaf, Quantised) for leaf in leaves)
    assert kept == len(re.findall(rf"dot_general .*: {operands}", text)) > 10


def test_programs_without_codes_are_the_same_to_the_letter():
    """A plain kernel is declared and used as flax's own layer does."""

    class Plain(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            shape = inputs.shape[-1], self.features
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
            bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
            x, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
            return affine(x, kernel, bias)

    x, texts = jnp.ones((2, 8)), []
    for layer in (Dense(4), Plain(4)):
        params = layer.init(jax.random.key(0), x)
        texts.append(
            jax.jit(lambda p, x, layer=layer: layer.apply(p, x)).lower(params, x).as_text()
        )
        init = jax.jit(layer.init).lower(jax.random.key(0), x).as_text()
        texts.append(init)
    assert texts[0] == texts[2] and texts[1] == texts[3]


CHOSEN: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "steps": 2,
    "max_sequence_length": 16,
    "seed": 1,
}


@pytest.fixture(scope="module")
def quantised_folder(tmp_path_factory):
    """The embedded model with transformer and T5 in int8."""
    folder = tmp_path_factory.mktemp("int8") / "model"
    convert.run(convert.plan(ASSETS, folder, quantised="int8"))
    return folder


@pytest.mark.slow
def test_quantised_files_keep_their_codes_and_draw(quantised_folder, tmp_path):
    """In their codes, or decoded: the same picture; and what it was drawn with is in its record."""
    pipe = fluxjax.load_pipeline(quantised_folder)
    kept = pipe("a red circle", **CHOSEN)[0]
    for component in ("transformer", "text_encoder_2"):
        leaves = jax.tree.leaves(pipe.params(component))
        assert any(leaf.dtype == np.int8 for leaf in leaves), component
    (encoders,) = pipe.executables.modules("encode")
    assert (
        [encoder.precision for encoder in encoders]
        == 2 * [pipe.executables.precision]
        == 2 * [TILED]
    )
    decoded = fluxjax.load_pipeline(quantised_folder, quantise="none")
    assert not any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(decoded.params("transformer")))
    values = np.asarray(decoded("a red circle", **CHOSEN)[0], np.int16)
    assert np.abs(np.asarray(kept, np.int16) - values).max() <= 1
    pipe = fluxjax.load_pipeline("tiny", quantise="transformer=nf4,text_encoder_2=int8")
    drawn = pipe("a red circle", **CHOSEN)[0]
    assert 0 < np.abs(np.asarray(drawn, np.int16) - values).mean() < 40
    record = read_record(fluxjax.save_picture(drawn, tmp_path / "picture.png"))
    assert record["quantise"] == "transformer=nf4,text_encoder_2=int8"
    assert "unrepeatable" not in record
    assert remembered(tmp_path / "picture.png").sources.quantise == record["quantise"]
    pipe = fluxjax.load_pipeline(quantised_folder, quantise="transformer=int8_dynamic")
    drawn = np.asarray(pipe("a red circle", **CHOSEN)[0], np.int16)
    assert 0 < np.abs(drawn - values).mean() < 4


def test_codes_are_split_as_their_kernels_are(tiny):
    """By rows over `tensor` and by groups of columns over `fsdp`, scales with their codes."""
    mesh = make_mesh("tensor=2,fsdp=4")
    for kind, rows, columns in (("nf4", 2, 1), ("int8", 2, 4), ("q8_0", 2, 1)):
        template, _ = tiny.template(stacked=True, quantise=kind)
        places = param_shardings(tiny.config, template, mesh)
        kernel = template["single_transformer_blocks"]["proj_mlp"]["kernel"]
        where = places["single_transformer_blocks"]["proj_mlp"]["kernel"]
        for name, part in kernel.parts.items():
            shard = where.parts[name].shard_shape(part.shape)
            width = 1 if part.shape[-1] == 1 else columns
            assert shard == (6, part.shape[1] // rows, part.shape[2] // width), (kind, name)


@pytest.mark.slow
def test_a_mesh_computes_with_codes(tiny, forward):
    """Read onto eight devices, each its part; the forward is one device's."""
    mesh = make_mesh("tensor=2,fsdp=4")
    template, _ = tiny.template(stacked=True, quantise="int8")
    places = param_shardings(tiny.config, template, mesh)
    params = tiny.fill(template, dtype=np.float32, shardings=places)
    codes = params["single_transformer_blocks"]["proj_mlp"]["kernel"].parts["codes"]
    assert codes.addressable_shards[0].data.size == codes.size // 8
    expected = forward(tiny.params(stacked=True, dtype=np.float32, quantise="int8"))
    assert np.linalg.norm(forward(params) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_layers_of_several_forms_are_decoded(tmp_path):
    """Where they are scanned they cannot be told apart; where each is by itself they keep codes."""
    tensors = {}
    network = open_component(ASSETS, "transformer")
    for name, tensor in network.tensors.items():
        kind = {"0": "int8", "1": "nf4"}.get(name.split(".")[1]) if ".proj_mlp." in name else None
        tensors[name] = quantised(tensor, kind) if kind and len(tensor.shape) == 2 else tensor
    network = replace(network, tensors=tensors)
    template, mixed = network.template(stacked=True, quantise="keep")
    assert mixed == ["single_transformer_blocks.0.proj_mlp.weight"]
    assert not any(isinstance(leaf, Quantised) for leaf in flatten(template).values())
    template, mixed = network.template(stacked=False, quantise="keep")
    assert not mixed
    kinds = {leaf.kind for leaf in flatten(template).values() if isinstance(leaf, Quantised)}
    assert kinds == {"int8", "nf4"}


def test_fp8_without_scales_is_kept(tiny):
    tensors = {
        name: astype(tensor, np.dtype(ml_dtypes.float8_e4m3fn))
        if len(tensor.shape) == 2
        else tensor
        for name, tensor in tiny.tensors.items()
    }
    network = replace(tiny, tensors=tensors)
    template, _ = network.template(stacked=True, quantise="keep")
    kernel = template["single_transformer_blocks"]["proj_mlp"]["kernel"]
    params = network.fill(template, dtype=np.float32)
    made = params["single_transformer_blocks"]["proj_mlp"]["kernel"]
    assert kernel.kind == made.kind == "fp8"
    expected = tensors["single_transformer_blocks.3.proj_mlp.weight"].read().astype(np.float32)
    np.testing.assert_array_equal(decode(made)[3], expected)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "Q6_K"])
def test_scales_of_blocks_that_are_not_finite_are_refused(kind):
    values = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    made = quantised(of_array(values), kind.lower())
    assert made is not None and made.packed is not None
    packed = made.packed
    blocks = packed.parts["blocks"].read().copy()
    assert np.array_equal(only_finite_codes(packed, "x").parts["blocks"].read(), blocks)
    size = BLOCK_TYPES[kind].size
    at = size + BLOCK_TYPES[kind].halves[-1]
    blocks[2, at : at + 2] = np.frombuffer(np.float16("inf").tobytes(), np.uint8)
    damaged = Quantised(kind, {"blocks": of_array(blocks)})
    with pytest.raises(ConfigError, match=r"x has values that are not finite .1 infinite"):
        only_finite_codes(damaged, "x").parts["blocks"].read()


def test_a_pipeline_on_one_cpu_converts_by_tiles(tiny):
    """Where there is something to convert; and dynamic products take a file's own codes."""
    for quantise, dtype, precision in (
        ("int8_dynamic", "float32", TILED),
        ("none", "bfloat16", TILED),
        ("none", "float32", None),
    ):
        executables = fluxjax.load_pipeline("tiny", quantise=quantise, dtype=dtype).executables
        module, _ = executables.modules("denoise")
        assert module.precision == executables.precision == precision
    assert "xla_cpu_scheduler_type" in compiler_options(TILED)
    assert compiler_options(TILED, integers=True).keys() == IN_PLACE.keys()
    name = "single_transformer_blocks.0.proj_mlp.weight"
    packed = quantised(tiny.tensors[name], "int8")
    assert packed is not None and packed.packed is not None

    def values(start: int, stop: int) -> np.ndarray:
        raise AssertionError("codes are not made anew")

    network = replace(tiny, tensors=tiny.tensors | {name: replace(packed, rows=values)})
    params = network.params(stacked=False, dtype=np.float32, quantise="int8_dynamic")
    kernel = params["single_transformer_blocks_0"]["proj_mlp"]["kernel"]
    assert kernel.kind == "int8_dynamic"
    np.testing.assert_array_equal(kernel.parts["codes"], packed.packed.parts["codes"].read())


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="one of int8, fp8, nf4"):
        fluxjax.load_pipeline("tiny", quantise="int3")
    with pytest.raises(ConfigError, match="quantise is for transformer, unet, text_encoder"):
        fluxjax.load_pipeline("tiny", quantise="vae=int8")
