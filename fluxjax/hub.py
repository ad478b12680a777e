"""Where a model's files are: the embedded one, a path on this machine, or a name on the hub."""

from __future__ import annotations

import json
from pathlib import Path


def tiny_folder() -> Path:
    """The embedded model, trained on drawn scenes."""
    return Path(__file__).resolve().parent / "assets" / "tiny"


def size_unit(model: str) -> int:
    """The pixels that widths are multiples of, or 1 where no folder's configuration tells it.

    Light: for refusing a size before anything is imported that could open the model.
    """
    folder = tiny_folder() if model == "tiny" else Path(model)
    try:
        kind = json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"]
        config = json.loads((folder / "vae" / "config.json").read_text("utf-8"))
        halvings = len(config["block_out_channels"]) - 1
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 1
    # Tokens of FLUX are 2 x 2 latents.
    return 2 ** (halvings + 1) if str(kind).startswith("Flux") and halvings < 8 else 1
