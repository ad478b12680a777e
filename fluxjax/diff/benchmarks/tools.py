"""A picture with each of FLUX.1's tools, beside diffusers: from the prompt to the picture.

What the model's folder lacks (ControlNet, Redux, IP-Adapter, more inputs for Fill and Control) is
made in its size, with random weights: both sides have the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxjax.diff.benchmarks.bench import PROMPT, Measure, medians

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SEED = 7
SIDE = 96  # pixels of all pictures


@dataclass(frozen=True, kw_only=True)
class Case:
    """`opened`: what our pipeline is loaded with; `given`: what it draws from. `theirs` makes
    diffusers' pipeline, as a function of size, steps and seed."""

    model: Path
    given: dict[str, Any]
    theirs: Callable[[], Callable[..., Any]]
    opened: dict[str, Any] = field(default_factory=dict)


def tools(folder: Path, rounds: int, names: Sequence[str] = ()) -> list[Measure]:
    """One measure for each tool, or for those of `names`."""
    with tempfile.TemporaryDirectory() as temporary:
        cases = make_cases(folder, Path(temporary))
        return [_measured(name, cases[name], rounds) for name in names or cases]


def _measured(name: str, case: Case, rounds: int) -> Measure:
    import torch

    from fluxjax.sample.loading import load_pipeline

    ours = load_pipeline(case.model, dtype="float32", **case.opened)
    theirs, steps = case.theirs(), 20
    shared = {"width": SIDE, "height": SIDE}
    drawn: dict[str, Picture] = {}

    def run_ours() -> None:
        given = {**shared, **case.given}
        drawn["ours"] = ours(PROMPT, seed=SEED, steps=steps, guidance=3.5, **given)[0]

    def run_theirs() -> None:
        generator = torch.Generator().manual_seed(SEED)
        drawn["theirs"] = theirs(
            num_inference_steps=steps,
            guidance_scale=3.5,
            generator=generator,
            **shared,
        ).images[0]

    with torch.no_grad():
        seconds = medians({"ours": run_ours, "theirs": run_theirs}, rounds)
    apart = np.abs(np.asarray(drawn["ours"], int) - np.asarray(drawn["theirs"], int))
    return Measure(
        what=f"{name}, {SIDE}x{SIDE}, {steps} steps ({(apart <= 1).mean():.1%} of the values "
        "within 1/255)",
        ours=seconds["ours"],
        theirs=seconds["theirs"],
        beside="diffusers eager",
    )


def make_cases(folder: Path, room: Path) -> dict[str, Case]:
    """By the name of the tool; what they need lies in `room`."""
    import torch
    from diffusers import pipelines

    torch.manual_seed(0)
    plain: Any = pipelines.FluxPipeline.from_pretrained(str(folder), local_files_only=True)
    parts = {n: c for n, c in plain.components.items() if c is not None}
    heard = {"prompt": PROMPT, "max_sequence_length": _text_length(folder)}
    image, other, mask = _picture(0), _picture(1), _mask()

    def of(name: str, **given: Any) -> Callable[[], Callable[..., Any]]:
        return lambda: _quiet(getattr(pipelines, name)(**parts), **heard, **given)

    kontext = {"image": image, "_auto_resize": False, "max_area": SIDE * SIDE}
    return {
        "image to image": Case(
            model=folder,
            given={"image": image, "strength": 0.6},
            theirs=of("FluxImg2ImgPipeline", image=image, strength=0.6),
        ),
        "inpainting": Case(
            model=folder,
            given={"image": image, "mask": mask, "strength": 0.85},
            theirs=of("FluxInpaintPipeline", image=image, mask_image=mask, strength=0.85),
        ),
        "Kontext": Case(
            model=folder, given={"reference": image}, theirs=of("FluxKontextPipeline", **kontext)
        ),
        "Fill": _widened(
            parts,
            room / "fill",
            384,
            ("FluxFillPipeline", {"image": image, "mask": mask}),
            {**heard, "image": image, "mask_image": mask},
        ),
        "Control": _widened(
            parts,
            room / "control",
            128,
            ("FluxControlPipeline", {"control": other}),
            {**heard, "control_image": other},
        ),
        "ControlNet": _controlnet(folder, parts, room / "controlnet", heard, other),
        "Redux": _redux(folder, plain, room / "redux", other),
        "IP-Adapter": _ip_adapter(folder, parts, room, heard, other),
    }


def _quiet(pipe: Any, **called: Any) -> Callable[..., Any]:
    pipe.set_progress_bar_config(disable=True)
    return partial(pipe, **called)


def _text_length(folder: Path) -> int:
    from fluxjax.checkpoint.pipeline_folder import read_config

    return read_config(folder).max_sequence_length


def _widened(
    parts: dict[str, Any],
    room: Path,
    inputs: int,
    ours: tuple[str, dict[str, Any]],
    called: dict[str, Any],
) -> Case:
    """A model whose transformer has more inputs."""
    import torch
    from diffusers import FluxTransformer2DModel, pipelines

    plain, (name, given) = parts["transformer"], ours
    config = {**plain.config, "in_channels": inputs, "out_channels": plain.config.in_channels}
    wide: Any = FluxTransformer2DModel.from_config(config)
    weights = dict(plain.state_dict())
    old = weights["x_embedder.weight"]
    more = 0.02 * torch.randn(len(old), inputs - old.shape[1])
    wide.load_state_dict({**weights, "x_embedder.weight": torch.cat([old, more], 1)})
    pipe = getattr(pipelines, name)(**{**parts, "transformer": wide})
    pipe.save_pretrained(str(room))
    text = {"max_sequence_length": called["max_sequence_length"]}
    return Case(model=room, given={**given, **text}, theirs=lambda: _quiet(pipe, **called))


def _controlnet(
    folder: Path, parts: dict[str, Any], room: Path, heard: dict[str, Any], picture: Picture
) -> Case:
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    config = parts["transformer"].config
    net: Any = FluxControlNetModel.from_transformer(
        parts["transformer"],
        num_layers=min(2, config.num_layers),
        num_single_layers=min(2, config.num_single_layers),
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    )
    _randomise(net, "controlnet_")
    net.save_pretrained(str(room))
    return Case(
        model=folder,
        opened={"controlnet": room},
        given={"control": picture},
        theirs=lambda: _quiet(
            FluxControlNetPipeline(**parts, controlnet=net), **heard, control_image=picture
        ),
    )


def _redux(folder: Path, plain: Any, room: Path, picture: Picture) -> Case:
    import transformers
    from diffusers import FluxPriorReduxPipeline, ReduxImageEncoder

    size = 112
    vision: dict[str, Any] = {"image_size": size, "hidden_size": 64, "intermediate_size": 128}
    config = transformers.SiglipVisionConfig(
        **vision, patch_size=14, num_hidden_layers=2, num_attention_heads=2
    )
    projector: Any = ReduxImageEncoder(64, plain.text_encoder_2.config.d_model)
    prior = FluxPriorReduxPipeline(
        transformers.SiglipVisionModel(config),
        transformers.SiglipImageProcessor(size={"height": size, "width": size}),
        projector,
    )
    prior.save_pretrained(str(room))
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    prior.register_modules(**{name: getattr(plain, name) for name in encoders})
    draw = _quiet(plain)

    def theirs(**called: Any) -> Any:
        seen: Any = prior(picture, prompt=PROMPT)
        return draw(**seen, **called)

    return Case(
        model=folder,
        opened={"redux": room},
        # The prior cannot be told another length of text.
        given={"redux_image": picture, "max_sequence_length": 512},
        theirs=lambda: theirs,
    )


def _ip_adapter(
    folder: Path, parts: dict[str, Any], room: Path, heard: dict[str, Any], picture: Picture
) -> Case:
    import torch
    import transformers
    from diffusers import FluxPipeline
    from safetensors.torch import save_file

    config = parts["transformer"].config
    width, text = config.num_attention_heads * config.attention_head_dim, config.joint_attention_dim
    tokens, embed = 4, 32
    vision: dict[str, Any] = {"image_size": 112, "hidden_size": 64, "intermediate_size": 128}
    clip = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            **vision,
            patch_size=14,
            projection_dim=embed,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    clip.save_pretrained(str(room / "clip"))
    stream = "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj"
    sizes = {
        "ip_adapter_proj_model.proj": (tokens * text, embed),
        "ip_adapter_proj_model.norm": (text,),
        **{stream.format(i, k): (width, text) for i in range(config.num_layers) for k in "kv"},
    }
    weights = {f"{name}.weight": 0.1 * torch.randn(*size) for name, size in sizes.items()}
    weights |= {f"{name}.bias": 0.1 * torch.randn(size[0]) for name, size in sizes.items()}
    save_file(weights, str(room / "adapter.safetensors"))

    def theirs() -> Callable[..., Any]:
        pipe: Any = FluxPipeline.from_pretrained(str(folder), local_files_only=True)
        pipe.load_ip_adapter(
            str(room),
            "adapter.safetensors",
            image_encoder_pretrained_model_name_or_path=str(room / "clip"),
        )
        return _quiet(pipe, **heard, ip_adapter_image=picture)

    return Case(
        model=folder,
        opened={"ip_adapter": room / "adapter.safetensors", "image_encoder": room / "clip"},
        given={"ip_image": picture},
        theirs=theirs,
    )


def _randomise(network: Any, prefix: str) -> None:
    """Weights that begin at zero, so that they count."""
    import torch

    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.startswith(prefix):
                weight.copy_(0.02 * torch.randn_like(weight))


def _picture(seed: int) -> Picture:
    """Smooth colours."""
    from PIL.Image import fromarray

    few = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return fromarray(few).resize((SIDE, SIDE))


def _mask() -> Picture:
    from PIL.Image import fromarray

    white = np.zeros((SIDE, SIDE), np.uint8)
    white[24:72, 32:80] = 255
    return fromarray(white)
