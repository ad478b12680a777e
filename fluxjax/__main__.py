"""The command `fluxjax`, or `python -m fluxjax`: what each verb does, and completion for shells."""

from __future__ import annotations

import sys

from fluxjax import cli

VERBS = {
    "sample": "draw pictures from a prompt",
    "train": "train a LoRA or a whole model by a recipe",
    "convert": "BFL, diffusers and Orbax checkpoints into each other",
    "diff": "compare with PyTorch: recorded outputs, layer by layer, speed",
    "plan": "does a model fit on these devices, and how fast can it be?",
}
USAGE = f"""usage: fluxjax VERB ...

FLUX image models in JAX.

{chr(10).join(f"  {verb:11}{what}" for verb, what in VERBS.items())}
  completion bash | zsh | tcsh: print the script that completes this command

  --version  print the version

fluxjax VERB --help lists the verb's options. Every verb is also a module:
python -m fluxjax.sample ..."""


def main() -> int | None:
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if verb == "completion":
        from fluxjax.completion import print_completion

        print_completion(rest)
        return 0
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, [*VERBS, "completion"], 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        prompt = f'; to draw it: fluxjax sample "{verb}"' if " " in verb else ""
        raise ValueError(f"{verb!r} is none of {', '.join(VERBS)}, completion{meant}{prompt}")
    from importlib import import_module

    return import_module(f"fluxjax.{verb}.__main__").main(rest, f"fluxjax {verb}")


def command() -> None:
    """The console script."""
    cli.run(main)


if __name__ == "__main__":
    command()
