"""A picture's way: prompts and what is given -> conditioning -> latents -> pixels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from fluxjax.config import ConfigError
from fluxjax.families.family import Conditioning, Task, Told
from fluxjax.sample.controls import check_controls
from fluxjax.sample.decoding import without_first
from fluxjax.sample.given_clips import check_given, clip_inputs, clip_size, with_given
from fluxjax.sample.given_pictures import Given, read_given
from fluxjax.sample.ip_adapter import check_image_prompts
from fluxjax.sample.lora_slots import LoraChoice
from fluxjax.sample.picture_inputs import Inputs, finished, make_inputs
from fluxjax.sample.pictures import in_size, to_bytes
from fluxjax.sample.programs import NAMES, components
from fluxjax.sample.redux import Heard
from fluxjax.sample.reference import whole_size
from fluxjax.sample.refiner import Calls, completed
from fluxjax.sample.refusals import check_clip, check_guided
from fluxjax.sample.settings import FIELDS, Settings
from fluxjax.sample.skip_layers import check_skip_layers
from fluxjax.sample.stages import AnyArray, OnStep, Stages
from fluxjax.sample.undecoded import Undecoded

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxjax.sample.picture_reader import PictureReader


class Asked(NamedTuple):
    """What `Drawing.draw` is asked for besides settings, as it describes it."""

    prompts: Sequence[str] | None = None
    seeds: int | Sequence[int] | None = None
    number: int = 1
    given: Given | None = None
    lora: LoraChoice | None = None
    heard: Sequence[Heard] = ()
    progress: Callable[[int], None] | None = None
    on_step: OnStep | None = None
    every: int = 1


class Drawing(Stages):
    """All stages in a row, from complete settings to pictures as bytes."""

    def complete(self, settings: Settings, given: Given, fixed: Collection[str]) -> Settings:
        """With what follows from the pictures where it is not `fixed`: size and strength.

        Raises ConfigError, which says what the model takes, for pictures that it does not.
        """
        task = self.task_of(settings, given)
        check_controls(self.config, settings, given)
        check_image_prompts(self.image_prompter, settings, given)
        settings = completed(self.refiner, settings, given)
        if task.strength is None and settings.strength is not None:
            raise ConfigError("strength says how much of an image is drawn anew: give an image")
        if self.config.tiling is not None:
            check_given(self.config, given, settings)
        size = dict(zip(("width", "height"), self.picture_size(given), strict=True))
        found: dict[str, Any] = {name: size[name] for name in size if name not in fixed}
        if not given.names:
            found = {}
        if settings.rounding == "bfl" and task.bfl_text and "max_sequence_length" not in fixed:
            found["max_sequence_length"] = min(settings.max_sequence_length, task.bfl_text)
        strength = settings.strength if settings.strength is not None else task.strength
        return replace(settings, strength=strength, **found)

    def require_mask_read(self, settings: Settings, given: Given) -> None:
        """Raises ConfigError where a noise mask is turned off that there is not anyway."""
        if not self.defaults.noise_mask:
            self.task_of(settings, given).with_noise_mask()

    def draw(
        self,
        settings: Settings,
        *,
        prompts: Sequence[str] | None = None,
        seeds: int | Sequence[int] | None = None,
        number: int = 1,
        given: Given | None = None,
        lora: LoraChoice | None = None,
        heard: Sequence[Heard] = (),
        progress: Callable[[int], None] | None = None,
        on_step: OnStep | None = None,
        every: int = 1,
    ) -> UInt8[np.ndarray, "n *frames rows columns 3"]:
        """Pictures, or clips of several frames, of `settings` as bytes; what else is given stands
        in for what is in it.

        `heard`: pictures for Redux and their weights. Arguments and errors are those of `__call__`.
        """
        asked = Asked(prompts, seeds, number, given, lora, heard, progress, on_step, every)
        drawn = self._drawn(settings, asked)
        settings, pictures = drawn.settings, drawn.stages.decode(drawn.latents)
        if self.offload and drawn.stages is not self:
            drawn.stages.release()
        drawn.require_finite(self.config, pictures)
        if self.config.tiling is not None:
            clips = to_bytes(pictures[:, self.config.dropped_frames :], settings.rounding)
            return clips if settings.frames > 1 else clips[:, 0]
        resized = in_size(pictures, *drawn.size)
        return finished(to_bytes(resized, settings.rounding), drawn.given, settings)

    def draw_clips(
        self, settings: Settings, **options: Any
    ) -> list[Iterator[UInt8[np.ndarray, "frames rows columns 3"]]]:
        """As `draw`, whose options these are, of each clip its frames: group after group, decoded
        as they are asked for, so that no more than one is held. How many frames a group has is the
        tiling's. Of several processes only those that want frames ask for them."""
        drawn = self._drawn(settings, Asked(**options))
        decode = drawn.stages.clip_decoder()

        def frames(latents: AnyArray) -> Iterator[np.ndarray]:
            for group in without_first(self.config.dropped_frames, decode(latents)):
                drawn.require_finite(self.config, group)
                yield to_bytes(group, drawn.settings.rounding)[0]

        return [frames(drawn.latents[i : i + 1]) for i in range(len(drawn.latents))]

    def _drawn(self, settings: Settings, asked: Asked) -> Undecoded:
        """Latents of what `draw` is asked for."""
        check_clip(self.config, settings, self.defaults)
        prompts = [settings.prompt] if asked.prompts is None else asked.prompts
        number, count = asked.number, len(prompts) * asked.number
        if count < 1:
            raise ConfigError(f"there is nothing to draw: {len(prompts)} prompts, {number} each")
        adapters = self._adapters(asked.lora, len(prompts), number)
        self._require_redux(asked.heard)
        given = asked.given
        if given is None:
            given, settings = read_given(settings)
        changed = given.image is not None
        self._check_told(settings, changed=changed)
        settings = self.complete(settings, given, FIELDS)
        size, settings = (settings.width, settings.height), self.as_drawn(settings)
        task = self.task_of(settings, given)
        guidance = settings.asked_guidance._replace(pictures=task.pictures)
        scale = self.family.scale(self.config, guidance)
        check_skip_layers(self.config, settings.asked_skip_layers, scale)
        check_guided(settings, scale)
        seeds = settings.seed if asked.seeds is None else asked.seeds
        draws = self.draw_each(settings, seeds, count, task)
        self._compile_and_load(settings, count, given, asked.heard)
        conditioning, negative = self.hear(
            settings,
            prompts,
            number,
            scale,
            adapters,
            given.reference if task.heard else None,
            changed=changed,
        )
        conditioning = self._with_redux(conditioning, asked.heard)
        inputs = self._inputs(task, given, settings, draws)
        inputs = self._with_image_prompts(inputs, given, settings, 1 if scale is None else 2)
        latents = self.denoise(
            conditioning,
            draws["noise"],
            steps=settings.course(self.family.first_step, paints="mask" in task.pictures),
            guidance=settings.guidance,
            negative=negative,
            true_cfg=scale,
            inputs=inputs,
            added=draws,
            rescale=settings.guidance_rescale,
            skip_layers=settings.asked_skip_layers,
            rounding=settings.rounding,
            adapters=adapters,
            progress=asked.progress,
            on_step=asked.on_step,
            every=asked.every,
        )
        last: Stages = self
        if self.refiner is not None:
            if self.offload:
                self.release()
            done = self.run_of(settings).evaluations
            calls = Calls(done, asked.progress, asked.on_step, asked.every)
            latents = self.refiner.refine(latents, settings, prompts, number, draws, calls)
            last = self.refiner.pipe
        if self.config.tiling is not None and not self.config.dropped_frames:
            latents = with_given(latents, inputs, given, settings)
        return Undecoded(latents, settings, size, given, inputs, (conditioning, negative), last)

    def _compile_and_load(
        self, settings: Settings, count: int, given: Given, heard: Sequence[Heard]
    ) -> None:
        """Reads the weights while the programs compile."""
        more = self.redux.count if self.redux is not None and heard else 0
        self.prepare(settings, count, given, more_text=more)
        if self.refiner is not None:
            self.refiner.prepare(settings, count)
        if not self.offload:
            for name in NAMES:
                for component in components(self.config, name):
                    self.params(component)

    def _with_redux(self, conditioning: Conditioning, heard: Sequence[Heard]) -> Conditioning:
        """And what is `heard` through FLUX.1 Redux."""
        if self.redux is None or not heard:
            return conditioning
        with self._timed("encoding"):
            conditioning = self.redux.heard(conditioning, heard)
        self._leave(self.redux.reader)
        return conditioning

    def _with_image_prompts(
        self, inputs: Inputs, given: Given, settings: Settings, passes: int
    ) -> Inputs:
        """And what IP-Adapters see."""
        if self.image_prompter is None:
            return inputs
        with self._timed("encoding"):
            seen = self.image_prompter.prompts(given, settings, passes)
        self._leave(self.image_prompter.reader)
        return inputs._replace(image_prompts=seen)

    def _leave(self, reader: PictureReader) -> None:
        if self.offload:
            reader.release()

    def _require_redux(self, heard: Sequence[Heard]) -> None:
        if heard and self.redux is None:
            raise ConfigError(
                "redux_image is heard through FLUX.1 Redux: give its folder as redux (--redux)"
            )

    def evaluations(self, settings: Settings) -> int:
        """How often a picture of complete `settings` runs the network that draws, or both."""
        more = 0 if self.refiner is None else self.refiner.run_of(settings).evaluations
        return self.run_of(settings).evaluations + more

    def hear(
        self,
        settings: Settings,
        prompts: Sequence[str],
        number: int,
        scale: Any,
        adapters: Sequence[Mapping[str, float]] | None = None,
        picture: Image | None = None,
        *,
        changed: bool = False,
    ) -> tuple[Conditioning, Conditioning | None]:
        """Of every picture what it is to show, and what not; `scale`: of guidance. `picture` is
        seen with the prompts. `changed`: whether an image is drawn anew."""
        length, together = settings.max_sequence_length, self.executables.rows("encode", 1)
        own = [{}] * len(prompts) if adapters is None else adapters[::number]

        def said(texts: Sequence[str], count: int, *others: Any, **options: Any) -> Any:
            parts = [slice(i, i + together) for i in range(0, len(texts), together)]
            encode = partial(self.encode_prompt, max_sequence_length=length, **options)
            each = [
                encode(texts[part], *others, adapters=own[: len(texts)][part]) for part in parts
            ]
            return jax.tree.map(lambda *c: np.repeat(np.concatenate(c), count, axis=0), *each)

        told = settings.told(negative=False, changed=changed)
        away = settings.told(negative=True, changed=changed)
        texts = [self.family.prompt_of(prompt, told) for prompt in prompts]
        others = settings.prompt_2, settings.prompt_3
        seen = {"clip_skip": settings.clip_skip, "picture": picture}
        conditioning = said(texts, number, *others, **seen)
        conditioning = self._with_sizes(conditioning, told)
        if scale is None:
            return conditioning, None
        # One will do for all where all have the same adapters. They take no notice of clip_skip.
        different = len(prompts) if any(one != own[0] for one in own) else 1
        text = settings.negative_prompt or ""
        texts = [self.family.prompt_of(text, away)] * different
        negative = said(texts, len(prompts) * number // different)
        if settings.negative_prompt is None and self.config.force_zeros_for_empty_prompt:
            negative = jax.tree.map(np.zeros_like, negative)
        return conditioning, self._with_sizes(negative, away)

    def _with_sizes(self, heard: Conditioning, told: Told) -> Conditioning:
        sizes = self.family.sizes(self.config, told)
        if sizes is None:
            return heard
        return heard._replace(sizes=np.tile(sizes, (len(heard.sequence), 1)))

    def _adapters(
        self, lora: LoraChoice | None, prompts: int, number: int
    ) -> Sequence[Mapping[str, float]] | None:
        """Of each picture, where calls choose adapters."""
        if self.slots is not None:
            return self.slots.each(lora, prompts, number)
        if lora:
            raise ConfigError("to choose adapters per call, load the pipeline with lora_slots=RANK")
        return None

    def picture_size(self, given: Given) -> tuple[int, int]:
        """(width, height) of what is drawn from these pictures unless another is asked for.

        That of the image or of the control, rounded down to whole tokens; for an edit and its image
        see `reference_size`, for a clip `given_clips.clip_size`.
        """
        if self.config.tiling is not None:
            one = given.reference or given.last
            own = self.defaults.width, self.defaults.height
            return own if one is None else clip_size(self.config, one.size)
        if given.reference is not None:
            return self.reference_size(given.image or given.reference)
        one = given.image or given.control
        if one is None:
            return self.defaults.width, self.defaults.height
        return whole_size(one.width, one.height, unit=self.config.unit)

    def _inputs(
        self, task: Task, given: Given, settings: Settings, draws: Mapping[str, Any]
    ) -> Inputs:
        """Of what is given, as the network sees it."""
        if self.config.tiling is not None:
            return clip_inputs(self, task, given, settings, draws)
        return make_inputs(self, task, given, settings, draws)

    def begin(
        self, settings: Settings, seeds: int | Sequence[int], count: int = 1
    ) -> Float[AnyArray, "n c *size"]:
        """The latents that a run of `count` pictures starts from."""
        given, settings = read_given(settings)
        settings = self.complete(settings, given, FIELDS)
        task = self.task_of(settings, given)
        draws = self.draw_each(settings, seeds, count, task)
        noise, inputs = draws["noise"], self._inputs(task, given, settings, draws)
        return self.start(noise, inputs, self.run_of(settings, task))
