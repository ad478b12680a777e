"""Programs compiled, in the background and on meshes; each only once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.checkpoint import mapped_memory as memory
from fluxjax.checkpoint.templates import Part, abstract_params, in_dtype, part_of
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.config.choices import SequenceAttention
from fluxjax.families.family import Family
from fluxjax.models.absent import is_node
from fluxjax.models.compilation import compiler_options
from fluxjax.models.dynamic_product import is_dynamic
from fluxjax.models.lora import adapt
from fluxjax.models.products import TILED, Precision
from fluxjax.networks import network_of
from fluxjax.parallel.activations import attention_on
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.host_memory import with_places
from fluxjax.parallel.mesh import AXES, BATCH, batch_parts, place, replicated
from fluxjax.parallel.rules import state_shardings
from fluxjax.sample.denoise_pictures import WHOLE, Drawn
from fluxjax.sample.lora_slots import LoraSlots
from fluxjax.sample.programs import (
    NAMES,
    OF_PICTURES,
    OF_RUNS,
    Name,
    Program,
    of_components,
    program,
)
from fluxjax.sample.settings import Rounding
from fluxjax.shapes import Params

KEPT = 8  # executables of each name: one of a small model is 26 MB


class Executables:
    """Of a model's programs those of the KEPT shapes of each that were asked for last; two are
    compiled at a time.

    On a mesh the network that draws and the text encoders are split by the roles of their layers,
    and the autoencoder's pictures over all devices. `quantised`: of components some of whose
    weights are codes, the shapes of their parameters. `stream`: those of the network that draws lie
    on the host. `one_cpu`: the programs run there, where weights that are not float32 are converted
    for their products: a little at a time.
    Raises ConfigError where there is nothing to stream.
    """

    def __init__(
        self,
        family: Family,
        config: PipelineConfig,
        dtype: Any,
        scan_layers: bool,
        lora: Params | None = None,
        mesh: Mesh | None = None,
        sequence: SequenceAttention = "auto",
        slots: LoraSlots | None = None,
        quantised: Mapping[str, Params] | None = None,
        stream: bool = False,
        one_cpu: bool = False,
    ):
        denoiser = network_of(config.networks[config.denoiser])
        if stream and not denoiser.scanned:
            raise ConfigError(
                f"stream brings one of many equal blocks at a time, and a {denoiser.words} has "
                "none: take offload, or quantise"
            )
        self.stream = stream
        self.quantised = quantised or {}
        self.family, self.config = family, config
        self.dtype, self.scan_layers = jnp.dtype(dtype), scan_layers
        converted = self.dtype != jnp.float32 or bool(self.quantised)
        self.precision: Precision = TILED if one_cpu and converted else None
        self.lora, self.slots, self.mesh = lora, slots, mesh
        self.sequence: SequenceAttention = sequence
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
        self._futures: dict[Name, OrderedDict[Any, Future]] = {n: OrderedDict() for n in NAMES}

    def start(self, program: Program) -> Future:
        """Begin to compile it."""
        leaves, structure = jax.tree.flatten(program.inputs)
        key, kept = (program.rounding, structure, tuple(leaves)), self._futures[program.name]
        if key not in kept:
            kept[key] = self._pool.submit(self.compile, program)
        kept.move_to_end(key)
        while len(kept) > KEPT:
            kept.popitem(last=False)
        return kept[key]

    def get(self, name: Name, *inputs: Any, rounding: Rounding = "diffusers") -> Callable:
        """The executable for inputs of these shapes, a function of (*params, *inputs), see
        `of_components`."""
        return self.start(program(self.family, name, *inputs, rounding=rounding)).result()

    def rows(self, name: Name, rows: int) -> int:
        """The batch that `name` runs for so many pictures or prompts: up to what can be split."""
        if self.mesh is None:
            return rows
        parts = self.mesh.size if name in OF_PICTURES else batch_parts(self.mesh)
        return -(-rows // parts) * parts

    def modules(self, name: Name, rounding: Rounding = "diffusers") -> tuple[Any, ...]:
        """The networks that a program runs, see `of_components`."""
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.dtype}
        if name not in OF_PICTURES:
            types["precision"] = self.precision
        if name in OF_RUNS:
            fields = {**types, "scan_layers": self.scan_layers}
            return self.family.networks(self.config, rounding, **fields)

        def built(component: str) -> Any:
            config = self.config.networks[component]
            return network_of(config).build(config, scan_layers=self.scan_layers, **types)

        return of_components(self.config, name, built)

    def compile(self, program: Program, options: Mapping[str, str] | None = None) -> Any:
        """Now and in this thread; `get` keeps what it makes, this does not. `options`: more of the
        compiler's."""
        static = (*program.static, *self.modules(program.name, program.rounding))
        params = self.with_slots(program.name, self.arguments(program), self._slots_of(program))
        function, inputs = program.function, program.inputs
        if self.mesh is not None:
            function, inputs = _split(program, len(static), self.mesh, self.sequence)
        chosen = compiler_options(self.precision, integers=any(map(is_dynamic, _nodes(params))))
        chosen = {**chosen, **(options or {})}
        compiled = function.lower(*static, *params, *inputs).compile(compiler_options=chosen)
        if self.precision == TILED:  # what was lowered is gone too
            memory.release()
        return compiled if jax.process_count() == 1 else partial(_placed, compiled, inputs)

    def with_slots(
        self, name: Name, params: tuple[Any, ...], tree: Callable[[str], Any]
    ) -> tuple[Any, ...]:
        """The parameters of a program, with `tree` of its component beside those of each network
        that has slots for adapters."""
        if self.slots is None or name not in ("encode", *OF_RUNS):
            return params
        if name != "encode":
            return adapt(params[0], tree(self.config.denoiser)), *params[1:]
        each = zip(params[0], self.config.text_encoders, strict=True)
        own = self.slots.components
        return (tuple(adapt(w, tree(one)) if one in own else w for w, one in each),)

    def _slots_of(self, program: Program) -> Callable[[str], Any]:
        def shapes(component: str) -> Any:
            assert self.slots is not None
            rows = jax.tree.leaves(program.inputs[0])[0].shape[0]
            return self.slots.shapes(component, rows)

        return shapes

    def weights(self, component: str) -> Any:
        """Shapes of a component's parameters, without a LoRA; of each of the `controlnets`."""
        if component in self.quantised:
            return in_dtype(self.quantised[component], self.dtype)
        templates = (
            abstract_params(one, stacked=self.scan_layers and bool(network_of(one).scanned))
            for one in self.config.of(component)
        )
        each = tuple(in_dtype(template, self.dtype) for template in templates)
        return each if component == "controlnets" else each[0]

    def split(self, denoise: Program) -> tuple[Program, Program]:
        """The same in two: what is done before the steps, and the steps."""
        of = partial(program, self.family, rounding=denoise.rounding)
        before = of("before", *denoise.inputs)
        static = (*before.static, *self.modules("before", denoise.rounding))
        function: Any = partial(before.function, *static)
        each = jax.eval_shape(function, *self.arguments(before), *denoise.inputs)
        return before, of("denoise", *denoise.inputs, each)

    def arguments(self, program: Program) -> tuple[Any, ...]:
        """Shapes of the parameters that a program is given; without slots."""
        shapes = partial(self.shapes, part=program.part)
        return of_components(self.config, program.name, shapes)

    def shapes(self, component: str, part: Part = "all") -> Any:
        """Of the parameters that a program is given of a component, and where they lie."""
        if component == "controlnets":
            return tuple(map(self._given, self.config.controlnets, self.weights(component)))
        config, denoises = self.config.networks[component], component == self.config.denoiser
        shapes = part_of(self.weights(component), config, part)
        if denoises and self.stream:
            shapes = with_places(shapes)
        if denoises and self.lora is not None:
            shapes = adapt(shapes, jax.tree.map(_spec, self.lora))
        return self._given(config, shapes)

    def _given(self, config: Any, shapes: Params) -> Params:
        """On the mesh by the roles of the network's layers."""
        if self.mesh is None:
            return shapes
        return jax.tree.map(_spec, shapes, state_shardings(config, shapes, self.mesh))


def _nodes(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=is_node)


def _spec(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(compiled: Any, specs: tuple, *arguments: Any) -> Any:
    """A program over several processes; it takes no arrays that only one of them holds."""
    count = len(arguments) - len(specs)
    places = jax.tree.map(lambda spec: spec.sharding, specs)
    return compiled(*arguments[:count], *place(arguments[count:], places))


def _split(
    program: Program, static: int, mesh: Mesh, sequence: SequenceAttention
) -> tuple[Any, tuple]:
    """The function, jitted for `mesh`, and its inputs with shardings: batches split, the rest
    whole."""
    whole, of_pictures = replicated(mesh), program.name in OF_PICTURES
    batch = NamedSharding(mesh, P(AXES if of_pictures else BATCH))

    def placed(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    inputs = placed(program.inputs, batch)
    if program.name == "denoise":
        drawn: Drawn = program.inputs[1]
        tables = {name: placed(getattr(drawn, name), whole) for name in WHOLE}
        inputs = inputs[0], inputs[1]._replace(**tables)
    # Unwrapped: a trace made for one mesh must serve no other.
    function = program.function.__wrapped__
    if of_pictures:

        def body(model, params, inputs):
            # Gathered once: the pictures are large, the network is small.
            params = jax.lax.with_sharding_constraint(params, whole)
            with attention_on(mesh, AXES, None):
                return function(model, params, inputs)
    else:
        body = partial(function, apply=partial(apply_on, mesh, sequence=sequence))

    return jax.jit(body, static_argnums=tuple(range(static)), out_shardings=batch), inputs
