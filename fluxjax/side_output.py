"""What a command writes beside its result: plots, sheets, recorded outputs.

Each says inside what it is, so that only a former one of its own kind is replaced: a mistyped
name costs nobody a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fluxjax.atomic_write import whole_or_nothing

Kind = Literal["plot", "sheet", "outputs"]
_SUFFIX = {"plot": ".png", "sheet": ".png", "outputs": ".safetensors"}
_WITHIN = 4096  # the first bytes of a file, in which it says what it is


def marker(kind: Kind) -> dict[str, str]:
    """To be written as a PNG's text or a safetensors file's metadata."""
    return {"Software": f"fluxjax {kind}"}


def check_side_output(path: Path, kind: Kind) -> None:
    """To be called before the work that ends in writing `path`.

    Raises ValueError for another ending than the kind's, FileNotFoundError without a folder, and
    FileExistsError if something is there that is not of this kind and written by us.
    """
    if path.suffix.lower() != _SUFFIX[kind]:
        raise ValueError(f"{path}: the name of {_a(kind)} ends in {_SUFFIX[kind]}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.absolute().parent} to write {path} to")
    if path.exists() and not _is_ours(path, kind):
        raise FileExistsError(
            f"{path} exists and is not {_a(kind)} that fluxjax wrote, so it is not overwritten: "
            "give another name"
        )


def _a(kind: Kind) -> str:
    return "a file of outputs" if kind == "outputs" else f"a {kind}"


def _is_ours(path: Path, kind: Kind) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(_WITHIN)
    if _SUFFIX[kind] == ".png":
        ((key, value),) = marker(kind).items()
        return start.startswith(b"\x89PNG\r\n\x1a\n") and f"tEXt{key}\0{value}".encode() in start
    return f'"Software":"{marker(kind)["Software"]}"'.encode() in start


@contextmanager
def side_output(path: Path, kind: Kind) -> Iterator[Path]:
    """A path to write to, marked with `marker(kind)`; `path` appears or is replaced at the end.

    Raises what `check_side_output` raises, and OSError.
    """
    with whole_or_nothing(path) as part:
        check_side_output(path, kind)
        yield part
        assert _is_ours(part, kind), f"the {kind} was written without its marker"
