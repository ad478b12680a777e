"""python -m fluxjax.sample PROMPT"""

import os

from fluxjax.cli import run


def main() -> int:
    # XLA reports on its cached programs and on every fallback; a user has asked for a picture.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tyro

    from fluxjax.sample.command import Options, draw

    return draw(tyro.cli(Options, prog="python -m fluxjax.sample"))


if __name__ == "__main__":
    run(main)
