"""Our networks against recorded files of the original PyTorch code.

The weights come in through the same converter as any checkpoint. torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import ConfigError
from fluxjax.diff import (
    golden_flux,
    golden_hunyuan_video,
    golden_open_sora,
    golden_video_autoencoders,
)
from fluxjax.diff.recordings import Arrays, Recording, parse, read_recording
from fluxjax.diff.report import Report, Row
from fluxjax.parallel.mesh import make_mesh
from fluxjax.side_output import marker, side_output

Checked = tuple[list[Row], Arrays]
CHECKS: Mapping[str, Callable[[Recording, Mesh | None], Checked]] = {
    "black-forest-labs/flux": golden_flux.check,
    "hpcaitech/Open-Sora v2": golden_open_sora.check,
    "huggingface/diffusers 0.42.1": golden_hunyuan_video.check,
}
"""By what a recording says that it is of."""
AUTOENCODER_CHECKS: Mapping[str, Callable[[Recording, Mesh | None], Checked]] = {
    "AutoencoderKLHunyuanVideo": golden_video_autoencoders.check_diffusers,
    "hunyuan_vae": golden_video_autoencoders.check_open_sora,
    "dc_ae": golden_video_autoencoders.check_dc,
}
"""Of autoencoders of clips, which several families share: by the recorded network."""
TABLE_CHECKS: Mapping[str, Callable[[Path, Mapping[str, Any]], Checked]] = {
    "black-forest-labs/flux": golden_flux.check_tables,
    "hpcaitech/Open-Sora v2": golden_open_sora.check_tables,
}
"""Of JSON files: schedules, sizes, prompts."""


def check_golden(path: Path, mesh: str | None = None) -> tuple[Report, Arrays]:
    """Compare ours with a recorded file; returns the report and our outputs by recorded name.

    `path` may also be a JSON file of recorded schedules. Raises ConfigError for a file that is no
    recording or records a family that is not supported. `mesh`: devices that ours runs on, as
    `parallel.mesh.parse_mesh` reads them; a batch that they do not divide is whole on each.
    """
    if path.suffix == ".json":
        recorded = parse(path, path.read_text())
        rows, ours = _known(path, recorded, TABLE_CHECKS)(path, recorded)
        return Report(title=path.name, rows=tuple(rows)), ours
    recording = read_recording(path)
    check = AUTOENCODER_CHECKS.get(str(recording.config.get("network")))
    check = check or _known(path, recording.config, CHECKS)
    rows, ours = check(recording, None if mesh is None else make_mesh(mesh))
    outputs = {f"outputs.{name}": ours[name] for name in recording.outputs}
    return Report(title=path.name, rows=tuple(rows)), outputs


def _known(path: Path, recorded: Mapping[str, Any], checks: Mapping[str, Any]) -> Any:
    source = recorded.get("source", "an unknown source")
    if source not in checks:
        raise ConfigError(
            f"{path} records {source}, a family that fluxjax does not support: it knows recordings "
            f"of {', '.join(checks)}"
        )
    return checks[source]


def save_outputs(path: Path, outputs: Arrays) -> None:
    """Write our outputs as safetensors under their recorded names.

    Raises what `side_output.check_side_output` raises.
    """
    tensors = {name: of_array(array) for name, array in outputs.items()}
    with side_output(path, "outputs") as part:
        write_safetensors(part, tensors, marker("outputs"))
