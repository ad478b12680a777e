"""What is in a checkpoint, without loading it; with a second one, whether both hold the same bits.

usage: tensors.py CHECKPOINT [OTHER]
"""

import sys
from pathlib import Path

from fluxjax.checkpoint.detect import describe
from fluxjax.checkpoint.source import open_source

checkpoint = open_source(Path(sys.argv[1]))
for name, network in checkpoint.items():
    print(f"{name}: {describe(network.config)}, {len(network.tensors)} tensors")
    # network.params(stacked=True, dtype="bfloat16") reads them as JAX arrays for our modules.

if len(sys.argv) > 2:
    other = open_source(Path(sys.argv[2]))
    for name, network in checkpoint.items():
        for key, tensor in network.tensors.items():
            if tensor.read().tobytes() != other[name].tensors[key].read().tobytes():
                sys.exit(f"{name}: {key} differs")
    print("the same bits")
