"""One file of tensors, safetensors or GGUF."""

from __future__ import annotations

from pathlib import Path

from fluxjax.checkpoint.quantised.gguf import MAGIC, read_gguf
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.named_errors import naming


def is_gguf(path: Path) -> bool:
    """By its content, or by its name where it has none."""
    if not path.is_file():  # a pipe would be waited for
        return False
    with naming(path), open(path, "rb") as file:
        start = file.read(len(MAGIC))
    return start == MAGIC or path.suffix.lower() == ".gguf"


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(lazy tensors, metadata); raises what `read_gguf` and `read_safetensors` raise."""
    return read_gguf(path) if is_gguf(path) else read_safetensors(path)
