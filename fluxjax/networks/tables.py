"""How a checkpoint's names map onto the published names: the form of such a table.

Published names are those of diffusers (transformer, vae) and transformers (text encoders); our
parameter trees mirror them mechanically (see `checkpoint.engine`), so a checkpoint with published
names needs no rules. A rule names modules; `.weight` and `.bias` follow. `{}` stands for a number.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """One module of theirs = the rows of `ours`, one after the other.

    `swap_halves`: the two halves of the rows are exchanged. `halved_heads`: their rows are of heads
    of so many channels, in each first those that published names have at even places, then the
    others (rotary embeddings of halves, where ours rotate neighbours); `paired_heads`: the other
    way round. `pointwise`: theirs is a convolution over so many axes, (out, in, 1, 1) or
    (out, in, 1, 1, 1), where PyTorch has a linear layer (out, in). `transposed`: theirs is
    (in, out).
    `leaves`: their parameters' names -> the published ones.
    """

    theirs: str
    ours: tuple[str, ...]
    swap_halves: bool = False
    halved_heads: int = 0
    paired_heads: int = 0
    pointwise: int = 0
    transposed: bool = False
    leaves: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))


@dataclass(frozen=True)
class Table:
    """`identity`: a name that no rule matches is a published name already.

    `ignored`: regular expressions of buffers that carry no parameter.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    identity: bool = False
    ignored: tuple[str, ...] = ()
