"""Every attention equals a plain softmax, forward and backward."""

import math
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from fluxjax.models import chunked_attention as chunked
from fluxjax.models.attention import dot_product_attention, fastest
from fluxjax.models.block_attention import attend_block
from fluxjax.models.splash_attention import splash_attention


def qkv(b, length, m, heads, k, size=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((b, length, heads, k), (b, m, heads, k), (b, m, heads, k))
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q * size, k * size, v


def softmax_float64(q, k, v, bias=None, causal=False):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("blhk,bmhk->bhlm", q, k) / np.sqrt(q.shape[-1])
    logits = logits if bias is None else logits + np.asarray(bias)
    if causal:
        logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhlm,bmhk->blhk", weights / weights.sum(-1, keepdims=True), v)


# Queries that fill their chunks and queries that do not; logits within the bound, and far beyond
# it, where exp2 without the maximum would overflow.
@pytest.mark.parametrize("size", [1.0, 6.0])
@pytest.mark.parametrize(("length", "keys"), [(48, 48), (37, 41)])
def test_chunked(monkeypatch, length, keys, size):
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 16 * keys)
    monkeypatch.setattr(chunked, "_LEAST_CHUNK", 16)
    q, k, v = qkv(2, length, keys, 3, 16, size)
    assert chunked._chunking(length, keys)[1] == 3
    attend = jax.jit(partial(dot_product_attention, implementation="chunked"))
    np.testing.assert_allclose(attend(q, k, v), softmax_float64(q, k, v), atol=1e-5 * size**2)

    def loss(implementation, *args):
        out = dot_product_attention(*args, implementation=implementation)
        return jnp.sum(jnp.sin(out + jnp.arange(16.0)[None, None, None]))

    ours, plain = (jax.jit(jax.grad(partial(loss, i), (0, 1, 2))) for i in ("chunked", "xla"))
    for a, b in zip(ours(q, k, v), plain(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * size**2)


def test_chunked_at_the_sizes_it_is_for():
    q, k, v = qkv(1, 600, 600, 2, 128)
    assert chunked._chunking(600, 600) == (600, 1)
    assert chunked._chunking(1536, 1536) == (1536, 1)
    assert chunked._chunking(4608, 4608) == (512, 9)
    text = str(jax.make_jaxpr(dot_product_attention)(q, k, v))
    assert "custom_vjp" in text
    np.testing.assert_allclose(
        jax.jit(dot_product_attention)(q, k, v), softmax_float64(q, k, v), atol=1e-5
    )


def test_bias_and_causal():
    q, k, v = qkv(2, 9, 9, 3, 8)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 9, 9)), jnp.float32)
    for options in ({"bias": bias}, {"causal": True}, {"bias": bias, "causal": True}):
        np.testing.assert_allclose(
            dot_product_attention(q, k, v, **options),
            softmax_float64(q, k, v, **options),
            atol=1e-5,
        )
    with pytest.raises(ValueError, match="chunked attention takes no bias"):
        dot_product_attention(q, k, v, causal=True, implementation="chunked")


def test_bfloat16():
    q, k, v = qkv(1, 300, 300, 2, 32, dtype=jnp.bfloat16)
    for implementation in ("xla", "chunked"):
        out = dot_product_attention(q, k, v, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        expected = softmax_float64(q, k, v)
        error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
        assert error <= 1e-2


@pytest.mark.parametrize(("length", "keys"), [(128, 128), (200, 128), (100, 200)])
def test_splash_kernel_interpreted(length, keys):
    q, k, v = qkv(1, length, keys, 2, 128)
    out = splash_attention(q, k, v, None, 128**-0.5, interpret=True)
    np.testing.assert_allclose(out, softmax_float64(q, k, v), atol=1e-5)


def test_cudnn_flash_is_compiled_on_nvidia_gpus():
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU, this backend is {jax.default_backend()}")
    args = qkv(1, 1536, 1536, 24, 128, dtype=jnp.bfloat16)
    compiled = jax.jit(dot_product_attention).lower(*args).compile()
    assert "__cudnn$fmhaSoftmax" in compiled.as_text()
    np.testing.assert_allclose(
        np.asarray(compiled(*args), np.float32), softmax_float64(*args), atol=2e-2
    )


@pytest.mark.parametrize(
    ("capability", "heads_of", "kind"),
    [("9.0", 128, "cudnn"), ("8.0", 40, "cudnn"), ("8.6", 160, "xla"), ("7.5", 64, "xla")],
)
def test_auto_asks_cudnn_only_where_it_has_flash_attention(monkeypatch, capability, heads_of, kind):
    """A T4 (7.5) has none: its compiler refuses the whole program."""
    client = SimpleNamespace(platform_version="cuda 12.9")
    card = SimpleNamespace(platform="gpu", client=client, compute_capability=capability)
    monkeypatch.setattr("fluxjax.models.attention._device", lambda: card)
    q = jnp.asarray(np.zeros((1, 8, 1, heads_of)), jnp.bfloat16)
    assert fastest(q, q) == kind
    assert fastest(q.astype(jnp.float32), q) == "xla"


def test_cudnns_program_takes_key_lengths_and_writes_no_logits(monkeypatch):
    """What is lowered for NVIDIA GPUs, which needs none: forward, backward, a step of the ring."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    heads, length = 24, 118_800
    q = jax.ShapeDtypeStruct((2, length, heads, 128), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

    def attend(q, k, v, lengths):
        return dot_product_attention(q, k, v, key_lengths=lengths, implementation="cudnn")

    def gradients(q, k, v, lengths):
        total = lambda *x: attend(*x, lengths).astype(jnp.float32).sum()  # noqa: E731
        return jax.grad(total, (0, 1, 2))(q, k, v)

    block = partial(attend_block, implementation="cudnn")
    calls = (attend, ["fmhaSoftmax"]), (gradients, ["fmhaSoftmax", "fmhaSoftmaxBackward"])
    for function, names in (*calls, (block, ["fmhaSoftmax"])):
        lowered = jax.jit(function).trace(q, q, q, lengths).lower(lowering_platforms=("cuda",))
        text = lowered.as_text()
        found = re.findall(r"@__cudnn\$(\w+)\((.*?)\).*PADDING.*: \((.*)\) ->", text)
        assert [name for name, _, _ in found] == names
        # The last operands: of queries, all there are, and of keys.
        assert all(types.endswith("tensor<2xi32>, tensor<2xi32>") for _, _, types in found)
        sizes = [math.prod(map(int, shape.split("x"))) for shape in re.findall(r"<([\dx]+)x", text)]
        assert max(sizes) == math.prod(q.shape)
