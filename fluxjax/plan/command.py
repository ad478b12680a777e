"""What `python -m fluxjax.plan` does, once there are devices to compile for."""

from __future__ import annotations

import json
import sys

from fluxjax.plan.options import Options, device_count, find_chips, read_model
from fluxjax.quantised_kinds import NONE


def plan(options: Options) -> int:
    """Compile, and print tables or JSON."""
    from fluxjax.plan.estimate import as_json
    from fluxjax.plan.programs import compile_plan
    from fluxjax.plan.tables import print_tables

    chips, config = find_chips(options.chips), read_model(options)
    made = {
        "model": options.model,
        "task": options.task,
        "mesh": options.mesh or "data",
        "devices": device_count(options),
        "batch": options.batch,
        "dtype": options.dtype,
    }
    sizes = ("width", "height", "frames", "max_sequence_length")
    made |= {name: getattr(config, name) for name in sizes if name in config.sampling_fields}
    if options.quantise != NONE:
        made["quantise"] = options.quantise
    made |= {name: True for name in ("offload", "stream") if getattr(options, name)}
    if options.task == "sample":
        made["steps"] = config.steps
        if options.pictures:
            made["pictures"] = " ".join(options.pictures)
        several = {name: getattr(options, name) for name in ("controlnet", "ip_adapter")}
        made |= {name: " ".join(values) for name, values in several.items() if values}
        single = {name: getattr(options, name) for name in ("redux", "image_encoder")}
        made |= {name: value for name, value in single.items() if value is not None}
    else:
        made |= {"remat": options.remat, "optimizer": options.optimizer}
        made |= {"accumulate": options.accumulate, "ema": options.ema}
    if options.task == "lora":
        made["rank"] = options.rank
    placed = compile_plan(options, config, lambda name: _say(f"compiling {name} ..."))
    if options.json:
        print(json.dumps(as_json(placed, chips, made), indent=1))
    else:
        print_tables(placed, chips, made)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
