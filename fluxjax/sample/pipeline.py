"""A FLUX pipeline: prompts -> conditioning -> latents -> pictures, each step usable alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.config.choices import SequenceAttention
from fluxjax.config.latents import PATCH
from fluxjax.families.family import Conditioning, Family
from fluxjax.models.autoencoder import denormalize_latents
from fluxjax.parallel.mesh import AXES, gathered, make_mesh, pad_rows, replicated
from fluxjax.picture_files import upright_rgb
from fluxjax.sample import noise
from fluxjax.sample.denoise import State, in_parts, wait
from fluxjax.sample.executables import Executables
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.programs import COMPONENTS, Drawn, Name, programs, tiled
from fluxjax.sample.reference import pixels, preferred_size, read_reference
from fluxjax.sample.refusals import require_both, require_finite, unknown_options
from fluxjax.sample.save_picture import tell_made
from fluxjax.sample.settings import Noise, Rounding, Settings, defaults, override
from fluxjax.sample.sources import Sources
from fluxjax.schedules.schedule import Schedule, bucket, pad
from fluxjax.shapes import Params

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxjax.text.tokenizers import PromptTokenizer

PHASES = ("loading", "compiling", "encoding", "denoising", "decoding")
TILE = 64
AnyArray = Array | np.ndarray
OnStep = Callable[[int, AnyArray], None]


class Pipeline:
    """Networks, tokenizers and compiled programs of one model; see `fluxjax.load_pipeline`.

    Weights are loaded when they are first needed, programs compiled once per shape, in the
    background while weights load. `seconds` adds up what each of PHASES kept the caller waiting;
    `notes` collects remarks for the user.
    """

    def __init__(
        self,
        family: Family,
        config: PipelineConfig,
        load_params: Callable[[str], Params],
        load_tokenizers: Callable[[], tuple[PromptTokenizer, PromptTokenizer]],
        *,
        dtype: Any,
        scan_layers: bool = True,
        lora: Params | None = None,
        mesh: Mesh | None = None,
        sequence: SequenceAttention = "auto",
        sources: Sources | None = None,
    ):
        self.family, self.config = family, config
        self.defaults = defaults(config)
        self.dtype = jnp.dtype(dtype)
        self.mesh = mesh
        self.executables = Executables(
            family, config, dtype, scan_layers, lora=lora, mesh=mesh, sequence=sequence
        )
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.notes: list[str] = []
        self.sources = sources
        self._load_params, self._load_tokenizers = load_params, load_tokenizers
        self._tokenizers: tuple[PromptTokenizer, PromptTokenizer] | None = None
        self._params: dict[str, Params] = {}

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        number: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        reference: Image | str | Path | None = None,
        negative_prompt: str | None = None,
        true_cfg: float | None = None,
        prompt_2: str | None = None,
        max_sequence_length: int | None = None,
        noise: Noise | None = None,
        rounding: Rounding | None = None,
        progress: Callable[[int], None] | None = None,
        on_step: OnStep | None = None,
        every: int = 1,
        **others: Any,
    ) -> list[Image]:
        """Draw pictures; what is not given is the model's own.

        Args:
          prompt: what to draw, or several.
          seed: one draws the noise of all pictures at once, as diffusers does with one generator; a
            sequence gives each its own.
          number: pictures per prompt, in the prompts' order.
          steps: denoising steps, 1 to 1000.
          guidance: embedded guidance of distilled models; others ignore it.
          width, height: in pixels, multiples of 16 for FLUX.
          reference: a picture to edit (FLUX.1 Kontext), or its file; without a width or height the
            new ones take its shape, see `reference_size`.
          negative_prompt, true_cfg: what not to draw, by classifier-free guidance above 1; both or
            neither.
          prompt_2: what T5 reads instead of `prompt`.
          max_sequence_length: T5 tokens, at most 512.
          noise: "torch" (what PyTorch's CPU generator draws for the seed) or "jax".
          rounding: whose rounding is followed: "diffusers", "bfl" or "none", see `Settings`.
          progress: called with the number of steps done, a few times a second.
          on_step, every: `on_step(steps done, latents)` after every `every`-th step and after the
            last, with the unpacked latents (n, c, h, w) so far; what it raises ends the run.

        Raises ConfigError for what cannot be drawn, and for pictures that are not finite.
        """
        from PIL.Image import fromarray

        if others:
            raise ConfigError(unknown_options(sorted(others)))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings = {
            "steps": steps, "guidance": guidance, "width": width, "height": height,
            "negative_prompt": negative_prompt, "true_cfg": true_cfg, "prompt_2": prompt_2,
            "max_sequence_length": max_sequence_length, "noise": noise, "rounding": rounding,
            "seed": seed if isinstance(seed, int) else 0,
        }  # fmt: skip
        chosen = self.defaults
        file: dict[str, str] = {}
        if isinstance(reference, str | Path):
            file["reference"] = str(Path(reference).expanduser().absolute())
            reference, file["reference_sha256"] = read_reference(reference)
        if reference is not None:
            reference = upright_rgb(reference)
            size = dict(zip(("width", "height"), self.reference_size(reference), strict=True))
            chosen = replace(chosen, **size)
        chosen = override(chosen, settings)
        pictures = self.draw(
            chosen, prompts=prompts, seeds=seed, number=number,
            reference=reference, progress=progress, on_step=on_step, every=every,
        )  # fmt: skip
        images = [fromarray(picture) for picture in pictures]
        if self.sources is not None:
            why = "" if reference is None else "an edit of a picture that had no file"
            tell_made(
                images, replace(chosen, **file), prompts, seed, self.sources, str(self.dtype),
                unrepeatable="" if file else why,
            )  # fmt: skip
        return images

    def draw(
        self,
        settings: Settings,
        *,
        prompts: Sequence[str] | None = None,
        seeds: int | Sequence[int] | None = None,
        number: int = 1,
        reference: Image | None = None,
        progress: Callable[[int], None] | None = None,
        on_step: OnStep | None = None,
        every: int = 1,
    ) -> UInt8[np.ndarray, "n height width 3"]:
        """Pictures of `settings` as bytes; what else is given stands in for what is in it.

        Arguments and errors are those of `__call__`; `reference` is a picture.
        """
        prompts = [settings.prompt] if prompts is None else prompts
        count = len(prompts) * number
        if count < 1:
            raise ConfigError(f"there is nothing to draw: {len(prompts)} prompts, {number} each")
        require_both(settings)
        start = self.draw_noise(settings, settings.seed if seeds is None else seeds, count)
        if reference is None and settings.reference is not None:
            reference, _ = read_reference(settings.reference, settings.reference_sha256)
        size = None if reference is None else self.reference_size(reference)
        self.prepare(settings, count, size)
        for component in itertools.chain(*COMPONENTS.values()):
            self.params(component)  # while the programs compile
        encode = partial(self.encode_prompt, max_sequence_length=settings.max_sequence_length)
        together = self.executables.rows("encode", 1)
        groups = [prompts[i : i + together] for i in range(0, len(prompts), together)]
        each = [encode(group, settings.prompt_2) for group in groups]
        conditioning = jax.tree.map(lambda *c: np.repeat(np.concatenate(c), number, axis=0), *each)
        negative = None
        if settings.negative_prompt is not None:
            one = encode(settings.negative_prompt)
            negative = jax.tree.map(lambda c: np.repeat(c, count, axis=0), one)
        seen = None if reference is None else self.encode_reference(reference)
        latents = self.denoise(
            conditioning, start, steps=settings.steps, guidance=settings.guidance,
            negative=negative, true_cfg=settings.true_cfg, reference_latents=seen,
            rounding=settings.rounding, progress=progress, on_step=on_step, every=every,
        )  # fmt: skip
        pictures = self.decode(latents)
        heard = [conditioning] if negative is None else [conditioning, negative]
        require_finite(pictures, heard, seen, latents)
        return to_bytes(pictures, settings.rounding)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | None = None,
        *,
        max_sequence_length: int | None = None,
    ) -> Conditioning:
        """Conditioning of one prompt or several; `prompt_2` is what T5 reads instead of them."""
        length = max_sequence_length or self.config.max_sequence_length
        with self._timed("loading"):
            if self._tokenizers is None:
                self._tokenizers = self._load_tokenizers()
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        second = None if prompt_2 is None else [prompt_2] * len(prompts)
        ids, notes = self.family.tokenize(
            *self._tokenizers, prompts, second, max_sequence_length=length
        )
        self.notes += notes
        return self._run("encode", ids, len(prompts), phase="encoding")

    def reference_size(self, picture: Image) -> tuple[int, int]:
        """(width, height) at which a reference is seen, about as large as the model's pictures."""
        return preferred_size(
            picture.width,
            picture.height,
            area=self.defaults.width * self.defaults.height,
            unit=PATCH * self.config.vae.scale,
        )

    def encode_reference(self, picture: Image) -> Float[np.ndarray, "1 c h w"]:
        """Latents of an RGB picture to edit, for `denoise`."""
        return self.encode_pictures(pixels(picture, *self.reference_size(picture)))

    def encode_pictures(
        self, pictures: Float[np.ndarray, "n height width 3"]
    ) -> Float[np.ndarray, "n c h w"]:
        """Normalised posterior means of pictures in [-1, 1]; `decode` leads back."""
        return self._run("reference", pictures, len(pictures), phase="encoding")

    def draw_noise(
        self, settings: Settings, seeds: int | Sequence[int], count: int = 1
    ) -> Float[np.ndarray, "n c h w"]:
        """What a run of `count` pictures starts from; one seed draws all at once, as diffusers."""
        shape = self.family.state_shape(self.config, settings.width, settings.height)
        dtype = np.float32 if settings.rounding == "none" else self.dtype
        return noise.draw(seeds, (count, *shape), kind=settings.noise, dtype=dtype)

    def denoise(
        self,
        conditioning: Conditioning,
        noise: Float[AnyArray, "n c h w"],
        *,
        steps: int | Sequence[float] | None = None,
        guidance: float | None = None,
        negative: Conditioning | None = None,
        true_cfg: float = 1.0,
        reference_latents: Float[AnyArray, "_ c _ _"] | None = None,
        rounding: Rounding = "diffusers",
        progress: Callable[[int], None] | None = None,
        on_step: OnStep | None = None,
        every: int = 1,
    ) -> Float[AnyArray, "n c h w"]:
        """Latents from noise (see `draw_noise`), still normalised as the transformer sees them.

        `steps`: their number, or sigmas before the shift. `guidance` is ignored by models without
        a guidance embedding. `reference_latents`: of one picture to edit, or of one for each.
        `progress` and `on_step` (see `__call__`) cut the run in parts.
        """
        if every < 1:
            raise ConfigError(f"every must be at least 1 step, got {every}")
        count = noise.shape[0]
        schedule = pad(
            self.family.schedule(
                self.config, self.config.steps if steps is None else steps, *noise.shape[2:]
            )
        )
        passes = self.family.passes(len(schedule.times), None if negative is None else true_cfg)
        guidance = self.config.guidance if guidance is None else guidance
        if reference_latents is not None:
            reference_latents = np.broadcast_to(
                reference_latents, (count, *reference_latents.shape[1:])
            )
        conditionings = (conditioning,) if negative is None else (conditioning, negative)
        each: Any = (conditionings, np.full(count, guidance, np.float32), reference_latents)
        if self.mesh is not None:
            noise, *each = pad_rows((noise, *each), self.executables.rows("denoise", count))
        drawn = Drawn(schedule, passes, *each)
        program = self._executable("denoise", (noise,), drawn, rounding=rounding)
        params = self.params("transformer")

        def run(state: State, schedule: Schedule) -> State:
            return program(params, state, drawn._replace(schedule=schedule))

        def latents(state: Any) -> AnyArray:
            return state[0] if self.mesh is None else gathered(state[0])[:count]

        with self._timed("denoising"):
            if progress is None and on_step is None:
                return latents(wait(run((noise,), schedule)))
            state = in_parts(
                run, (noise,), schedule, progress=progress, every=every,
                on_step=on_step and (lambda step, state: on_step(step, latents(state))),
            )  # fmt: skip
            return latents(state)

    def decode(
        self, latents: Float[AnyArray, "n c h w"], *, tile: int | None = None
    ) -> Float[np.ndarray, "n height width 3"]:
        """Pictures, nominally in [-1, 1]; `pictures.to_bytes` makes bytes of them.

        Beyond 2048 x 2048 pixels, or with `tile` latents given, they are decoded in tiles: slower,
        with the memory of one tile; on a mesh every device decodes tiles.
        """
        if tile is None and not tiled(*latents.shape[2:]):
            return self._run("decode", latents, len(latents), phase="decoding")
        from fluxjax.models.tiled_decode import decode_tiled

        params, (model,) = self.params("vae"), self.executables.modules("decode")
        with self._timed("decoding"):
            x = denormalize_latents(jnp.moveaxis(jnp.asarray(latents), 1, -1), model.config)
            if self.mesh is None:
                return decode_tiled(model, params, x, tile=tile or TILE)
            mesh = self.mesh
            if jax.process_count() > 1:  # each process decodes for itself
                params = jax.tree.map(gathered, params)
                mesh = make_mesh("", jax.local_devices())
            params = jax.device_put(params, replicated(mesh))
            place = NamedSharding(mesh, P(AXES))
            return decode_tiled(
                model,
                params,
                x,
                tile=tile or TILE,
                together=mesh.size,
                spread=lambda tiles: jax.device_put(tiles, place),
            )

    def is_loaded(self, component: str) -> bool:
        return component in self._params

    def params(self, component: str) -> Params:
        """Parameters of transformer, vae, text_encoder (CLIP) or text_encoder_2 (T5).

        With a LoRA the transformer's are those of `fluxjax.models.lora.adapt`.
        """
        if component not in self._params:
            with self._timed("loading"):
                self._params[component] = self._load_params(component)
        return self._params[component]

    def use(self, component: str, params: Params) -> None:
        """Take `params` in place of those that there are, of the same shapes."""
        self._params[component] = params

    def prepare(
        self, settings: Settings, count: int = 1, reference_size: tuple[int, int] | None = None
    ) -> None:
        """Start to compile, in the background, every program that `count` pictures will need.

        `reference_size`: the (width, height) at which a reference is seen.
        """
        for program in programs(
            self.family, self.config, settings, dtype=self.dtype, steps=bucket(settings.steps),
            pictures=count, reference_size=reference_size, rows=self.executables.rows,
        ):  # fmt: skip
            self.executables.start(program)

    def _run(self, name: Name, inputs: Any, count: int, *, phase: str) -> Any:
        params = [self.params(component) for component in COMPONENTS[name]]
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
