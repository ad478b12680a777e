"""The legend of dimension names in array annotations.

    b       batch                           image   image (latent) tokens
    l       sequence                        text    text tokens
    d       width of a network              joint   width of the T5 states
    heads   attention heads                 pooled  width of the pooled CLIP state
    k       width of one head               layers  blocks of one kind
    half    pairs of one head, k / 2        steps   denoising steps
    h w c   rows, columns, channels (pictures and latents are NHWC inside the networks)

Sequences are (b, l, d) and attention operands (b, l, heads, k). The joint sequence of FLUX is text
first: l = text + image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Params = Mapping[str, Any]
"""Nested dictionaries of parameters, without the outer "params"."""
