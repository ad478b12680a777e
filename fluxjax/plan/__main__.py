"""python -m fluxjax.plan MODEL"""

import os

from fluxjax.cli import run


def main() -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax
    import tyro

    from fluxjax.plan.command import plan
    from fluxjax.plan.options import Options, device_count

    options = tyro.cli(Options, prog="python -m fluxjax.plan")
    # No backend is up yet: the plan's devices are simulated, whatever this machine has.
    count = device_count(options)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    jax.config.update("jax_platforms", "cpu")
    return plan(options)


if __name__ == "__main__":
    run(main)
