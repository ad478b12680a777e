"""Options that are paths: an empty one, as a shell's variable that is not set, is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

PATHS = ConstructorRegistry()
"""For `tyro.cli`. Without it an empty path would be the current folder."""


def _parsed(texts: list[str]) -> Path:
    if not texts[0]:
        raise ValueError("is empty: give a path")
    return Path(texts[0])


@PATHS.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_parsed,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )
