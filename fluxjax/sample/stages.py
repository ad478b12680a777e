"""The stages of a pipeline, each usable alone: text, pictures and noise -> latents -> pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fluxjax.checkpoint.templates import Part
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.config.choices import SequenceAttention
from fluxjax.families.family import Conditioning, Family, SkipLayers, Steps, Task
from fluxjax.networks import network_of
from fluxjax.parallel.mesh import gathered, pad_rows
from fluxjax.sample import noise
from fluxjax.sample.decoding import TILE, clip_decoder, decode_in_tiles, encode_clips
from fluxjax.sample.denoise import State, in_parts, wait
from fluxjax.sample.denoise_pictures import Drawn
from fluxjax.sample.executables import Executables
from fluxjax.sample.given_pictures import NO_PICTURES, Given
from fluxjax.sample.lora_slots import LoraSlots
from fluxjax.sample.picture_inputs import NOTHING, Inputs, kept, noise_of_steps
from fluxjax.sample.programs import (
    TEXT_ALONE,
    Name,
    components,
    defaults,
    of_components,
    programs,
    tiled,
)
from fluxjax.sample.reference import pixels, preferred_size
from fluxjax.sample.refusals import check_clip, check_told
from fluxjax.sample.settings import Rounding, Settings
from fluxjax.sample.skip_layers import check_skip_layers, left_out_layers
from fluxjax.sample.sources import Sources
from fluxjax.schedules.schedule import Schedule, pad, with_gains_in
from fluxjax.schedules.step_table import Run
from fluxjax.shapes import Params

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxjax.sample.ip_adapter import ImagePrompter
    from fluxjax.sample.redux import Redux
    from fluxjax.sample.refiner import Refiner
    from fluxjax.text.tokenizers import PromptTokenizer

PHASES = ("loading", "compiling", "encoding", "denoising", "decoding")
AnyArray = Array | np.ndarray
OnStep = Callable[[int, AnyArray], None]


class Stages:
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

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | None = None,
        prompt_3: str | None = None,
        *,
        max_sequence_length: int | None = None,
        clip_skip: int = 0,
        picture: Image | None = None,
        adapters: Sequence[Mapping[str, float]] | None = None,
    ) -> Conditioning:
        """Conditioning of one prompt or several; `prompt_2` and `prompt_3` are what the second and
        the third text encoder read instead of them, `clip_skip` how many of CLIP's last layers are
        left out. `picture`: what is seen beside the prompts, where a text encoder sees it.
        `adapters`: of each prompt, see `LoraSlots.each`."""
        length = max_sequence_length or self.config.max_sequence_length
        self.config.require_clip_skip(clip_skip)
        more: dict[str, Any] = {"clip_skip": clip_skip} if clip_skip else {}
        if picture is not None:
            more["picture"] = picture
        if prompt_3 is not None:
            self.config.require_third_prompt()
        with self._timed("loading"):
            if self._tokenizers is None:
                self._tokenizers = self._load_tokenizers()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        second = None if prompt_2 is None else [prompt_2] * len(prompts)
        if prompt_3 is not None:
            more["prompts_3"] = [prompt_3] * len(prompts)
        ids, notes = self.family.tokenize(
            self._tokenizers, prompts, second, max_sequence_length=length, **more
        )
        self.notes += notes
        return self._run("encode", ids, len(prompts), phase="encoding", adapters=adapters)

    def reference_size(self, picture: Image) -> tuple[int, int]:
        """(width, height) at which a reference is seen, about as large as the model's pictures."""
        return preferred_size(
            picture.width,
            picture.height,
            area=self.defaults.width * self.defaults.height,
            unit=self.config.unit,
        )

    def encode_reference(self, picture: Image) -> Float[np.ndarray, "1 c h w"]:
        """Latents of an RGB picture to edit, for `denoise`."""
        return self.encode_pictures(pixels(picture, *self.reference_size(picture)))

    def encode_pictures(
        self, pictures: Float[np.ndarray, "n height width 3"]
    ) -> Float[np.ndarray, "n c h w"]:
        """Normalised posterior means of pictures in [-1, 1]; `decode` leads back. Where clips are
        drawn each is a clip of one frame, whose latents have no axis of frames."""
        if self.config.tiling is not None:
            each = [self.encode_clips(one[None, None]) for one in pictures]
            return np.concatenate(each)[:, :, 0]
        return self._run("reference", pictures, len(pictures), phase="encoding")

    def encode_clips(
        self,
        clips: Float[np.ndarray, "n frames height width 3"],
        noise: Float[AnyArray, "n c t h w"] | None = None,
    ) -> Float[np.ndarray, "n c t h w"]:
        """Latents of clips in [-1, 1], as the transformer sees them: the posterior's means, or with
        `noise` its samples. `decode` leads back."""
        assert self.config.tiling is not None, "clips are for models that draw them"
        (params,), (model,) = self._networks("decode"), self.executables.modules("decode")
        with self._timed("encoding"):
            return encode_clips(model, params, clips, self.config.tiling, noise, mesh=self.mesh)

    def encode_posterior(
        self, pictures: Float[np.ndarray, "n height width 3"]
    ) -> tuple[Float[np.ndarray, "n c h w"], Float[np.ndarray, "n c h w"]]:
        """The posterior's mean and standard deviation, not normalised."""
        return self._run("posterior", pictures, len(pictures), phase="encoding")

    def draw_noise(
        self, settings: Settings, seeds: int | Sequence[int], count: int = 1
    ) -> Float[np.ndarray, "n c *size"]:
        """What a run of `count` pictures starts from; one seed draws all at once, as diffusers."""
        return self.draw_each(settings, seeds, count, TEXT_ALONE)["noise"]

    def check(self, settings: Settings) -> None:
        """Raises ConfigError for settings that the family does not have."""
        check_clip(self.config, settings, self.defaults)
        scale = self.family.scale(self.config, settings.asked_guidance)
        check_skip_layers(self.config, settings.asked_skip_layers, scale)
        check_told(self.family, self.config, settings)
        if self.refiner is not None:
            self.refiner.check(settings)
        self.config.require_clip_skip(settings.clip_skip)
        self.run_of(settings)

    def as_drawn(self, settings: Settings) -> Settings:
        """In the size that is drawn, which is not always that of the picture."""
        if not settings.size_bins:
            return settings
        width, height = self.config.drawn_size(settings.width, settings.height)
        return replace(settings, width=width, height=height)

    def _state_shape(self, settings: Settings) -> tuple[int, ...]:
        """Of the latents of one picture or clip."""
        drawn = self.as_drawn(settings)
        size = drawn.width, drawn.height, drawn.frames
        return self.family.shape_of(self.config, *size)

    def run_of(self, settings: Settings) -> Run:
        """The steps of a picture of `settings`."""
        shape = self._state_shape(settings)
        return self.family.run(self.config, settings.course(self.family.first_step), *shape[1:])

    def draw_each(
        self, settings: Settings, seeds: int | Sequence[int], count: int, task: Task
    ) -> dict[str, Float[np.ndarray, "_ c *size"]]:
        """All that is drawn for a task, see `Task.draws`, and then for each step of a sampler that
        draws, in order; BFL draws the noise alone."""
        shape = self._state_shape(settings)
        dtype = np.float32 if settings.rounding == "none" else self.dtype
        draws = ("noise",) if settings.rounding == "bfl" else task.drawn(settings.strength)
        steps = [f"step {i}" for i in np.flatnonzero(self.run_of(settings).draws)]
        if self.refiner is not None:
            steps += self.refiner.draws(settings)
        rows = {draw: task.row_count(draw, count) for draw in draws} | dict.fromkeys(steps, count)
        shapes = {draw: (rows[draw], *shape) for draw in rows}
        return noise.draw_each(seeds, shapes, kind=settings.noise, dtype=dtype)

    def start(
        self, noise: Float[AnyArray, "n c *size"], inputs: Inputs, run: Run
    ) -> Float[AnyArray, "n c *size"]:
        """The latents before the first step: noise, or an image with so much of it."""
        if inputs.image is None:
            return noise if run.scale == 1 else noise * noise.dtype.type(run.scale)
        image = np.broadcast_to(inputs.image, noise.shape).astype(noise.dtype)
        return self.family.started(image, noise, run).astype(noise.dtype)

    def denoise(
        self,
        conditioning: Conditioning,
        noise: Float[AnyArray, "n c *size"],
        *,
        steps: int | Sequence[float] | Steps | None = None,
        guidance: float | None = None,
        negative: Conditioning | None = None,
        true_cfg: Any = 1.0,
        inputs: Inputs = NOTHING,
        added: Mapping[str, AnyArray] | None = None,
        rescale: float = 0.0,
        skip_layers: SkipLayers | None = None,
        rounding: Rounding = "diffusers",
        adapters: Sequence[Mapping[str, float]] | None = None,
        progress: Callable[[int], None] | None = None,
        on_step: OnStep | None = None,
        every: int = 1,
    ) -> Float[AnyArray, "n c *size"]:
        """Latents from noise (see `draw_noise`), still normalised as the transformer sees them.

        `steps`: their number, or sigmas before the shift, or all about them. `guidance` is ignored
        by models without a guidance embedding; `true_cfg` is the weight of `negative`, or what the
        family's `scale` gives. `inputs`: of pictures that are given. `added`: what steps add, see
        `draw_each`. `rescale`: of guidance, as `skip_layers` see `Settings`. `adapters`: of each
        picture, see `LoraSlots.each`. `progress` and `on_step` cut the run in parts, and count the
        network's evaluations.
        """
        if every < 1:
            raise ConfigError(f"every must be at least 1 step, got {every}")
        count = noise.shape[0]
        if not isinstance(steps, Steps):
            steps = Steps(self.config.steps if steps is None else steps)
        course = self.family.run(self.config, steps, *noise.shape[2:])
        schedule = pad(course.schedule if inputs.mask is None else course.keeping)
        if rounding == "diffusers" and not self.config.exact_steps:
            schedule = with_gains_in(schedule, self.dtype)
        scale = None if negative is None else true_cfg
        passes = self.family.passes(len(course.schedule.times), scale)
        missing = len(schedule.times) - len(passes)
        passes = np.pad(passes, [(0, missing)] + [(0, 0)] * (passes.ndim - 1), mode="edge")
        many = passes.shape[1] + 1
        guidance = self.config.guidance if guidance is None else guidance

        def for_each(one: AnyArray | None) -> AnyArray | None:
            return None if one is None else np.broadcast_to(one, (count, *one.shape[1:]))

        prompts = inputs.image_prompts
        conditionings = (conditioning, *[negative] * (many - 1))
        channels = inputs.of_passes(many)
        each: Any = (
            conditionings,
            np.full(count, guidance, np.float32),
            for_each(inputs.reference),
            channels and tuple(map(for_each, channels)),
            kept(inputs, noise),
            tuple(one.rows(count) for one in inputs.controls),
            () if prompts is None else prompts.rows(count),
        )
        scales = tuple(one.scales(schedule) for one in inputs.controls)
        noises = noise_of_steps(course, schedule, noise, added or {})
        noise = self.start(noise, inputs, course)
        if self.mesh is not None:
            rows = self.executables.rows("denoise", count)
            noise, noises, *each = pad_rows((noise, noises, *each), rows)
        seen = () if prompts is None else prompts.scales
        share = np.asarray(rescale, np.float32) if rescale else None
        left = left_out_layers(self.config, skip_layers, schedule, steps, true_cfg)
        drawn = Drawn(
            schedule,
            passes,
            *each,
            control_scales=scales,
            image_prompt_scales=seen,
            noise=noises,
            rescale=share,
            left_out=left,
        )
        state = (noise, *[np.zeros_like(noise)] * (schedule.latents - 1))
        chosen = self._chosen("denoise", count, adapters)
        program, params, each = self._steps(state, drawn, chosen, rounding)

        def run(state: State, schedule: Schedule) -> State:
            return program(*params, state, drawn._replace(schedule=schedule), *each)

        def latents(state: Any) -> AnyArray:
            return state[0] if self.mesh is None else gathered(state[0])[:count]

        with self._timed("denoising"):
            if progress is None and on_step is None:
                return latents(wait(run(state, schedule)))
            state = in_parts(
                run,
                state,
                schedule,
                progress=progress,
                every=every,
                on_step=on_step and (lambda step, state: on_step(step, latents(state))),
            )
            return latents(state)

    def decode(
        self, latents: Float[AnyArray, "n c *size"], *, tile: int | None = None
    ) -> Float[np.ndarray, "n *frames height width 3"]:
        """Pictures or clips, nominally in [-1, 1]; `pictures.to_bytes` makes bytes of them.

        Beyond 2048 x 2048 pixels, or with `tile` latents given, pictures are decoded in tiles:
        slower, with the memory of one tile; on a mesh every device decodes tiles. Clips are cut as
        the original code cuts them.
        """
        if self.config.tiling is not None:
            return np.concatenate([*self.clip_decoder()(latents)], axis=1)
        if tile is None and not tiled(*latents.shape[2:]):
            return self._run("decode", latents, len(latents), phase="decoding")
        (params,), (model,) = self._networks("decode"), self.executables.modules("decode")
        with self._timed("decoding"):
            return decode_in_tiles(model, params, latents, tile=tile or TILE, mesh=self.mesh)

    def clip_decoder(
        self,
    ) -> Callable[[AnyArray], Iterator[Float[np.ndarray, "n frames height width 3"]]]:
        """What decodes latents of clips to groups of frames, one after the other as they are asked
        for. Of several processes all call this; only those that want frames ask for them."""
        assert self.config.tiling is not None, "clips are for models that draw them"
        (params,), (model,) = self._networks("decode"), self.executables.modules("decode")
        decode = clip_decoder(model, params, self.config.tiling, mesh=self.mesh)

        def groups(latents: AnyArray) -> Iterator[np.ndarray]:
            each = decode(latents)
            while True:
                with self._timed("decoding"):
                    group = next(each, None)
                if group is None:
                    return
                yield group

        return groups

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

    def prepare(
        self,
        settings: Settings,
        count: int = 1,
        given: Given = NO_PICTURES,
        *,
        more_text: int = 0,
        course: Steps | None = None,
    ) -> None:
        """Start to compile, in the background, every program that `count` pictures will need.

        `more_text`: tokens beside those of the prompt. `course`: the steps, if not the settings'.
        """
        prompter = self.image_prompter
        seen = given.reference and self.reference_size(given.reference)
        for program in programs(
            self.family,
            self.config,
            self.as_drawn(settings),
            dtype=self.dtype,
            task=self.family.find_task(self.config, given.names),
            pictures=count,
            reference_size=seen,
            rows=self.executables.rows,
            more_text=more_text,
            image_prompts=prompter.shapes(len(given.ip_images)) if prompter else (),
            course=course,
        ):
            if program.name == "decode" and self.refiner is not None:
                continue
            apart = self.offload and program.name == "denoise"
            for one in self.executables.split(program) if apart else (program,):
                self.executables.start(one)

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
