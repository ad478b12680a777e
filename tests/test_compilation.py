"""The compiler options reach the compiler."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from fluxjax.models import compilation
from fluxjax.models.compilation import compiler_options
from fluxjax.models.products import BFLOAT16


def test_matrix_products_go_to_eigen_on_a_cpu():
    if jax.default_backend() != "cpu":
        assert compiler_options() == {}
        pytest.skip("the options are for CPUs")
    assert compiler_options(BFLOAT16) == {}, "YNNPACK has the instructions for them"
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
