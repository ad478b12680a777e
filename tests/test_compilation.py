"""The compiler options reach the compiler."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.models import compilation
from fluxjax.models.bfloat16_products import BFLOAT16, dot_general
from fluxjax.models.compilation import compiler_options


def test_matrix_products_go_to_eigen_on_a_cpu():
    if jax.default_backend() != "cpu":
        assert compiler_options() == {}
        pytest.skip("the options are for CPUs")
    x = jnp.ones((256, 256))
    compiled = jax.jit(jnp.dot, compiler_options=compiler_options()).lower(x, x).compile()
    assert "ynn" not in compiled.as_text()


def test_threads_try_the_options_once(monkeypatch):
    if jax.default_backend() != "cpu":
        pytest.skip("the options are for CPUs")
    tried, jit = [], jax.jit

    def counted(*arguments, **options):
        tried.append(arguments)
        return jit(*arguments, **options)

    monkeypatch.setattr(jax, "jit", counted)
    compilation._eigen.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: compiler_options(), range(4)))
    assert len(tried) == 1 and found == found[:1] * 4


def test_bfloat16_products_round_the_operands_and_nothing_else():
    x, kernel, weights = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3), ((2, 5, 48), (48, 32), (2, 5, 32)), strict=True
        )
    )
    dimensions = (((2,), (0,)), ((), ()))

    def loss(x, kernel):
        return jnp.sum(dot_general(x, kernel, dimensions) * weights)

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    exact = loss(x, kernel), *jax.grad(loss, (0, 1))(x, kernel)
    with jax.default_matmul_precision(BFLOAT16):
        assert compiler_options() == {}
        ours = loss(x, kernel), *jax.grad(loss, (0, 1))(x, kernel)
    of_rounded = (
        loss(rounded(x), rounded(kernel)),
        jnp.einsum("abn,kn->abk", rounded(weights), rounded(kernel)),
        jnp.einsum("abk,abn->kn", rounded(x), rounded(weights)),
    )
    for got, wanted, other in zip(ours, of_rounded, exact, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        assert got.dtype == jnp.float32 and not np.allclose(got, other, rtol=1e-4, atol=1e-4)
