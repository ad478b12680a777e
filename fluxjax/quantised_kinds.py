"""What weights can be quantised to, by loading and by `fluxjax.convert --quantise`."""

from __future__ import annotations

KINDS = ("int8", "fp8", "nf4", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0")
KEEP, NONE = "keep", "none"
"""Of weights that are loaded: in the codes that their file has, or as values."""
