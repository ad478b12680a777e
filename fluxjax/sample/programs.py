"""The compiled programs of a pipeline, and compiling them in the background."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import PipelineConfig
from fluxjax.models import latents as layout
from fluxjax.models.autoencoder import Autoencoder, denormalize_latents, normalize_latents
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.compilation import compiler_options
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.lora import adapt
from fluxjax.models.t5 import T5Encoder
from fluxjax.parallel.activations import attention_on
from fluxjax.parallel.mesh import AXES, BATCH, batch_parts, place, replicated
from fluxjax.parallel.rules import state_shardings
from fluxjax.parallel.sequence import SequenceAttention
from fluxjax.sample import denoise as sampler
from fluxjax.sample.denoise import Conditioning, Guidance
from fluxjax.sample.settings import Rounding
from fluxjax.shapes import Params
from fluxjax.text.conditioning import encode_prompts

Name = Literal["encode", "reference", "denoise", "decode"]
COMPONENTS: dict[Name, tuple[str, ...]] = {
    "encode": ("text_encoder", "text_encoder_2"),
    "reference": ("vae",),
    "denoise": ("transformer",),
    "decode": ("vae",),
}
_OF_PICTURES = ("reference", "decode")
KEPT = 8  # executables of each name: one of a small model is 26 MB


@partial(jax.jit, static_argnames="model")
def denoise_pictures(
    model: FluxTransformer,
    params: Params,
    latents: Float[Array, "n c h w"],
    levels: Float[Array, "padded"],
    conditioning: Conditioning,
    guidance: Guidance,
    reference: Float[Array, "n c rows columns"] | None = None,
) -> Float[Array, "n c h w"]:
    """`denoise` from unpacked latents to unpacked latents; `reference` may have another size."""
    rows, columns = latents.shape[2:]
    ids = layout.image_ids(rows, columns)
    tokens = layout.pack(latents)
    if reference is not None:
        ids = jnp.concatenate([ids, layout.image_ids(*reference.shape[2:], index=1)])
        reference = layout.pack(reference)
    tokens = sampler.denoise(model, params, tokens, levels, conditioning, guidance, ids, reference)
    return layout.unpack(tokens, rows, columns)


@partial(jax.jit, static_argnames="model")
def decode_latents(
    model: Autoencoder, params: Params, latents: Float[Array, "n c h w"]
) -> Float[Array, "n height width 3"]:
    """Pictures, nominally in [-1, 1] and not clamped."""
    x = denormalize_latents(rearrange(latents, "n c h w -> n h w c"), model.config)
    picture: Any = model.apply({"params": params}, x.astype(model.dtype), method="decode")
    return picture


@partial(jax.jit, static_argnames="model")
def encode_pictures(
    model: Autoencoder, params: Params, pictures: Float[Array, "n height width 3"]
) -> Float[Array, "n c h w"]:
    """Of pictures in [-1, 1] the posterior mean, normalised as the transformer sees it."""
    posterior: Any = model.apply({"params": params}, pictures, method="encode")
    return rearrange(normalize_latents(posterior.mean, model.config), "n h w c -> n c h w")


class Programs:
    """Executables by program and shapes; two are compiled at a time.

    Of each program those of the KEPT shapes that were asked for last are kept.
    On a mesh the transformer and the text encoders are split as the table of rules has it, and the
    autoencoder's pictures over all devices.
    """

    def __init__(
        self,
        config: PipelineConfig,
        dtype: Any,
        scan_layers: bool,
        lora: Params | None = None,
        mesh: Mesh | None = None,
        sequence: SequenceAttention = "auto",
    ):
        self.config, self.dtype, self.scan_layers = config, jnp.dtype(dtype), scan_layers
        self.lora, self.mesh = lora, mesh
        self.sequence: SequenceAttention = sequence
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
        self._futures: dict[Name, OrderedDict[Any, Future]] = {
            name: OrderedDict() for name in COMPONENTS
        }

    def start(self, name: Name, *inputs: Any, rounding: Rounding = "diffusers") -> Future:
        """Begin to compile `name` for inputs of these shapes (arrays or ShapeDtypeStructs)."""
        specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        leaves, structure = jax.tree.flatten(specs)
        key, kept = (rounding, structure, tuple(leaves)), self._futures[name]
        if key not in kept:
            kept[key] = self._pool.submit(self._compile, name, rounding, specs)
        kept.move_to_end(key)
        while len(kept) > KEPT:
            kept.popitem(last=False)
        return kept[key]

    def get(self, name: Name, *inputs: Any, rounding: Rounding = "diffusers") -> Callable:
        """The executable, a function of (params of each of COMPONENTS, *inputs)."""
        return self.start(name, *inputs, rounding=rounding).result()

    def rows(self, name: Name, rows: int) -> int:
        """The batch that `name` runs for so many pictures or prompts: up to what can be split."""
        if self.mesh is None:
            return rows
        parts = self.mesh.size if name in _OF_PICTURES else batch_parts(self.mesh)
        return -(-rows // parts) * parts

    def modules(self, name: Name, rounding: Rounding = "diffusers") -> tuple[Any, ...]:
        """The networks that a program runs, in the order of COMPONENTS."""
        config = self.config
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.dtype}
        stacked = {**types, "scan_layers": self.scan_layers}
        if name in _OF_PICTURES:
            return (Autoencoder(config.vae, **types),)
        if name == "encode":
            clip = CLIPTextModel(config.text_encoder, **stacked)
            modules = clip, T5Encoder(config.text_encoder_2, **stacked)
        else:
            flux = FluxTransformer(config.transformer, **stacked, timestep_rounding=rounding)
            modules = (flux,)
        if self.mesh is None:
            return modules
        from fluxjax.parallel.networks import on_mesh

        return tuple(on_mesh(module, self.mesh, self.sequence) for module in modules)

    def _compile(self, name: Name, rounding: Rounding, specs: tuple) -> Any:
        functions: dict[Name, Any] = {
            "encode": encode_prompts,
            "reference": encode_pictures,
            "denoise": denoise_pictures,
            "decode": decode_latents,
        }
        function, modules = functions[name], self.modules(name, rounding)
        params = [self._shapes(component) for component in COMPONENTS[name]]
        if self.mesh is not None:
            function, specs = _split(function, name, len(modules), specs, self.mesh)
        # float32 means float32 on accelerators too, where JAX would multiply in less.
        precision: Any = "highest" if self.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            lowered = function.lower(*modules, *params, *specs)
            compiled = lowered.compile(compiler_options=compiler_options())
        return compiled if jax.process_count() == 1 else partial(_placed, compiled, specs)

    def _shapes(self, component: str) -> Params:
        stacked = self.scan_layers and component != "vae"
        template = abstract_params(getattr(self.config, component), stacked=stacked)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype), template)
        spec: Any = jax.ShapeDtypeStruct
        if component == "transformer" and self.lora is not None:
            lora = jax.tree.map(lambda leaf: spec(leaf.shape, leaf.dtype), self.lora)
            shapes = adapt(shapes, lora)
        if self.mesh is None:
            return shapes
        return jax.tree.map(
            lambda leaf, place: spec(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            state_shardings(shapes, self.mesh),
        )


def _placed(compiled: Any, specs: tuple, *arguments: Any) -> Any:
    """A program over several processes; it takes no arrays that only one of them holds."""
    count = len(arguments) - len(specs)
    places = jax.tree.map(lambda spec: spec.sharding, specs)
    return compiled(*arguments[:count], *place(arguments[count:], places))


def _split(function: Any, name: Name, modules: int, specs: tuple, mesh: Mesh) -> tuple[Any, tuple]:
    """`function`, jitted for `mesh`, and `specs` with shardings: batches split, the rest whole."""
    whole = replicated(mesh)
    batch = NamedSharding(mesh, P(AXES if name in _OF_PICTURES else BATCH))

    def spec(leaf: Any) -> Any:
        sharding = batch if leaf.ndim > 1 else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # Unwrapped: a trace made for one mesh must serve no other.
    body = whole_batch = function.__wrapped__
    if name in _OF_PICTURES:

        def body(model, params, inputs):
            # Gathered once: the pictures are large, the network is small.
            params = jax.lax.with_sharding_constraint(params, whole)
            with attention_on(mesh, AXES, None):
                return whole_batch(model, params, inputs)

    jitted = jax.jit(body, static_argnums=tuple(range(modules)), out_shardings=batch)
    return jitted, jax.tree.map(spec, specs)
