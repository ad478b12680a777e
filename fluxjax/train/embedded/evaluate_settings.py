"""What `python -m fluxjax.train evaluate` is asked. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from fluxjax.config import ConfigError
from fluxjax.parallel.mesh_shape import parse_mesh
from fluxjax.quantised_kinds import KEEP
from fluxjax.sample.quantise_option import parse_quantise
from fluxjax.train.embedded.colours import COLOURS


class Kind(NamedTuple):
    """How prompts of one kind are written, and in which sizes they are drawn (None: one's own)."""

    manner: str
    sizes: tuple[tuple[int, int], ...] | None = None


OTHER_SIZES = (
    (64, 64),
    (128, 128),
    (160, 160),
    (128, 64),
    (80, 160),
    (144, 112),
)
KINDS = {
    "sentences": Kind("sentence"),
    "terse": Kind("terse"),
    "X and Y": Kind("and"),
    "other orders": Kind("order"),
    "other sizes": Kind("sentence", OTHER_SIZES),
}


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Draw prompts that training never saw and read back what the pictures show."""

    task: Literal["text", "edit", "fill", "canny"] = "text"
    """From text alone, or one of the tools: edit a reference, fill a mask, follow edges."""
    model: str | None = None
    """By default the embedded model of the task (tiny, tiny-edit, ...); or a pipeline folder."""
    lora: tuple[str, ...] = ()
    """Adapters of the model, FILE or FILE:SCALE."""
    prompts: int = 48
    """Of each kind: sentences, terse, "X and Y", other orders of words, other sizes; of a tool
    cases in all."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Which kinds."""
    held_out: bool = True
    """Scenes with objects and pairs that training holds out; else ordinary ones."""
    colours: tuple[str, ...] = tuple(COLOURS)
    """Scenes whose objects have these colours alone."""
    guidance: float | None = None
    """Embedded guidance; the model's own by default."""
    steps: int | None = None
    """Denoising steps; the model's own by default."""
    true_cfg_scale: float = 1.0
    """Above 1: classifier-free guidance against the empty prompt, two passes per step."""
    seed: int = 0
    """Of scenes, captions and noise."""
    batch: int = 24
    """Pictures drawn at once; on a mesh made up to what it splits them by."""
    mesh: str | None = None
    """Devices along data, fsdp, tensor and sequence, such as fsdp=4,tensor=2; the rest is data."""
    quantise: str = KEEP
    """Weights in few bits, as `python -m fluxjax.sample --quantise` has them."""
    sheet: Path | None = None
    """Write a contact sheet to this PNG, a row for each kind."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the numbers as JSON instead of a table."""

    @property
    def opened(self) -> str:
        """The model's name or folder."""
        own = "tiny" if self.task == "text" else f"tiny-{self.task}"
        return self.model or own

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.batch < 1:
            raise ConfigError(
                f"prompts and batch must be at least 1, got {self.prompts} and {self.batch}"
            )
        for kind in self.kinds:
            if kind not in KINDS:
                known = ", ".join(map(repr, KINDS))
                raise ConfigError(f"kinds must be of {known}, got {kind!r}")
        for colour in self.colours:
            if colour not in COLOURS:
                raise ConfigError(f"colours must be of {', '.join(COLOURS)}, got {colour!r}")
        if not self.kinds:
            raise ConfigError("kinds must name at least one kind of prompts")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        parse_mesh(self.mesh or "")
        parse_quantise(self.quantise)
