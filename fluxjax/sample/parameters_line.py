"""The text `parameters` that other programs read: how AUTOMATIC1111's web UI writes it down."""

from __future__ import annotations

from collections.abc import Mapping

from fluxjax.config import PipelineConfig
from fluxjax.sample.settings import Settings

_SAMPLERS = {
    "euler": "Euler",
    "heun": "Heun",
    "dpm++": "DPM++ 2M",
    "dpm++1": "DPM++ 1",
    "dpm++3m": "DPM++ 3M",
    "unipc": "UniPC",
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler-a": "Euler a",
    "dpm++sde": "DPM++ SDE",
    "lcm": "LCM",
    "DDPMScheduler": "DDPM",
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PLMS",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "UniPCMultistepScheduler": "UniPC",
    "LCMScheduler": "LCM",
}


def parameters_text(
    settings: Settings,
    config: PipelineConfig,
    model: str,
    version: str,
    loras: Mapping[str, str],
    refiner: str | None = None,
) -> str:
    """Prompt, negative prompt, and one line of settings; `loras`: SHA-256 by name; `refiner`: the
    name of that.

    FLUX's embedded guidance is what web UIs call the distilled CFG scale.
    """
    sampler, usual = settings.sampler or config.own_sampler, "automatic"
    scales = {"CFG scale": f"{settings.guidance:g}"}
    if config.embeds_guidance:
        scale, usual = settings.true_cfg if settings.negative_prompt is not None else 1.0, "simple"
        scales = {"CFG scale": f"{scale:g}", "Distilled CFG Scale": f"{settings.guidance:g}"}
    values = {
        "Steps": settings.steps,
        "Sampler": _SAMPLERS.get(sampler, sampler),
        "Schedule type": (settings.sigmas or usual).replace("plain", "simple").capitalize(),
        **scales,
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
        "Model": _quoted(_one_line(model)),
    }
    if refiner is not None:
        values["Refiner"] = _quoted(_one_line(refiner))
        values["Refiner switch at"] = f"{settings.refiner_start:g}"
    if loras:
        hashes = ", ".join(f"{_one_line(name)}: {digest[:12]}" for name, digest in loras.items())
        values["Lora hashes"] = _quoted(hashes, always=True)
    values["Version"] = f"fluxjax {version}"
    lines = [_one_line(settings.prompt)]
    if settings.negative_prompt is not None:
        lines.append(f"Negative prompt: {_one_line(settings.negative_prompt or '')}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items())])


def _one_line(text: str) -> str:
    """A line break or control character in a prompt would end it for whoever reads the text."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _quoted(text: str, always: bool = False) -> str:
    marks = always or any(mark in text for mark in ',:"')
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if marks else text
