"""What a file that is no safetensors file really is, from its first bytes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
_USE_SAFETENSORS = "use the .safetensors file of the same model"
_STARTS = (
    (b"GGUF", "it is a GGUF file: give it the ending .gguf"),
    (
        b"PK\x03\x04",
        f"it is a zip archive, such as torch.save writes, with pickles: {_USE_SAFETENSORS}",
    ),
    (
        b"version https://git-lfs",
        "it is only a Git LFS pointer: fetch the file itself with 'git lfs pull'",
    ),
    (b"\x89HDF", f"it is an HDF5 file, which is not read: {_USE_SAFETENSORS}"),
    (b"\x1f\x8b", "it is packed with gzip: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is packed with zstd: unpack it first"),
    (b"\x89PNG", "it is a PNG picture"),
    (b"\xff\xd8\xff", "it is a JPEG picture"),
    (b"\x93NUMPY", f"it is a numpy array, which is not read: {_USE_SAFETENSORS}"),
)


def pickle_refusal(path: Path) -> str:
    """With the line that saves its tensors: original files keep them under a name of their own."""
    source, saved = json.dumps(str(path)), json.dumps(str(path.with_suffix(".safetensors")))
    save = (
        f"import torch, safetensors.torch as s; t = torch.load({source}, weights_only=True); "
        't = t.get("module", t.get("state_dict", t)); '
        f"s.save_file({{k: v.contiguous() for k, v in t.items()}}, {saved})"
    )
    return (
        f"{path} is a pickle, which can run any code when it is opened, so it is refused: "
        "use the .safetensors file of the same model, or save its tensors as one where PyTorch is: "
        f"python -c {shlex.quote(save)}"
    )


def foreign_format(path: Path) -> str:
    """In words that follow a colon; "" where the first bytes tell nothing."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    for magic, what in _STARTS:
        if start.startswith(magic):
            return what
    if start[:1] == b"\x80" and start[1] in range(2, 6):
        return f"it is a pickle, which can run any code, so it is not opened: {_USE_SAFETENSORS}"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as a download that needs a login leaves: download it again"
    if text.startswith((b"{", b"[")):
        return "it is JSON text, not weights"
    if not start.strip(b"\0"):
        return "it begins with zeros, as a download that broke off leaves: download it again"
    return ""
