"""FLUX image models in JAX: sample, convert, train, and diff against PyTorch."""

__version__ = "0.1.0"
