"""The networks of a pipeline at work: weights when they are needed, programs compiled once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fluxjax.checkpoint.templates import Part
from fluxjax.config import PipelineConfig
from fluxjax.config.choices import SequenceAttention
from fluxjax.families.family import Family
from fluxjax.networks import network_of
from fluxjax.parallel.mesh import gathered, pad_rows
from fluxjax.sample.denoise import State, wait
from fluxjax.sample.denoise_pictures import Drawn
from fluxjax.sample.executables import Executables
from fluxjax.sample.lora_slots import LoraSlots
from fluxjax.sample.programs import Name, components, defaults, of_components
from fluxjax.sample.settings import Rounding
from fluxjax.sample.sources import Sources
from fluxjax.shapes import Params

if TYPE_CHECKING:
    from fluxjax.sample.ip_adapter import ImagePrompter
    from fluxjax.sample.redux import Redux
    from fluxjax.sample.refiner import Refiner
    from fluxjax.text.tokenizers import PromptTokenizer

PHASES = ("loading", "compiling", "encoding", "denoising", "decoding")


class NetworkRunner:
    """Networks, tokenizers and compiled programs of one model.

    Weights are loaded when they are first needed, programs compiled once per shape, in the
    background while weights load. With `offload` no other networks are on the device than those
    that are at work, and of the transformer no modulations in its steps; they are read again when
    they are needed again. `load_params` takes a component and a `Part`. `seconds` adds up what each
    of PHASES kept the caller waiting; `notes` collects remarks for the user.
    """

    def __init__(
        self,
        family: Family,
        config: PipelineConfig,
        load_params: Callable[..., Params],
        load_tokenizers: Callable[[], tuple[PromptTokenizer, ...]],
        *,
        dtype: Any,
        scan_layers: bool = True,
        lora: Params | None = None,
        slots: LoraSlots | None = None,
        mesh: Mesh | None = None,
        sequence: SequenceAttention = "auto",
        quantised: Mapping[str, Params] | None = None,
        offload: bool = False,
        stream: bool = False,
        sources: Sources | None = None,
        redux: Redux | None = None,
        image_prompter: ImagePrompter | None = None,
        control_scales: Sequence[float] = (),
    ):
        self.family, self.config = family, config
        self.defaults = defaults(config)
        self.dtype = jnp.dtype(dtype)
        self.mesh = mesh
        self.executables = Executables(
            family,
            config,
            dtype,
            scan_layers,
            lora=lora,
            mesh=mesh,
            sequence=sequence,
            slots=slots,
            quantised=quantised,
            stream=stream,
            one_cpu=mesh is None and jax.default_backend() == "cpu",
        )
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.notes: list[str] = []
        self.sources, self.slots, self.redux = sources, slots, redux
        self.image_prompter = image_prompter
        self.refiner: Refiner | None = None
        """What draws the last steps, where another model does."""
        self.offload = offload
        self.control_scales = tuple(control_scales)
        """Of each ControlNet, unless a call says otherwise."""
        self._load_params, self._load_tokenizers = load_params, load_tokenizers
        self._tokenizers: tuple[PromptTokenizer, ...] | None = None
        self._params: dict[str, Any] = {}

    def is_loaded(self, component: str) -> bool:
        return component in self._params

    def params(self, component: str) -> Any:
        """Parameters of one of the pipeline's networks, by the name of its folder, or of each of
        the `controlnets`.

        With a LoRA those of the network that draws are `fluxjax.models.lora.adapt`'s.
        """
        if component == "controlnets" and not self.config.controlnets:
            return ()
        if component not in self._params:
            self._params[component] = self._loaded(component)
        return self._params[component]

    def release(self) -> None:
        """Take all networks off the device; they are read again when they are needed again."""
        self._params.clear()

    def use(self, component: str, params: Any) -> None:
        """Take `params` in place of those that there are, of the same shapes; a component as of
        `params`."""
        self._params[component] = params

    def _chosen(
        self, name: Name, count: int, adapters: Sequence[Mapping[str, float]] | None
    ) -> Callable[[str], Any]:
        """Of a component the adapters of so many pictures or prompts, in slots."""
        more = self.executables.rows(name, count) - count
        each = [*(adapters or [{}] * count), *[{}] * more]

        def tree(component: str) -> Any:
            assert self.slots is not None
            return self.slots.choose(component, each)

        return tree

    def _steps(
        self, state: State, drawn: Drawn, chosen: Callable[[str], Any], rounding: Rounding
    ) -> tuple[Callable, tuple, tuple]:
        """The program of the steps, its parameters, and what has been done before the steps."""
        denoiser, with_slots = self.config.denoiser, self.executables.with_slots
        if not (self.offload and network_of(self.config.networks[denoiser]).before_steps):
            program = self._executable("denoise", state, drawn, rounding=rounding)
            return program, with_slots("denoise", self._networks("denoise"), chosen), ()
        self._params.clear()
        controlnets = self.params("controlnets")
        before = self._executable("before", state, drawn, rounding=rounding)
        params = with_slots("before", (self._loaded(denoiser, "before"), controlnets), chosen)
        each = wait(before(*params, state, drawn))
        del params
        program = self._executable("denoise", state, drawn, each, rounding=rounding)
        params = self._loaded(denoiser, "steps"), controlnets
        return program, with_slots("denoise", params, chosen), (each,)

    def _networks(self, name: Name) -> tuple[Any, ...]:
        """The parameters of a program; with `offload` no others stay."""
        if self.offload:
            for component in self._params.keys() - set(components(self.config, name)):
                del self._params[component]
        return of_components(self.config, name, self.params)

    def _loaded(self, component: str, part: Part = "all") -> Any:
        with self._timed("loading"):
            return self._load_params(component, part)

    def _run(
        self,
        name: Name,
        inputs: Any,
        count: int,
        *,
        phase: str,
        adapters: Sequence[Mapping[str, float]] | None = None,
    ) -> Any:
        chosen = self._chosen(name, count, adapters)
        params = self.executables.with_slots(name, self._networks(name), chosen)
        if self.mesh is not None:
            inputs = pad_rows(inputs, self.executables.rows(name, count))
        program = self._executable(name, inputs)
        with self._timed(phase):
            return jax.tree.map(lambda x: gathered(wait(x))[:count], program(*params, inputs))

    def _executable(self, name: Name, *inputs: Any, rounding: Rounding = "diffusers") -> Callable:
        with self._timed("compiling"):
            return self.executables.get(name, *inputs, rounding=rounding)

    @contextmanager
    def _timed(self, phase: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
