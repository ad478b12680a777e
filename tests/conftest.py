"""Every test: eight simulated CPU devices, no rank promotion, warnings are errors."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # On a busy machine the eight take turns, and one may wait long for the others.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def quick_compiler():
    """For programs that run a few small steps: compiling them well takes longer than it saves."""
    from fluxjax.models.compilation import compiler_options
    from fluxjax.sample import executables
    from fluxjax.train import step

    options = {**compiler_options(), "xla_backend_optimization_level": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for module in (step, executables):
            patch.setattr(module, "compiler_options", lambda precision=None: options)
        yield


@pytest.fixture
def no_type_checks(monkeypatch):
    """As users run it, who have no beartype: what files hold is checked by ourselves alone."""
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded references that lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder of recorded references is missing: {SHARED}")
    return SHARED
