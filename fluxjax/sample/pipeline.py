"""A pipeline: what callers in Python give, and the pictures that they get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxjax.config import CONTROLS, IP_IMAGES, ConfigError
from fluxjax.config.choices import Respacing, Spacing
from fluxjax.sample.clip_files import Clip
from fluxjax.sample.controls import control_settings
from fluxjax.sample.drawing import Drawing
from fluxjax.sample.embedded_tools import require_tool
from fluxjax.sample.given_pictures import apart, read_given, spread_over
from fluxjax.sample.lora_slots import LoraChoice
from fluxjax.sample.override import override
from fluxjax.sample.redux import read_heard
from fluxjax.sample.refusals import unknown_options
from fluxjax.sample.save_picture import tell_made
from fluxjax.sample.settings import Noise, Rounding, VideoKind
from fluxjax.sample.sources import Sources, absolute
from fluxjax.sample.stages import OnStep

if TYPE_CHECKING:
    from PIL.Image import Image


class Pipeline(Drawing):
    """A model that draws; see `fluxjax.load_pipeline`."""

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
        size_bins: bool | None = None,
        clean_caption: bool | None = None,
        image: Image | str | Path | None = None,
        mask: Image | str | Path | None = None,
        control: Any = None,
        control_scale: float | Sequence[float] | None = None,
        control_mode: str | int | Sequence[str | int | None] | None = None,
        control_range: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
        reference: Image | str | Path | None = None,
        last: Image | str | Path | None = None,
        loop: bool | None = None,
        video: Clip | str | Path | None = None,
        video_kind: VideoKind | None = None,
        strength: float | None = None,
        mask_crop: int | None = None,
        soft_mask: bool | None = None,
        noise_mask: bool | None = None,
        expand: tuple[int, int, int, int] | None = None,
        canny: tuple[int, int] | None = None,
        redux_image: Any = None,
        ip_image: Any = None,
        negative_ip_image: Image | str | Path | None = None,
        ip_scale: float | Sequence[float] | None = None,
        negative_prompt: str | None = None,
        true_cfg: float | None = None,
        prompt_2: str | None = None,
        prompt_3: str | None = None,
        max_sequence_length: int | None = None,
        sampler: str | None = None,
        spacing: Spacing | None = None,
        eta: float | None = None,
        guidance_rescale: float | None = None,
        clip_skip: int | None = None,
        skip_layers: Sequence[int] | None = None,
        skip_layer_scale: float | None = None,
        skip_layer_range: tuple[float, float] | None = None,
        frames: int | None = None,
        fps: int | None = None,
        motion: int | None = None,
        image_guidance: float | None = None,
        oscillation: bool | None = None,
        flow_shift: float | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crop: tuple[int, int] | None = None,
        negative_target_size: tuple[int, int] | None = None,
        refiner_start: float | None = None,
        sigmas: Respacing | None = None,
        noise: Noise | None = None,
        rounding: Rounding | None = None,
        lora: LoraChoice | None = None,
        progress: Callable[[int], None] | None = None,
        on_step: OnStep | None = None,
        every: int = 1,
        **others: Any,
    ) -> list[Any]:
        """Draw pictures, or `Clip`s of several frames; what is not given is the model's own.

        Args:
          prompt: what to draw, or several.
          seed: one draws the noise of all pictures at once, as diffusers does with one generator; a
            sequence gives each its own.
          number: pictures per prompt, in the prompts' order.
          steps: denoising steps, 1 to 1000.
          guidance: embedded guidance of distilled FLUX; the scale of classifier-free guidance of
            Stable Diffusion, which is off at 1.
          width, height: in pixels, multiples of 16 for FLUX, of 8 for Stable Diffusion; by default
            those of the picture that is given, rounded down, see `picture_size`.
          size_bins: whether PixArt draws in the nearest size of its training, and resizes.
          clean_caption: whether PixArt's prompts are cleaned as the captions of its training were,
            which diffusers does unless told not to; it needs beautifulsoup4 and ftfy.
          image: what the new picture starts from; here and below a picture or its file.
          mask: white where the image is painted anew; "alpha": where the image is transparent.
          control: edges or depths that the new picture has (FLUX.1 Canny and Depth, ControlNets);
            of several ControlNets a list with one for each, or one for all.
          control_scale, control_mode, control_range: how strong a ControlNet is; which kind of
            picture a union ControlNet sees, such as "canny" (see `fluxjax.config.CONTROL_MODES`) or
            its number; and between which parts of the run it counts, such as (0, 0.8). Of several
            a list with one for each, or one for all.
          reference: a picture to edit (FLUX.1 Kontext); with a mask and no image it is that too.
            Of a clip its first frame.
          last, loop: the last frame of a clip; whether the reference is that too.
          video, video_kind: a clip, or its file, that is a part of the new one: its first or last
            frames ("v2v_head", "v2v_tail"), 33 or ("_easy") 65 of them.
          strength: how much of the image is drawn anew, above 0 and up to 1.
          mask_crop: draw the mask's surroundings alone, with so many pixels around, in the size of
            the whole, and leave what is not white as it is to the pixel.
          soft_mask: the greyer the mask, the fewer steps change the image.
          noise_mask: whether a model that reads a mask (FLUX.1 Fill) keeps what lies outside of it
            as the autoencoder has it, as ComfyUI's InpaintModelConditioning does; by default, but
            for "tiny-fill", it draws all of the picture, as in diffusers.
          canny: draw by the edges of the control, found with these thresholds, such as (50, 200).
          expand: a border of (left, top, right, bottom) pixels round the image, painted anew.
          redux_image: what is heard beside the prompt through FLUX.1 Redux: a picture or its file,
            (either, weight), or a list of these.
          ip_image: what an IP-Adapter sees, or a list of up to three pictures; of several adapters
            each sees its own, or all the only one.
          negative_ip_image: what it sees in the pass that true_cfg guides away from; else black.
          ip_scale: how strong it is, in all double blocks or a list of each; of several adapters
            all, or a list of each adapter's.
          negative_prompt, true_cfg: what not to draw, by classifier-free guidance above 1; for FLUX
            both or neither, for Stable Diffusion `guidance` is that scale.
          prompt_2, prompt_3: what the second text encoder (T5 of FLUX) and the third (T5 of Stable
            Diffusion 3) read instead of `prompt`.
          max_sequence_length: tokens of a prompt, for FLUX at most 512 of T5.
          sampler: another than the model's own: "euler", "heun", "dpm++", "dpm++1", "dpm++3m" or
            "unipc"; of Stable Diffusion also "ddpm", "ddim", "pndm", "euler-a", "dpm++sde", "lcm".
          spacing: how its timesteps are spaced: "leading", "linspace" or "trailing".
          eta: how much noise DDIM adds, 0 to 1.
          guidance_rescale: how far classifier-free guidance is brought back to the spread of what
            it guides, 0 to 1.
          clip_skip: how many of CLIP's last layers are left out.
          skip_layers, skip_layer_scale, skip_layer_range: skip-layer guidance of Stable Diffusion
            3, away from what it draws without these blocks: how far, in which part of the run.
          frames: of a clip, for models that draw them; 1 more than a multiple of 4.
          fps: frames a second, which the model is told too, 1 to 240.
          motion: how much moves, 1 (nothing) to 7; 0: the model is not told.
          image_guidance: the scale of guidance by the frames that a clip is given.
          oscillation: whether every second step of a clip, but for the first ten, is not guided.
          flow_shift: how far a flow's noise levels are moved towards noise.
          original_size, crop, target_size: what Stable Diffusion XL is told of the picture, as
            (width, height) and (left, top); by default its own size and no crop.
          aesthetic_score, negative_aesthetic_score: likewise its refiner, of what is to be drawn
            and what not.
          negative_original_size, negative_crop, negative_target_size: what XL is told of what the
            negative prompt describes, both sizes together; by default the same as of the picture.
          refiner_start: after which part of the run a refiner takes over, by default 0.8, of
            pipelines that were loaded with one.
          sigmas: how noise levels are spaced: "plain", "karras", "exponential" or "beta".
          noise: "torch" (what PyTorch's CPU generator draws for the seed) or "jax".
          rounding: whose rounding is followed: "diffusers", "bfl" or "none", see `Settings`.
          lora: adapters of this call, each "FILE", "FILE:SCALE" or (FILE, SCALE), or a list of them
            for each prompt; for pipelines that were loaded with `lora_slots`.
          progress: called with the number of steps done, a few times a second.
          on_step, every: `on_step(steps done, latents)` after every `every`-th step and after the
            last, with the unpacked latents (n, c, h, w) so far; what it raises ends the run.

        Raises ConfigError for what cannot be drawn, and for pictures that are not finite.
        """
        from PIL.Image import fromarray

        if others:
            raise ConfigError(unknown_options(sorted(others)))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        several = spread_over(CONTROLS, control) | spread_over(IP_IMAGES, ip_image)
        several |= {"negative_ip_image": negative_ip_image, "last": last, "video": video}
        files, objects = apart(image=image, mask=mask, reference=reference, **several)
        if self.sources is not None and not lora:
            require_tool(self.sources, {*files, *objects})
        settings = {
            "steps": steps,
            "guidance": guidance,
            "width": width,
            "height": height,
            "size_bins": size_bins,
            "clean_caption": clean_caption,
            "negative_prompt": negative_prompt,
            "true_cfg": true_cfg,
            "prompt_2": prompt_2,
            "prompt_3": prompt_3,
            "max_sequence_length": max_sequence_length,
            "noise": noise,
            "rounding": rounding,
            "seed": seed if isinstance(seed, int) else 0,
            "strength": strength,
            "mask_crop": mask_crop,
            "soft_mask": soft_mask,
            "noise_mask": noise_mask,
            "expand": expand,
            "canny": canny,
            "sampler": sampler,
            "sigmas": sigmas,
            "spacing": spacing,
            "eta": eta,
            "ip_scale": [ip_scale] if isinstance(ip_scale, int | float) else ip_scale,
            "guidance_rescale": guidance_rescale,
            "clip_skip": clip_skip,
            "skip_layers": skip_layers,
            "skip_layer_scale": skip_layer_scale,
            "skip_layer_range": skip_layer_range,
            "frames": frames,
            "fps": fps,
            "motion": motion,
            "loop": loop,
            "video_kind": video_kind,
            "image_guidance": image_guidance,
            "oscillation": oscillation,
            "flow_shift": flow_shift,
            "original_size": original_size,
            "crop": crop,
            "target_size": target_size,
            "aesthetic_score": aesthetic_score,
            "negative_aesthetic_score": negative_aesthetic_score,
            "negative_original_size": negative_original_size,
            "negative_crop": negative_crop,
            "negative_target_size": negative_target_size,
            "refiner_start": refiner_start,
            **control_settings(control_mode, control_scale, control_range),
        }
        chosen = override(self.defaults, {**settings, **files})
        given, chosen = read_given(chosen, objects)
        if noise_mask is False:
            self.require_mask_read(chosen, given)
        heard, heard_files = read_heard(() if redux_image is None else redux_image)
        fixed = [name for name, value in settings.items() if value is not None]
        chosen = self.complete(chosen, given, fixed)
        pictures = self.draw(
            chosen,
            prompts=prompts,
            seeds=seed,
            number=number,
            lora=lora,
            given=given,
            heard=heard,
            progress=progress,
            on_step=on_step,
            every=every,
        )
        clips = chosen.frames > 1
        images = [Clip(one, float(chosen.fps)) if clips else fromarray(one) for one in pictures]
        if self.sources is not None:
            without = [*sorted(objects), *["redux_image"] * (heard_files is None)]
            sources = [
                replace(one, redux=one.redux if heard else None, redux_image=heard_files or ())
                for one in self._sources(lora, len(prompts), number)
            ]
            tell_made(
                images,
                chosen,
                prompts,
                seed,
                sources,
                self.config,
                str(self.dtype),
                unrepeatable=f"its {' and '.join(without)} had no file" if without else "",
            )
        return images

    def _sources(self, lora: LoraChoice | None, prompts: int, number: int) -> list[Sources]:
        """Of each picture what it is made of."""
        assert self.sources is not None
        found = []
        for chosen in self._adapters(lora, prompts, number) or [{}] * (prompts * number):
            files = tuple(f"{absolute(file)}:{scale:g}" for file, scale in chosen.items())
            found.append(replace(self.sources, lora=files) if files else self.sources)
        return found
