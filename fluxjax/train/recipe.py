"""Recipes: what a run of `python -m fluxjax.train` is told, in a TOML file and by options."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.config import ConfigError, LoraConfig
from fluxjax.config.choices import (
    Implementation,
    LoraNaming,
    Products,
    Remat,
    SequenceAttention,
)
from fluxjax.config.lora import TextEncoder
from fluxjax.hub import find
from fluxjax.quantised_kinds import KEEP, KINDS, NONE
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.settings import (
    ControlNetSettings,
    Objective,
    OptimizerSettings,
    ValidationSettings,
)
from fluxjax.train.toml_file import build, check_values, nearest, read_toml, to_toml

Method = Literal["lora", "full", "controlnet"]
_MAX_COUNT = 2**31 - 4  # of rows in a run, and of steps: they are counted in int32
_YEAR = 525600.0  # in minutes
# What does not decide about the weights. Data and model have hashes of their own.
_UNDECISIVE = {
    *("folder", "mesh", "sequence", "log_every", "save_minutes", "export_every", "keep"),
    *("patience", "hang_minutes", "tensorboard", "validation", "save_dtype", "data", "model"),
    *("record", "lora_start"),
}
_NAMES = {"dora": "PEFT's", "lokr": "LyCORIS'"}
_PLACES = {
    *("folder", "model", "data.source", "data.references", "data.masks", "data.cache"),
    *("data.fill_masks", "data.controls", "validation.source", "validation.references"),
    *("controlnet.start", "lora_start"),
    *("validation.images", "validation.masks", "validation.controls"),
}


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """A fine-tuning run; `folder` receives checkpoints, metrics, pictures and the result."""

    model: str = "tiny"
    """tiny (the embedded model), a diffusers folder, or a hub's name (OWNER/NAME)."""
    folder: Path = Path("runs/finetune")
    method: Method = "lora"
    """Train a LoRA over the frozen model, all of the transformer (or UNet), or a ControlNet beside
    the frozen model."""
    modules: tuple[str, ...] = ()
    """Of method full: the modules that learn, by their published names, the last parts of these or
    patterns, such as attn2; without any, all."""
    text_encoders: tuple[TextEncoder, ...] = ()
    """Of method full: clip (all that the model has), t5 or both, which learn whole beside it, at
    the rate optimizer.text_encoder_learning_rate. A LoRA's are lora.text_encoders."""
    steps: int = 1000
    batch: int = 4
    """Pictures per update, on all devices together; of clips see data.batches."""
    accumulate: int = 1
    """The batch is computed in so many parts, one after the other, in so much less memory."""
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation, and of a LoRA's frozen model; auto: float32 on CPUs, else bfloat16."""
    products: Products = "float32"
    """Where the computation is float32: bfloat16 rounds the operands of the products in the network
    that draws, and nothing else. CPUs with AMX are faster with it."""
    quantise: str = KEEP
    """Of a LoRA's frozen transformer: int8, nf4 or another kind of codes that its blocks' products
    are put into; keep leaves those of a quantised model as they are, none decodes them."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the finished transformer (a LoRA is always float32)."""
    lora_start: str = ""
    """A LoRA's file (or a hub's name) to go on from, of at most the ranks of this one: its products
    learn on, all else that it changes stays as it is, and is in the file that is written."""
    lora_naming: LoraNaming = "peft"
    """Whose names the LoRA file has: diffusers', kohya's or ComfyUI's. In all of them alpha is the
    rank, so that every program reads the same. DoRA has PEFT's names, LoKr LyCORIS'."""
    remat: Remat = "none"
    """Compute again in the backward pass: nothing, all but the dense layers, or every block."""
    attention: Implementation = "auto"
    ema_decay: float | None = None
    """Averages the weights; 0 does not. By default 0 for a LoRA, else 0.999."""
    mesh: str = ""
    """Such as fsdp=4,tensor=2; the rest of the devices shares out the batch."""
    sequence: SequenceAttention = "auto"
    """How attention works where the mesh splits the tokens of a picture."""
    log_every: int = 10
    save_minutes: float = 10.0
    """Between checkpoints; several hosts save with the row of metrics that follows."""
    export_every: int = 0
    """Steps between LoRA files (or, for full, pipelines) with the step in their name; 0: none."""
    keep: int = 2
    """The newest so many checkpoints stay."""
    patience: int = 50
    """The run ends after so many updates in a row that were not finite, with exit code 3."""
    hang_minutes: float = 30.0
    """The run ends when a step takes longer, with exit code 4."""
    tensorboard: bool = False
    """Also write TensorBoard's event files."""
    record: bool = True
    """Keep the recipe, without the places of this disk, in a LoRA file; --no-record keeps none."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    controlnet: ControlNetSettings = field(default_factory=ControlNetSettings)
    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    task: ClassVar[str] = "finetune"

    def __post_init__(self) -> None:
        check_values(self)
        if not self.model:
            raise ConfigError("model is empty: give a folder, a hub's name, or tiny")
        kinds = (*KINDS, KEEP, NONE)
        if self.quantise not in kinds:
            raise ConfigError(f"quantise must be one of {', '.join(kinds)}, got {self.quantise!r}")
        if self.method != "lora" and self.quantise in KINDS:
            raise ConfigError(
                f"quantise {self.quantise} is for the frozen base of a LoRA: what is "
                "trained is float32"
            )
        for name in ("steps", "batch", "accumulate", "log_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("save_minutes", "export_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.hang_minutes <= _YEAR:
            raise ConfigError(
                f"hang_minutes must be above 0 and at most a year ({_YEAR:.0f}), got "
                f"{self.hang_minutes:g}"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if self.steps * self.batch > _MAX_COUNT:
            raise ConfigError(
                f"steps {self.steps} of batch {self.batch} are more than the {_MAX_COUNT} pictures "
                "that a run can count"
            )
        for batch in (self.batch, *self.data.batches):
            if batch > self.batch:
                raise ConfigError(f"data.batches are at most batch {self.batch}, got {batch}")
            if batch % self.accumulate:
                raise ConfigError(
                    f"batch {batch} cannot be computed in accumulate {self.accumulate} equal parts"
                )
        if self.method == "lora" and self.lora.kind != "lora" and self.lora_naming != "peft":
            raise ConfigError(
                f"a {self.lora.kind} is written in {_NAMES[self.lora.kind]} names: leave out "
                f"lora_naming = {self.lora_naming!r}"
            )
        if self.lora_start and (self.method, self.lora.kind) != ("lora", "lora"):
            kind = self.lora.kind if self.method == "lora" else f"method {self.method}"
            raise ConfigError(
                f"lora_start is for low-rank products, which learn on, and this is a {kind}: "
                "python -m fluxjax.convert MODEL OUT --lora FILE writes a model to go on from"
            )
        if self.method == "controlnet" and self.data.pictures != {"control"}:
            raise ConfigError("a ControlNet learns to follow control pictures: give data.controls")
        if self.method == "controlnet" and self.lora != LoraConfig():
            raise ConfigError(
                "a ControlNet is trained whole: leave out [lora]. A LoRA that follows control "
                "pictures is method lora with data.controls"
            )
        if self.method != "controlnet" and self.controlnet != ControlNetSettings():
            raise ConfigError(
                f"[controlnet] is of method controlnet, which trains one whole, and this is method "
                f"{self.method}. A LoRA that follows control pictures is method lora with "
                "data.controls"
            )
        if self.method != "full" and self.modules:
            raise ConfigError(
                "modules are those that learn with method full; a LoRA's are lora.targets"
            )
        if self.method != "lora" and self.lora.text_encoders:
            raise ConfigError(
                "lora.text_encoders learn as a LoRA does: with method full it is text_encoders, "
                "which learn whole"
            )
        if self.method != "full" and self.text_encoders:
            raise ConfigError(
                "text_encoders learn whole with method full; a LoRA's are lora.text_encoders"
            )
        if len({*self.text_encoders}) != len(self.text_encoders):
            raise ConfigError(
                f"text_encoders names one of them twice: {', '.join(self.text_encoders)}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}")

    @property
    def model_folder(self) -> Path:
        """Where the model is; a hub's is downloaded first."""
        return find(self.model, "model", read_config)

    @property
    def compute_dtype(self) -> Any:
        import jax
        import jax.numpy as jnp

        if self.dtype != "auto":
            return jnp.dtype(self.dtype)
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")

    @property
    def hears_anew(self) -> bool:
        """Whether text encoders learn, which then run in every step."""
        return bool(self.lora.text_encoders or self.text_encoders)

    @property
    def by_component(self) -> bool:
        """Whether what is trained lies under the names of its networks."""
        return self.method == "lora" or self.hears_anew

    @property
    def precision(self) -> str | None:
        """Of the network's products."""
        from fluxjax.models.products import PRECISIONS

        return PRECISIONS[self.products] if self.compute_dtype == "float32" else None

    @property
    def decay(self) -> float:
        default = 0.0 if self.method == "lora" else 0.999
        return default if self.ema_decay is None else self.ema_decay


def read_recipe(path: Path) -> Any:
    """The recipe in a TOML file: a `FinetuneRecipe`, or with task = "embedded" a `TinyRecipe`, with
    "embedded-sd" a `TinySDRecipe`, with "embedded-pixart" a `TinyPixArtRecipe`, with
    "embedded-video" a `TinyVideoRecipe`.

    Raises ConfigError naming an unknown key and the nearest valid one, or a value of a wrong type,
    and for a file without any: hours of the defaults are not what an emptied recipe asks for.
    """
    values = read_toml(path)
    if not values:
        raise ConfigError(f"{path} is empty: a recipe says at least its model, data and steps")
    task = values.pop("task", "finetune")
    if task == "embedded":
        from fluxjax.train.embedded.tiny import TinyRecipe as Recipe
    elif task == "embedded-sd":
        from fluxjax.train.embedded.diffusion import TinySDRecipe as Recipe
    elif task == "embedded-pixart":
        from fluxjax.train.embedded.diffusion import TinyPixArtRecipe as Recipe
    elif task == "embedded-video":
        from fluxjax.train.embedded.tiny_video import TinyVideoRecipe as Recipe
    elif task == "finetune":
        Recipe = FinetuneRecipe
    else:
        known = ("finetune", "embedded", "embedded-sd", "embedded-pixart", "embedded-video")
        raise ConfigError(
            f"{path}: task must be one of {', '.join(known)}, got {task!r}"
            f"{nearest(str(task), known)}"
        )
    return build(Recipe, values, str(path))


def recipe_toml(recipe: Any) -> str:
    """All of a recipe, as `read_recipe` reads it."""
    return f'task = "{recipe.task}"\n{to_toml(recipe)}'


def recipe_values(recipe: Any) -> dict[str, str]:
    """Each key, such as `optimizer.name`, with its value as text."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in _leaves(recipe)
    }


def deciding_values(recipe: FinetuneRecipe) -> dict[str, str]:
    """All that decides about the weights; a resume needs the same."""
    left_out = set(_UNDECISIVE)
    if recipe.optimizer.schedule == "constant":
        left_out.add("steps")  # the same run, only longer
    # Runs that are older than a key go on.
    left_out |= {"products"} if recipe.products == "float32" else set()
    left_out |= set() if recipe.text_encoders else {"text_encoders"}
    values = recipe_values(recipe)
    return {name: value for name, value in values.items() if name.split(".")[0] not in left_out}


def without_places(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The recipe for strangers: of paths of this machine only the last name stays."""
    return _map_leaves(recipe, lambda name, value: _shortened(value) if name in _PLACES else value)


def _shortened(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_shortened, value))
    path = Path(value)
    outside = path.is_absolute() or ".." in path.parts or str(path).startswith("~")
    return type(value)(path.name) if outside else value


def _leaves(recipe: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for one in dataclasses.fields(recipe):
        value = getattr(recipe, one.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", value


def _map_leaves(recipe: Any, change: Callable[[str, Any], Any], prefix: str = "") -> Any:
    changed = {}
    for one in dataclasses.fields(recipe):
        name, value = f"{prefix}{one.name}", getattr(recipe, one.name)
        if dataclasses.is_dataclass(value):
            changed[one.name] = _map_leaves(value, change, f"{name}.")
        else:
            changed[one.name] = change(name, value)
    return dataclasses.replace(recipe, **changed)
