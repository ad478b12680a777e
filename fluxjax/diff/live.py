"""The same weights and inputs through PyTorch and through ours, layer by layer."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint.pipeline_folder import load_params, read_config
from fluxjax.checkpoint.sharded import read_sharded
from fluxjax.checkpoint.source import open_component, template_of
from fluxjax.config import PipelineConfig
from fluxjax.diff.layers import Layer, Outputs, captured, common_name, pair_layers, recorded
from fluxjax.diff.report import Report, compare, relative_l2
from fluxjax.models.autoencoder import Autoencoder
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.t5 import T5Encoder
from fluxjax.parallel.mesh import batch_parts, batch_sharding, make_mesh
from fluxjax.parallel.networks import on_mesh
from fluxjax.parallel.rules import param_shardings

Network = Literal["transformer", "vae", "text_encoder", "text_encoder_2"]
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


@dataclass(frozen=True)
class Comparison:
    """How one network is built, fed and called on both sides.

    `inputs(config)`: numpy inputs by name. `theirs(model, tensors)`: PyTorch's outputs by name.
    `ours(dtype)` builds the linen module; `outputs(returned)` names what its `method` returns.
    """

    library: str
    class_name: str
    inputs: Callable[[PipelineConfig], Arrays]
    theirs: Callable[[Any, dict[str, Any]], dict[str, Any]]
    ours: Callable[..., Any]
    outputs: Callable[[Any], dict[str, jax.Array]]
    method: Callable[..., Any] | None = None


def _transformer_inputs(config: PipelineConfig, rows: int = 6, columns: int = 5) -> Arrays:
    # More image than text tokens, so that a mix-up of the two shows in the shapes.
    c = config.transformer
    random = np.random.default_rng(0)
    text, image = 12, rows * columns
    img_ids = np.zeros((rows, columns, 3), np.float32)
    img_ids[..., 1] = np.arange(rows)[:, None]
    img_ids[..., 2] = np.arange(columns)[None, :]
    inputs = {
        "hidden_states": random.standard_normal((2, image, c.in_channels)),
        "encoder_hidden_states": random.standard_normal((2, text, c.joint_attention_dim)),
        "pooled_projections": random.standard_normal((2, c.pooled_projection_dim)),
        # Exact in bfloat16 also after the multiplication by 1000: 3.5 would become 3504 there, and
        # float32 be no reference for it.
        "timestep": np.array([0.5, 0.25]),
        "img_ids": img_ids.reshape(image, 3),
        "txt_ids": np.zeros((text, 3)),
    }
    if c.guidance_embeds:
        inputs["guidance"] = np.array([1.0, 0.5])
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def _vae_inputs(config: PipelineConfig) -> Arrays:
    c = config.vae
    random = np.random.default_rng(0)
    h, w = 8, 12
    image = random.uniform(-1, 1, (2, h * c.scale, w * c.scale, c.in_channels))
    latents = random.standard_normal((2, h, w, c.latent_channels))
    return {"image": image.astype(np.float32), "latents": latents.astype(np.float32)}


def _vae_theirs(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    image, latents = (tensors[k].movedim(-1, 1) for k in ("image", "latents"))
    moments = model.encode(image).latent_dist
    decoded = model.decode(latents).sample
    outputs = {"mean": moments.mean, "logvar": moments.logvar, "decoded": decoded}
    return {name: value.movedim(1, -1) for name, value in outputs.items()}


def _vae_ours(
    module: Autoencoder, image: jax.Array, latents: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    posterior = module.encode(image)
    return posterior.mean, posterior.logvar, module.decode(latents)


def _clip_inputs(config: PipelineConfig) -> Arrays:
    c = config.text_encoder
    random = np.random.default_rng(0)
    # With the published eos_token_id of 2 the end of text is the highest id; see models/clip.py.
    end = c.vocab_size - 1 if c.eos_token_id == 2 else c.eos_token_id
    ids = random.integers(3, c.vocab_size - 2, (2, c.max_position_embeddings))
    ids = np.where(ids == end, 3, ids)
    ids[0, 9:], ids[1, -1] = end, end
    return {"input_ids": ids.astype(np.int32)}


def _clip_theirs(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    output = model(tensors["input_ids"].long())
    return {
        "last_hidden_state": output.last_hidden_state,
        "pooler_output": output.pooler_output,
    }


def _t5_inputs(config: PipelineConfig) -> Arrays:
    c = config.text_encoder_2
    ids = np.random.default_rng(0).integers(
        2, c.vocab_size, (2, min(config.max_sequence_length, 256))
    )
    ids[0, 9:] = c.pad_token_id
    return {"input_ids": ids.astype(np.int32)}


COMPARISONS: dict[Network, Comparison] = {
    "transformer": Comparison(
        "diffusers",
        "FluxTransformer2DModel",
        _transformer_inputs,
        lambda model, x: {"sample": model(**x).sample},
        lambda config, **types: FluxTransformer(config.transformer, **types),
        lambda sample: {"sample": sample},
    ),
    "vae": Comparison(
        "diffusers",
        "AutoencoderKL",
        _vae_inputs,
        _vae_theirs,
        lambda config, **types: Autoencoder(config.vae, **types),
        lambda returned: dict(zip(("mean", "logvar", "decoded"), returned, strict=True)),
        _vae_ours,
    ),
    "text_encoder": Comparison(
        "transformers",
        "CLIPTextModel",
        _clip_inputs,
        _clip_theirs,
        lambda config, **types: CLIPTextModel(config.text_encoder, **types),
        lambda output: {
            "last_hidden_state": output.last_hidden_state,
            "pooler_output": output.pooler_output,
        },
    ),
    "text_encoder_2": Comparison(
        "transformers",
        "T5EncoderModel",
        _t5_inputs,
        lambda model, x: {"last_hidden_state": model(x["input_ids"].long()).last_hidden_state},
        lambda config, **types: T5Encoder(config.text_encoder_2, **types),
        lambda hidden: {"last_hidden_state": hidden},
    ),
}


def run_theirs(folder: Path, network: Network, inputs: Arrays, dtype: Dtype) -> list[Layer]:
    """Every layer of PyTorch's network and, last, its outputs, as float32 arrays."""
    torch = require_torch()
    comparison = COMPARISONS[network]
    read_sharded(folder / network)  # says in one sentence which file is missing or broken
    cls = getattr(importlib.import_module(comparison.library), comparison.class_name)
    model = cls.from_pretrained(
        str(folder / network), local_files_only=True, dtype=getattr(torch, dtype)
    ).eval()
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    # Ids and guidance stay float32, as in diffusers' pipeline; the network casts them itself.
    tensors = {
        k: v.to(getattr(torch, dtype))
        if v.is_floating_point() and k not in ("img_ids", "txt_ids", "guidance", "timestep")
        else v
        for k, v in tensors.items()
    }
    if "timestep" in tensors:  # FluxPipeline casts 1000 t, then divides
        tensors["timestep"] = (1000 * tensors["timestep"]).to(getattr(torch, dtype)) / 1000
    with torch.no_grad(), recorded(model) as layers:
        outputs = comparison.theirs(model, tensors)
    return layers + [Layer(OUTPUT + k, 0, (v.float().numpy(),)) for k, v in outputs.items()]


def run_ours(
    folder: Path, network: Network, inputs: Arrays, dtype: Dtype, mesh: str | None = None
) -> dict[str, list[Outputs]]:
    """Every captured layer and the outputs of our network by common name, as float32 arrays.

    On a mesh weights are split as the table of rules has it, the batch of two where it divides, and
    the transformer's tokens over `sequence`; its layers come back whole and in PyTorch's order.
    """
    comparison, config = COMPARISONS[network], read_config(folder)
    types = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    module = comparison.ours(config, **types)
    part = getattr(config, network)
    arrays = {k: jnp.asarray(v) for k, v in inputs.items()}
    types, places = {"stacked": False, "dtype": jnp.dtype(dtype)}, None
    if mesh is not None:
        devices = make_mesh(mesh)
        loaded = open_component(folder, network, part)
        places = param_shardings(template_of(part, loaded.tensors), devices)
        if not isinstance(module, Autoencoder):
            module = on_mesh(module, devices)
        elif len(arrays["image"]) % batch_parts(devices) == 0:
            arrays = jax.device_put(arrays, batch_sharding(devices))
    params = load_params(folder, network, part, shardings=places, **types)

    @jax.jit
    def run(params: Any, arrays: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], Any]:
        returned, state = module.apply(
            {"params": params},
            **arrays,
            method=comparison.method,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        return comparison.outputs(returned), state["intermediates"]

    # A GPU would otherwise multiply float32 in TF32.
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        outputs, intermediates = run(params, arrays)
    last = {OUTPUT + k: [(np.asarray(v.astype(jnp.float32)),)] for k, v in outputs.items()}
    return captured(intermediates) | last


def compare_network(
    folder: Path, network: Network, *, dtype: Dtype = "float32", against: Path | None = None,
    mesh: str | None = None,
) -> Report:  # fmt: skip
    """Compare one network of the pipeline folder; `against` gives ours its weights instead.

    `mesh`: devices that ours runs on, as `parallel.mesh.parse_mesh` reads them; by default one.

    float32: every layer within 1e-5. bfloat16: PyTorch's float32 is the reference of both; the
    outputs must be within 2e-2 and within 1.5 x PyTorch's own bfloat16 error, a layer inside
    within the larger of the two, since single layers scatter.
    """
    inputs = COMPARISONS[network].inputs(read_config(folder))
    layers = run_theirs(folder, network, inputs, "float32")
    ours = run_ours(against or folder, network, inputs, dtype, mesh)
    pairs = pair_layers(layers, ours)
    own: dict[str, float] = {}
    if dtype == "bfloat16":
        low = pair_layers(run_theirs(folder, network, inputs, "bfloat16"), ours)
        own = {
            pair.name: relative_l2(lower.reference, pair.reference)
            for pair, lower in zip(pairs, low, strict=True)
        }
    rows = []
    for pair in pairs:
        bound = FLOAT32_BOUND
        if pair.name in own:
            pick = min if pair.name.startswith(OUTPUT) else max
            bound = pick(BFLOAT16_BOUND, BFLOAT16_FACTOR * own[pair.name])
        rows.append(
            compare(pair.name, pair.ours, pair.reference, bound=bound, own_error=own.get(pair.name))
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
