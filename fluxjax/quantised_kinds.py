"""What weights can be quantised to.

KINDS by `fluxjax.convert --quantise` and by loading, DYNAMIC by loading alone.
"""

from __future__ import annotations

KINDS = ("int8", "fp8", "nf4", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0")
DYNAMIC = {"int8_dynamic": "int8", "fp8_dynamic": "fp8"}
"""Kinds whose products round the activations too -> the kind of their codes."""
LOADED = (*KINDS, *DYNAMIC)
KEEP, NONE = "keep", "none"
"""Of weights that are loaded: in the codes that their file has, or as values."""
