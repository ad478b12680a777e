"""FLUX image models in JAX: sample, convert, train, and diff against PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxjax.sample.loading import load_pipeline
    from fluxjax.sample.pipeline import Pipeline
    from fluxjax.sample.save_picture import save_clip, save_picture

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__", "load_pipeline", "save_clip", "save_picture"]

# Public name -> the module that is imported when it is first used; `import fluxjax` is light.
_LAZY = {
    "load_pipeline": "fluxjax.sample.loading",
    "Pipeline": "fluxjax.sample.pipeline",
    "save_clip": "fluxjax.sample.save_picture",
    "save_picture": "fluxjax.sample.save_picture",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'fluxjax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
