"""The compiler options reach the compiler."""

import jax
import jax.numpy as jnp
import pytest

from fluxjax.models.compilation import compiler_options


def test_matrix_products_go_to_eigen_on_a_cpu():
    if jax.default_backend() != "cpu":
        assert compiler_options() == {}
        pytest.skip("the options are for CPUs")
    x = jnp.ones((256, 256))
    compiled = jax.jit(jnp.dot, compiler_options=compiler_options()).lower(x, x).compile()
    assert "ynn" not in compiled.as_text()
