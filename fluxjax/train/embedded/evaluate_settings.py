"""What `python -m fluxjax.train evaluate` is asked. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from fluxjax.config import ConfigError
from fluxjax.config.choices import MAX_STEPS
from fluxjax.hub import embedded_adapter
from fluxjax.parallel.mesh_shape import parse_mesh
from fluxjax.quantised_kinds import KEEP
from fluxjax.sample.quantise_option import parse_quantise
from fluxjax.sample.sources import TINY
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


class Sampler(NamedTuple):
    """A sampler of a model; "" is the model's own."""

    model: str
    name: str

    def __str__(self) -> str:
        return f"{Path(self.model).name} {self.name}".strip()


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Draw prompts that training never saw and read back what the pictures show."""

    task: Literal["text", "edit", "fill", "canny", "clip"] = "text"
    """From text alone, or one of the tools: edit a reference, fill a mask, follow edges; clip: of a
    model of clips, from text and from a first frame."""
    model: str = "tiny"
    """tiny (the embedded model; of a tool the one that has learnt it, such as tiny-edit), or
    tiny-pixart, tiny-sd, tiny-video (of clips), or a pipeline folder."""
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
    """Embedded guidance, or the scale of classifier-free guidance where a model has that; the
    model's own by default."""
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
    samplers: tuple[str, ...] = ()
    """Measure these instead, on the first kind of prompts: NAME of --model, MODEL:NAME, or MODEL:
    for its own; a list of them may be joined by commas."""
    step_counts: tuple[int, ...] = (2, 5, 10, 20, 50)
    """Of each sampler."""
    plot: Path | None = None
    """Draw the right pictures of each sampler over its steps to this PNG."""
    sheet: Path | None = None
    """Write a contact sheet to this PNG, a row for each kind; of clips one that moves."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the numbers as JSON instead of a table."""

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
        if self.plot is not None and not self.samplers:
            raise ConfigError("plot draws what samplers make: name samplers")
        if self.samplers:
            self._check_samplers()
        for count in self.step_counts:
            if not 1 <= count <= MAX_STEPS:
                raise ConfigError(f"step_counts must be from 1 to {MAX_STEPS}, got {count}")
        parse_mesh(self.mesh or "")
        parse_quantise(self.quantise)

    def _check_samplers(self) -> None:
        """Raises ConfigError for what is not heard beside them."""
        unheard = {
            "steps": (self.steps is not None, "step_counts are those of samplers"),
            "sheet": (self.sheet is not None, "of samplers a plot is drawn"),
            "task": (self.task != "text", "samplers draw from text alone"),
            f"kinds {self.kinds[0]!r}": (
                KINDS[self.kinds[0]].sizes is not None,
                "samplers draw in the model's own size",
            ),
            "lora": (
                bool(self.lora) and self.model not in {one.model for one in self.chosen},
                f"adapters are model's, and {self.model} is none of the samplers'",
            ),
        }
        for name, (given, why) in unheard.items():
            if given:
                raise ConfigError(f"{why}: leave out {name}, or samplers")
        if not self.step_counts:
            raise ConfigError("step_counts must name at least one number of steps")

    @property
    def guided(self) -> dict[str, Any]:
        """Settings of the pictures but for their sampler and its steps."""
        return {
            "guidance": self.guidance,
            "seed": self.seed,
            "true_cfg": self.true_cfg_scale,
            "negative_prompt": "" if self.true_cfg_scale > 1 else None,
        }

    @property
    def opened(self) -> str:
        """The model that is measured: of the embedded one what has learnt the task, if it is there
        and no other adapter is given."""
        learnt = f"{self.model}-{self.task}"
        own = self.model == TINY and not self.lora and embedded_adapter(learnt) is not None
        return learnt if own else self.model

    @property
    def chosen(self) -> list[Sampler]:
        """The `samplers`."""
        found = []
        for name in ",".join(self.samplers).split(","):
            model, colon, sampler = name.strip().rpartition(":")
            found.append(Sampler(model if colon else self.model, sampler))
        return found
