"""How a network is run, by name: what options offer and modules take."""

from typing import Literal

Implementation = Literal["auto", "xla", "cudnn", "splash", "chunked"]
"""Of attention on one device."""
SequenceAttention = Literal["auto", "ulysses", "ring"]
"""Of attention over tokens that are split over devices."""
Remat = Literal["none", "dots", "full"]
"""What the backward pass computes again of each block."""
LoraNaming = Literal["peft", "kohya", "comfy"]
"""Whose names a LoRA file is written in."""
