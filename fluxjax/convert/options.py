"""What `python -m fluxjax.convert` is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fluxjax.config.choices import FileFamily

_Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
_Destination = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
_Loras = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="FILE[:SCALE]", help_behavior_hint=""),
]
_Form = Annotated[
    Literal["diffusers", "bfl", "orbax", "peft", "kohya", "comfy"] | None,
    tyro.conf.arg(help_behavior_hint=""),
]
_Kind = Annotated[
    Literal["int8", "fp8", "nf4", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0"] | None,
    tyro.conf.arg(help_behavior_hint=""),
]

_Family = Annotated[FileFamily | None, tyro.conf.arg(help_behavior_hint="")]


@dataclass(frozen=True)
class Options:
    """Convert FLUX checkpoints: a whole pipeline, or any of its networks.

    The family and variant are told from the tensors' names and shapes.
    """

    source: _Source
    """A diffusers or transformers folder, a BFL or ComfyUI .safetensors file, an Orbax folder, or
    the name of one on a hub: OWNER/NAME."""
    destination: _Destination
    """A folder; for one network --to bfl, also a .safetensors file; for a LoRA such a file."""
    to: _Form = None
    """The form to write: of a model the first three (diffusers, or with --quantise the one that
    holds the codes, where nothing is said), of a LoRA the others."""
    quantise: _Kind = None
    """Keep the products of the transformer's (or UNet's) and T5's blocks in 8 bits or less: int8
    and nf4 as diffusers folders (bitsandbytes), fp8 as ComfyUI's scaled files, the others as GGUF;
    each also with --to orbax."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Cast all tensors; keep changes no value (scaled fp8 becomes bfloat16, and fp8 again)."""
    lora: _Loras = ()
    """Merge an adapter (LoRA, DoRA, LoKr, LoHa, OFT and others) into the weights, or several:
    --lora A.safetensors --lora B.safetensors:0.5."""
    difference_from: _Path = None
    """Write what the source has learnt beyond this checkpoint, as a LoRA."""
    rank: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Of that LoRA, 64 where nothing is said; norms, biases and a first layer that reads more are
    kept whole."""
    mesh: _Text = None
    """With --to orbax: store each device's part by itself, for devices such as fsdp=4,tensor=2."""
    config: _Path = None
    """config.json of a network whose shapes do not tell everything (heads other than 128); of a
    LoRA, the model that it adapts if that is not of FLUX.1's size: its folder or config.json."""
    family: _Family = None
    """Whose a bare autoencoder is, whose scale its shapes do not tell."""
    shard_gb: float = 10.0
    """Size of a shard of a diffusers folder, in GB."""
    overwrite: bool = False
    """Replace the destination if it exists."""

    def check(self) -> None:
        """Raises ValueError for what cannot be meant."""
        if not 0 < self.shard_gb < float("inf"):
            raise ValueError(f"--shard-gb must be a positive number, got {self.shard_gb}")
        if self.rank is not None and self.difference_from is None:
            raise ValueError("--rank is of the LoRA that --difference-from writes")
        writes_adapter = self.to in ("peft", "kohya", "comfy") or self.difference_from is not None
        if writes_adapter and (self.lora or self.mesh or self.quantise):
            what = f"--to {self.to}" if self.difference_from is None else "--difference-from"
            raise ValueError(f"--lora, --quantise and --mesh are for models, and {what} for a LoRA")
        if self.difference_from is not None and self.to is not None:
            raise ValueError(
                "--difference-from writes a LoRA in the published names: leave out --to, and "
                "convert that file"
            )
