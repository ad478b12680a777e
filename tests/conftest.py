"""Every test: eight simulated CPU devices, no rank promotion, warnings are errors."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # On a busy machine the eight take turns, and one may wait long for the others.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # Most programs here run once or twice: compiling them well takes longer than it saves. What is
    # compiled as shipped asks for the fixture `as_shipped`; XLA_FLAGS from outside wins.
    " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    # Emitters of fusions, which JAX 0.11 has no choice about, take two to four times as long.
    + "--xla_cpu_use_fusion_emitters=false " * version("jaxlib").startswith("0.10.")
    + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Programs that several tests or their processes use are compiled once. JAX writes an entry in its
# place, where another could read half of it: workers that test beside each other have their own.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{Path(__file__).parents[1]}/.pytest_cache/jax"),
    os.environ.get("PYTEST_XDIST_WORKER", ""),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Each compiled program maps memory of its own, and Linux gives a process 65,530 mappings: a
    worker that keeps all programs of a long run dies when it compiles one more."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def as_shipped():
    """Whole programs of sampling and training are compiled with the optimisations users get."""
    from fluxjax.models.compilation import compiler_options
    from fluxjax.sample import executables
    from fluxjax.train import step

    best = {"xla_backend_optimization_level": "3", "xla_cpu_parallel_codegen_split_count": "32"}
    if version("jaxlib").startswith("0.10."):
        best |= {"xla_cpu_use_fusion_emitters": "True"}

    def options(*choices, **others):
        return compiler_options(*choices, **others) | best

    with pytest.MonkeyPatch.context() as patch:
        for module in (step, executables):
            patch.setattr(module, "compiler_options", options)
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
