"""The same weights and inputs through PyTorch and through ours, layer by layer."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.checkpoint.sharded import read_sharded
from fluxjax.checkpoint.source import open_component, open_network
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import (
    DEV,
    AutoencoderConfig,
    CausalAutoencoderConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConfigError,
    ControlNetConfig,
    FluxConfig,
    HunyuanVideoConfig,
    IPAdapterConfig,
    LlamaConfig,
    PixArtConfig,
    ReduxConfig,
    SD3Config,
    SiglipVisionConfig,
    T5Config,
    UNetConfig,
)
from fluxjax.config.choices import ComparedNetwork
from fluxjax.diff.adapters import controlnet, from_tensors, ip_adapter, vision
from fluxjax.diff.layers import Layer, Outputs, captured, common_name, pair_layers, recorded
from fluxjax.diff.report import Report, compare, relative_l2
from fluxjax.families import FLUX, Conditioning, Extras
from fluxjax.networks import network_of
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings

Dtype = Literal["float32", "bfloat16"]
Arrays = dict[str, np.ndarray]

OUTPUT = "output "  # before the names of what the network as a whole returns
FLOAT32_BOUND = 1e-5
BFLOAT16_BOUND = 2e-2
# How much further from PyTorch's float32 than PyTorch's own bfloat16 ours may be.
BFLOAT16_FACTOR = 1.5


def require_torch() -> Any:
    """torch, or a sentence that says what to install."""
    for name in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"comparing with PyTorch needs {name}, which is not installed: "
                "pip install 'fluxjax[test]'"
            )
    # Nothing is ever fetched, and loading two small networks needs no progress bars.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return importlib.import_module("torch")


def _autoencoder(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Of pictures, and of clips that are short and small enough for one tile."""
    image, latents = (tensor.movedim(-1, 1) for tensor in tensors.values())
    moments = model.encode(image).latent_dist
    decoded = model.decode(latents).sample
    outputs = {"mean": moments.mean, "logvar": moments.logvar, "decoded": decoded}
    return {name: value.movedim(1, -1) for name, value in outputs.items()}


def _clip_text(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    output = model(tensors["input_ids"].long())
    return {
        "last_hidden_state": output.last_hidden_state,
        "pooler_output": output.pooler_output,
    }


def _latents(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """A transformer over latents as pictures."""
    x = {**x, "hidden_states": x["hidden_states"].movedim(-1, 1)}
    if "resolution" in x:
        x["added_cond_kwargs"] = {k: x.pop(k) for k in ("resolution", "aspect_ratio")}
    return {"sample": model(**x).sample.movedim(1, -1)}


def _unet(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    added = {k: x[k] for k in ("text_embeds", "time_ids") if k in x}
    sample, text = x["sample"].movedim(-1, 1), x["encoder_hidden_states"]
    told = {"timestep_cond": x.get("timestep_cond"), "added_cond_kwargs": added}
    returned = model(sample, x["timestep"], text, **told)
    return {"sample": returned.sample.movedim(1, -1)}


def _language_model(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """The state of the layer that ours ends with, before the last norm, or after it."""
    stops_after = getattr(model.config, "stops_after", None)
    output = model(x["input_ids"].long(), x["attention_mask"], output_hidden_states=True)
    last = output.last_hidden_state if stops_after is None else output.hidden_states[stops_after]
    return {"last_hidden_state": last}


def _hunyuan_video(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """The pipeline multiplies guidance by 1000, in the network's type."""
    if "guidance" in x:
        x = {**x, "guidance": x["guidance"].to(model.dtype) * 1000}
    return {"sample": model(**x).sample}


def _flux_timestep(call: Callable[..., Any], model: Any, x: dict[str, Any]) -> Any:
    """FluxPipeline casts 1000 t, then divides."""
    return call(model, {**x, "timestep": (1000 * x["timestep"]).to(model.dtype) / 1000})


# What PyTorch's networks return for the inputs that `networks` describes, by the same names.
THEIRS: dict[type, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    FluxConfig: partial(_flux_timestep, lambda model, x: {"sample": model(**x).sample}),
    SD3Config: _latents,
    PixArtConfig: _latents,
    HunyuanVideoConfig: _hunyuan_video,
    LlamaConfig: _language_model,
    UNetConfig: _unet,
    AutoencoderConfig: _autoencoder,
    CausalAutoencoderConfig: _autoencoder,
    CLIPTextConfig: _clip_text,
    T5Config: lambda model, x: {
        "last_hidden_state": model(x["input_ids"].long()).last_hidden_state
    },
    ControlNetConfig: partial(_flux_timestep, controlnet),
    SiglipVisionConfig: vision,
    CLIPVisionConfig: vision,
    ReduxConfig: lambda model, x: {"image_embeds": model(x["states"]).image_embeds},
    IPAdapterConfig: lambda model, x: model(x["image_embeds"]),
}

# Of networks for which PyTorch's side has no class of its own.
ASSEMBLED = {IPAdapterConfig: ip_adapter}


def opened(folder: Path, network: ComparedNetwork) -> OpenNetwork:
    """A network of a pipeline folder, or one in a file or folder of its own."""
    if network in DEV.networks and (folder / "model_index.json").is_file():
        return open_component(folder, network, read_config(folder).networks[network])
    return open_network(folder, network)


def _theirs(loaded: OpenNetwork, dtype: Any) -> Any:
    """PyTorch's module. It reads folders by itself; of files, which only we can name, it gets the
    tensors."""
    if assembled := ASSEMBLED.get(type(loaded.config)):
        return assembled(loaded).to(dtype).eval()
    form = network_of(loaded.config).json
    name = form.class_name(loaded.config)
    cls = getattr(importlib.import_module(form.library), name, None)
    if cls is None:
        raise ConfigError(
            f"{form.library} has no {name} to compare with; `diff golden` takes recordings of it"
        )
    if loaded.where.is_dir():
        read_sharded(loaded.where)  # says in one sentence which file is missing or broken
        path = str(loaded.where)
        return cls.from_pretrained(path, local_files_only=True, dtype=dtype).eval()
    return from_tensors(cls, loaded).to(dtype).eval()


_NUMBERS = (
    "img_ids",
    "txt_ids",
    "guidance",
    "timestep",
    "resolution",
    "aspect_ratio",
    "time_ids",
    "encoder_attention_mask",
)


def run_theirs(folder: Path, network: ComparedNetwork, inputs: Arrays, dtype: Dtype) -> list[Layer]:
    """Every layer of PyTorch's network and, last, its outputs, as float32 arrays."""
    torch = require_torch()
    loaded = opened(folder, network)
    model = _theirs(loaded, getattr(torch, dtype))
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    # Ids and numbers stay float32, as in diffusers' pipelines; the network casts them itself.
    tensors = {
        k: v.to(getattr(torch, dtype)) if v.is_floating_point() and k not in _NUMBERS else v
        for k, v in tensors.items()
    }
    with torch.no_grad(), recorded(model) as layers:
        outputs = THEIRS[type(loaded.config)](model, tensors)
    return layers + [Layer(OUTPUT + k, 0, (v.float().numpy(),)) for k, v in outputs.items()]


def _flux(devices: Mesh | None, module: Any, variables: Any, inputs: Any, capture: Any) -> Any:
    text = Conditioning(inputs["encoder_hidden_states"], None, inputs["pooled_projections"])
    extras = Extras(inputs["img_ids"], inputs.get("guidance"))
    apply = partial(apply_on, devices)
    state, times = inputs["hidden_states"], inputs["timestep"]
    return FLUX.forward(module, variables, state, times, text, extras, apply=apply, **capture)


def _plain(devices: Mesh | None, module: Any, variables: Any, inputs: Any, capture: Any) -> Any:
    method = network_of(module.config).method
    return apply_on(devices, module, variables, **inputs, method=method, **capture)


# (devices, module, variables, inputs, what to capture) -> (what it returns, what was captured).
OURS: dict[type, Callable[..., tuple[Any, Any]]] = {FluxConfig: _flux}


def run_ours(
    folder: Path, network: ComparedNetwork, inputs: Arrays, dtype: Dtype, mesh: str | None = None
) -> dict[str, list[Outputs]]:
    """Every captured layer and the outputs of our network by common name, as float32 arrays.

    On a mesh weights are split by the roles of their layers, the batch of two where it divides, and
    the transformer's tokens over `sequence`; its layers come back whole and in PyTorch's order.
    """
    loaded = opened(folder, network)
    description = network_of(loaded.config)
    types: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    module = description.build(loaded.config, **types)
    arrays = {k: jnp.asarray(v) for k, v in inputs.items()}
    devices = None if mesh is None else make_mesh(mesh)
    places = None
    if devices is not None:
        places = param_shardings(loaded.config, abstract_params(loaded.config), devices)
    params = loaded.params(stacked=False, dtype=jnp.dtype(dtype), shardings=places)

    call = OURS.get(type(loaded.config), _plain)

    @jax.jit
    def run(params: Any, arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], Any]:
        capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
        returned, state = call(devices, module, {"params": params}, arrays, capture)
        return description.outputs(returned), state["intermediates"]

    outputs, intermediates = run(params, arrays)
    last = {OUTPUT + k: [(np.asarray(v.astype(jnp.float32)),)] for k, v in outputs.items()}
    return captured(intermediates) | last


def compare_network(
    folder: Path,
    network: ComparedNetwork,
    *,
    dtype: Dtype = "float32",
    against: Path | None = None,
    mesh: str | None = None,
) -> Report:
    """Compare one network of the pipeline folder; `against` gives ours its weights instead.

    `mesh`: devices that ours runs on, as `parallel.mesh.parse_mesh` reads them; by default one.

    float32: every layer within 1e-5. bfloat16: PyTorch's float32 is what both are measured by; the
    outputs must be within 2e-2 and within 1.5 x PyTorch's own bfloat16 error, a layer inside
    within the larger of the two, since single layers scatter.
    """
    config = opened(folder, network).config
    inputs = network_of(config).inputs(config)
    layers = run_theirs(folder, network, inputs, "float32")
    ours = run_ours(against or folder, network, inputs, dtype, mesh)
    pairs = pair_layers(layers, ours)
    own: dict[str, float] = {}
    if dtype == "bfloat16":
        low = pair_layers(run_theirs(folder, network, inputs, "bfloat16"), ours)
        own = {
            pair.name: relative_l2(lower.expected, pair.expected)
            for pair, lower in zip(pairs, low, strict=True)
        }
    rows = []
    for pair in pairs:
        bound = FLOAT32_BOUND
        if pair.name in own:
            pick = min if pair.name.startswith(OUTPUT) else max
            bound = pick(BFLOAT16_BOUND, BFLOAT16_FACTOR * own[pair.name])
        rows.append(
            compare(pair.name, pair.ours, pair.expected, bound=bound, own_error=own.get(pair.name))
        )
    return Report(title=f"{network} in {dtype}", rows=tuple(rows), notes=_notes(layers, ours))


def _notes(layers: list[Layer], ours: dict[str, list[Outputs]]) -> tuple[str, ...]:
    """Name what could not be compared, so that silence does not pass for agreement."""
    theirs = {common_name(layer.name) for layer in layers}
    notes = []
    for who, missing in (
        ("PyTorch", theirs - ours.keys()),
        ("fluxjax", ours.keys() - theirs - {""}),
    ):
        kinds = sorted({re.sub(r"_\d+$", "", name.split("/")[-1]) for name in missing})
        if kinds:
            notes.append(
                f"{len(missing)} modules that only {who} has were not compared by themselves: "
                + ", ".join(kinds)
            )
    return tuple(notes)
