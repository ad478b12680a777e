"""The stages of a pipeline, each usable alone: text, pictures and noise -> latents -> pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float

from fluxjax.config import ConfigError
from fluxjax.families.family import Conditioning, SkipLayers, Steps, Task
from fluxjax.parallel.mesh import gathered, pad_rows
from fluxjax.sample import noise
from fluxjax.sample.decoding import TILE, clip_decoder, decode_in_tiles, encode_clips
from fluxjax.sample.denoise import State, in_parts, wait
from fluxjax.sample.denoise_pictures import Drawn
from fluxjax.sample.given_pictures import NO_PICTURES, Given
from fluxjax.sample.network_runner import NetworkRunner
from fluxjax.sample.picture_inputs import NOTHING, Inputs, noise_of_steps, rows_of_pictures
from fluxjax.sample.programs import TEXT_ALONE, programs, tiled
from fluxjax.sample.reference import pixels, preferred_size
from fluxjax.sample.refusals import check_clip, check_guided, check_told
from fluxjax.sample.settings import Rounding, Settings
from fluxjax.sample.skip_layers import check_skip_layers, left_out_layers
from fluxjax.schedules.schedule import Schedule, pad, with_gains_in
from fluxjax.schedules.step_table import Run

if TYPE_CHECKING:
    from PIL.Image import Image


AnyArray = Array | np.ndarray
OnStep = Callable[[int, AnyArray], None]


class Stages(NetworkRunner):
    """What the networks of a model do on the way to a picture."""

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

    def check(self, settings: Settings, *, refines: bool = False) -> None:
        """Raises ConfigError for settings that the family does not have; `refines`: where it goes
        on with another one's latents."""
        check_clip(self.config, settings, self.defaults)
        scale = self.family.scale(self.config, settings.asked_guidance)
        check_skip_layers(self.config, settings.asked_skip_layers, scale)
        changed = refines or settings.image is not None
        self._check_told(settings, changed=changed)
        check_guided(settings, scale)
        if self.refiner is not None:
            self.refiner.check(settings)
        self.config.require_clip_skip(settings.clip_skip)
        self.run_of(settings)

    def _check_told(self, settings: Settings, *, changed: bool) -> None:
        """Raises ConfigError for what neither this model nor its refiner is told."""
        refines = None if self.refiner is None else self.refiner.pipe.config
        check_told(self.family, self.config, settings, self.defaults, refines, changed=changed)

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

    def run_of(self, settings: Settings, task: Task | None = None) -> Run:
        """The steps of a picture of `settings`; `task`: where pictures may be no files."""
        paints = task is not None and "mask" in task.pictures
        course = settings.course(self.family.first_step, paints=paints)
        return self.family.run(self.config, course, *self._state_shape(settings)[1:])

    def draw_each(
        self, settings: Settings, seeds: int | Sequence[int], count: int, task: Task
    ) -> dict[str, Float[np.ndarray, "_ c *size"]]:
        """All that is drawn for a task, see `Task.draws`, and then for each step of a sampler that
        draws, in order; BFL draws the noise alone."""
        shape = self._state_shape(settings)
        dtype = np.float32 if settings.rounding == "none" else self.dtype
        draws = ("noise",) if settings.rounding == "bfl" else task.drawn(settings.strength)
        steps = [f"step {i}" for i in np.flatnonzero(self.run_of(settings, task).draws)]
        if self.refiner is not None:
            steps += self.refiner.draws(settings)
        rows = {draw: task.row_count(draw, count) for draw in draws} | dict.fromkeys(steps, count)
        shapes = {draw: (rows[draw], *shape) for draw in rows}
        return noise.draw_each(seeds, shapes, kind=settings.noise, dtype=dtype)

    def task_of(self, settings: Settings, given: Given) -> Task:
        """Raises ConfigError, which says what the model takes, for pictures that it does not."""
        return self.family.find_task(self.config, given.names, noise_mask=settings.noise_mask)

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
        schedule = self._padded_schedule(course, inputs, rounding)
        passes = self._weights_of_passes(course, schedule, None if negative is None else true_cfg)
        conditionings = (conditioning, *[negative] * passes.shape[1])
        guidance = self.config.guidance if guidance is None else guidance
        each = rows_of_pictures(conditionings, guidance, inputs, noise)
        noises = noise_of_steps(course, schedule, noise, added or {})
        noise = self.start(noise, inputs, course)
        if self.mesh is not None:
            rows = self.executables.rows("denoise", count)
            noise, noises, *each = pad_rows((noise, noises, *each), rows)
        prompts = inputs.image_prompts
        drawn = Drawn(
            schedule,
            passes,
            *each,
            control_scales=tuple(one.scales(schedule) for one in inputs.controls),
            image_prompt_scales=() if prompts is None else prompts.scales,
            noise=noises,
            rescale=np.asarray(rescale, np.float32) if rescale else None,
            left_out=left_out_layers(self.config, skip_layers, schedule, steps, true_cfg),
        )
        state = (noise, *[np.zeros_like(noise)] * (schedule.latents - 1))
        chosen = self._chosen("denoise", count, adapters)
        program, params, hoisted = self._steps(state, drawn, chosen, rounding)

        def run(state: State, schedule: Schedule) -> State:
            return program(*params, state, drawn._replace(schedule=schedule), *hoisted)

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

    def _padded_schedule(self, course: Run, inputs: Inputs, rounding: Rounding) -> Schedule:
        schedule = pad(course.schedule if inputs.mask is None else course.keeping)
        if rounding == "diffusers" and not self.config.exact_steps:
            return with_gains_in(schedule, self.dtype)
        return schedule

    def _weights_of_passes(
        self, course: Run, schedule: Schedule, scale: Any
    ) -> Float[np.ndarray, "steps differences *frames"]:
        """Of the steps of the padded `schedule`; `scale`: of guidance, None: there is one pass."""
        passes = self.family.passes(len(course.schedule.times), scale)
        missing = len(schedule.times) - len(passes)
        return np.pad(passes, [(0, missing)] + [(0, 0)] * (passes.ndim - 1), mode="edge")

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
            task=self.task_of(settings, given),
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
