"""How many devices lie along each axis of the mesh, as options say it. Imports no JAX."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fluxjax.config import ConfigError

AXES = ("data", "fsdp", "tensor", "sequence")


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis; `data` 0 stands for all that the other axes leave."""

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            size, least = getattr(self, name), 0 if name == "data" else 1
            if size < least:
                raise ConfigError(f"the mesh's {name} must be at least {least}, got {size}")

    def __str__(self) -> str:
        sizes = dataclasses.asdict(self).items()
        return ",".join(f"{name}={size}" for name, size in sizes if size > 1) or "of one device"


def parse_mesh(text: str) -> MeshShape:
    """Of `fsdp=4,tensor=2`; axes that are not named are 1, and the rest of the devices is data.

    Raises ConfigError.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal():
            raise ConfigError(
                f"a mesh is written as axis=number, separated by commas, each of {', '.join(AXES)} "
                f"at most once, such as fsdp=4,tensor=2; got {text!r}"
            )
        sizes[name] = int(size)
    return MeshShape(**sizes)
