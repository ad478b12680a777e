"""What is in a checkpoint, without loading it; with a second one, whether both hold the same bits.

usage: tensors.py CHECKPOINT [OTHER]
"""

import sys
from pathlib import Path

from fluxjax.checkpoint.detect import describe
from fluxjax.checkpoint.source import open_source
from fluxjax.cli import run


def main() -> int:
    if len(sys.argv) not in (2, 3):
        raise ValueError(f"give one checkpoint or two: python {sys.argv[0]} CHECKPOINT [OTHER]")
    checkpoint, *others = (open_source(Path(argument)) for argument in sys.argv[1:])
    for name, network in checkpoint.items():
        print(f"{name}: {describe(network.config)}, {len(network.tensors)} tensors")
        # network.params(stacked=True, dtype="bfloat16") reads them as JAX arrays for our modules.
    for other in others:
        tensors = {name: network.tensors for name, network in checkpoint.items()}
        if tensors.keys() != other.keys():
            print(f"they hold other networks: {', '.join(tensors)} and {', '.join(other)}")
            return 1
        for name, network in other.items():
            for key in sorted(network.tensors.keys() | tensors[name].keys()):
                sides = [side.get(key) for side in (network.tensors, tensors[name])]
                if None in sides or len({side.read().tobytes() for side in sides}) > 1:
                    print(f"{name}: {key} differs")
                    return 1
        print("the same bits")
    return 0


run(main)
