"""Weights that stay quantised on the device: the same as their values, in less memory."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fluxjax
from fluxjax.checkpoint.source import open_component, open_source
from fluxjax.checkpoint.templates import abstract_params, quantised_template
from fluxjax.config import ConfigError
from fluxjax.convert import convert
from fluxjax.models.dense import Dense
from fluxjax.models.lora import LoraConfig, adapt, init_lora, variables
from fluxjax.models.products import affine
from fluxjax.models.quantised import KINDS, Quantised, abstract, decode
from fluxjax.networks import network_of

ASSETS = Path(fluxjax.__file__).parent / "assets" / "tiny"


SLOWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8", "q8_0", "q4_0")]


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


@pytest.mark.parametrize("kind", ["int8", "nf4", *SLOWER])
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


@pytest.mark.slow
def test_a_pipeline_draws_with_codes():
    """As with plain weights, nearly: the embedded model in int8."""
    chosen = {"width": 64, "height": 64, "steps": 4, "max_sequence_length": 16, "seed": 1}
    plain = np.asarray(fluxjax.load_pipeline("tiny")("a red circle", **chosen)[0], np.float32)
    pipe = fluxjax.load_pipeline("tiny", quantise="int8")
    drawn = np.asarray(pipe("a red circle", **chosen)[0], np.float32)
    assert 0 < np.abs(drawn - plain).mean() < 12
    kernel = pipe.params("transformer")["single_transformer_blocks_0"]["proj_mlp"]["kernel"]
    assert kernel.parts["codes"].dtype == np.int8


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="one of int8, fp8, nf4"):
        fluxjax.load_pipeline("tiny", quantise="int3")
    with pytest.raises(ConfigError, match="one device"):
        fluxjax.load_pipeline("tiny", quantise="int8", mesh="fsdp=2")
