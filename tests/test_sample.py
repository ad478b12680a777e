"""The pipeline draws what diffusers' FluxPipeline draws, and compiles only when shapes change."""

import inspect
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanVideoPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image
from torch_pipeline import random_pipeline  # noqa: F401

import fluxjax
from fluxjax.config import ConfigError
from fluxjax.families import FLUX
from fluxjax.hub import tiny_folder
from fluxjax.sample.executables import Executables
from fluxjax.sample.noise import draw
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.reference import preferred_size
from fluxjax.sample.refusals import OTHER_NAMES

THEIR_CLASSES = (FluxPipeline, FluxControlInpaintPipeline, FluxKontextInpaintPipeline)
SMALL = {"width": 96, "height": 64, "steps": 5}
pytestmark = pytest.mark.usefixtures("as_shipped")


@cache
def both(folder: Path):
    theirs = FluxPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return fluxjax.load_pipeline(folder), theirs


@pytest.fixture(params=[pytest.param("random", marks=pytest.mark.slow), "tiny"])
def pipelines(request):
    """(ours, diffusers') of small random weights and of the embedded model."""
    if request.param == "random":
        return both(request.getfixturevalue("random_pipeline"))
    return both(tiny_folder())


@pytest.fixture
def ours(random_pipeline):  # noqa: F811
    return both(random_pipeline)[0]


def same_picture(got, expected) -> None:
    got, expected = np.asarray(got, np.int32), np.asarray(expected, np.int32)
    assert got.shape == expected.shape
    distance = np.abs(got - expected)
    assert distance.max() <= 4
    assert (distance <= 1).mean() >= 0.999
    assert expected.std() > 5, "a flat picture proves nothing"


@pytest.mark.parametrize("prompt", ["a red circle", pytest.param("", marks=pytest.mark.slow)])
def test_same_picture_as_diffusers(pipelines, prompt):
    ours, theirs = pipelines
    expected = theirs(
        prompt,
        width=96,
        height=64,
        num_inference_steps=5,
        guidance_scale=3.5,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    (got,) = ours(prompt, seed=7, guidance=3.5, max_sequence_length=32, **SMALL)
    same_picture(got, expected)


@pytest.mark.slow
def test_same_pictures_with_true_cfg_second_prompt_and_two_at_once(pipelines):
    ours, theirs = pipelines
    expected = theirs(
        "a red circle left of a blue star",
        prompt_2="two small green rings",
        negative_prompt="a yellow heart",
        true_cfg_scale=3.0,
        num_images_per_prompt=2,
        width=96,
        height=64,
        num_inference_steps=5,
        guidance_scale=2.0,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(11),
    ).images
    got = ours(
        "a red circle left of a blue star",
        prompt_2="two small green rings",
        negative_prompt="a yellow heart",
        true_cfg=3.0,
        number=2,
        seed=11,
        guidance=2.0,
        max_sequence_length=32,
        **SMALL,
    )
    assert len(got) == 2
    for one, other in zip(got, expected, strict=True):
        same_picture(one, other)
    assert np.abs(np.asarray(got[0], int) - np.asarray(got[1], int)).mean() > 2


@pytest.fixture
def kontext():
    """(ours, diffusers' FluxKontextPipeline) of the embedded model."""
    ours, theirs = both(tiny_folder())
    theirs = FluxKontextPipeline(**theirs.components)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


@pytest.fixture(scope="module")
def reference():
    """A wide picture with shapes in it, of a size that no autoencoder takes."""
    y, x = np.mgrid[:121, :203]
    channels = (x, np.hypot(x - 60, y - 50) < 30, np.abs(x - 150) + np.abs(y - 70) < 40)
    planes = [np.interp(plane, (0, np.max(plane)), (0, 255)) for plane in channels]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


@pytest.mark.slow
def test_same_edits_as_diffusers(kontext, reference, monkeypatch):
    """Two at once, of another size than the reference, with true CFG."""
    ours, theirs = kontext
    # The published 1328 x 800 is nearest; for pictures of 96 x 96 it becomes this.
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(128, 80)])
    expected = theirs(
        reference,
        "make the circle blue",
        negative_prompt="a yellow heart",
        true_cfg_scale=2.0,
        num_images_per_prompt=2,
        width=96,
        height=64,
        max_area=96 * 64,
        num_inference_steps=3,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(7),
    ).images
    chosen = {
        "negative_prompt": "a yellow heart",
        "true_cfg": 2.0,
        "max_sequence_length": 32,
        "seed": 7,
        "number": 2,
        **SMALL,
        "steps": 3,
    }
    got = ours("make the circle blue", reference=reference, **chosen)
    for one, other in zip(got, expected, strict=True):
        same_picture(one, other)
    mirrored = reference.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    other = ours("make the circle blue", reference=mirrored, **chosen)
    assert np.abs(np.asarray(other[0], int) - np.asarray(got[0], int)).mean() > 2


def test_references_are_seen_in_the_size_that_diffusers_takes(kontext, monkeypatch):
    class Seen(Exception):
        pass

    def resize(picture, height, width):
        raise Seen(width, height)

    _, theirs = kontext
    monkeypatch.setattr(theirs.image_processor, "resize", resize)
    embeds = {"prompt_embeds": torch.zeros(1, 8, 128), "pooled_prompt_embeds": torch.zeros(1, 128)}
    taken = set()
    for width, height in np.exp(np.random.default_rng(0).uniform(3, 7, (200, 2))).astype(int):
        with pytest.raises(Seen) as seen:
            theirs(Image.new("L", (width, height)), **embeds)
        got = preferred_size(int(width), int(height), area=1024**2, unit=16)
        assert got == seen.value.args, (width, height)
        taken.add(got)
    assert len(taken) == 17


def test_an_edit_has_the_shape_of_its_reference(ours, reference):
    """Of a published size by default: nothing is drawn here."""
    assert ours.reference_size(reference) == (1328, 800)
    embedded = both(tiny_folder())[0]
    assert embedded.reference_size(reference) == (128, 80)
    assert embedded.reference_size(Image.new("RGB", (16, 400))) == (64, 144)
    with pytest.raises(ConfigError, match="at least 16 pixels on each side, got 15 x 400"):
        ours.reference_size(Image.new("RGB", (15, 400)))


@contextmanager
def compilations():
    """The list of programs that the backend compiles inside."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_only_shapes_and_the_bucket_of_steps_compile(ours):
    settings = {"max_sequence_length": 16, "width": 64, "height": 64}
    with compilations() as seen:
        first = ours("a red circle", steps=5, **settings)[0]
    assert seen, "the count itself must work"
    with compilations() as seen:
        for change in (
            {"guidance": 1.0},
            {"seed": 9},
            {"prompt_2": "a star"},
            {"steps": 8},
            {"steps": 6},
        ):
            other = ours("a red circle", **{"steps": 5, **settings, **change})[0]
            assert np.asarray(other).tobytes() != np.asarray(first).tobytes(), change
    assert not seen
    with compilations() as seen:
        ours("a red circle", steps=12, **settings)
    assert len(seen) == 1
    conditioning = ours.encode_prompt("a red circle", max_sequence_length=16)
    noise = np.ones((1, 16, 8, 8), np.float32)
    with compilations() as seen:
        ours.denoise(conditioning, noise, steps=[1.0, 0.8, 0.5, 0.45, 0.1])
    assert not seen


@pytest.mark.slow
def test_steps_are_usable_alone_and_progress_changes_nothing(ours):
    chosen = {"width": 64, "height": 64, "steps": 7, "max_sequence_length": 16}
    whole = np.asarray(ours("a star", seed=3, **chosen)[0])
    conditioning = ours.encode_prompt("a star", max_sequence_length=16)
    noise = draw(3, (1, 16, 8, 8))
    done: list[int] = []
    latents = ours.denoise(conditioning, noise, steps=7, progress=done.append)
    assert done[0] == 1 and done[-1] == 7 and done == sorted(done)
    picture = ours.decode(latents)
    assert picture.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(to_bytes(picture)[0], whole)
    assert np.abs(ours.decode(latents, tile=8) - picture).max() < 1e-4, "one tile is the picture"


@pytest.mark.slow
def test_seeds_per_picture_repeat_single_pictures(ours):
    chosen = {"width": 64, "height": 64, "steps": 4, "max_sequence_length": 16}
    pair = ours(["a star", "a ring"], seed=[5, 6], **chosen)
    single = ours("a ring", seed=6, **chosen)[0]
    assert np.abs(np.asarray(pair[1], int) - np.asarray(single, int)).max() <= 1


@pytest.mark.slow
def test_bfloat16_is_no_further_from_float32_than_diffusers_is(random_pipeline, ours):  # noqa: F811
    chosen = {"max_sequence_length": 16, "width": 64, "height": 64}
    exact = np.asarray(ours("a star", steps=4, **chosen)[0], int)
    half = fluxjax.load_pipeline(random_pipeline, dtype="bfloat16")
    theirs = FluxPipeline.from_pretrained(random_pipeline, dtype=torch.bfloat16)
    theirs.set_progress_bar_config(disable=True)
    reference = theirs(
        "a star", num_inference_steps=4, generator=torch.Generator().manual_seed(0), **chosen
    ).images[0]
    bound = 1.5 * np.abs(np.asarray(reference, int) - exact).mean()
    for rounding in ("diffusers", "none"):
        picture = np.asarray(half("a star", steps=4, rounding=rounding, **chosen)[0], int)
        assert 0 < np.abs(picture - exact).mean() <= bound, rounding


def test_bytes_round_or_truncate():
    x = np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0], np.float32).reshape(1, 1, 2, 3)
    assert to_bytes(x).ravel().tolist() == [0, 0, 128, 255, 255, 255]
    assert to_bytes(x, "bfl").ravel().tolist() == [0, 0, 127, 254, 255, 255]


@pytest.mark.slow
def test_on_step_sees_the_latents_of_every_nth_step(ours):
    chosen = {"width": 64, "height": 64, "steps": 7, "max_sequence_length": 16}
    whole = ours("a star", seed=3, **chosen)[0]
    seen: dict[int, np.ndarray] = {}

    def keep(step, latents):
        seen[step] = np.asarray(latents)

    for progress in (None, lambda done: None):
        seen.clear()
        picture = ours("a star", seed=3, **chosen, on_step=keep, every=3, progress=progress)[0]
        assert picture.tobytes() == whole.tobytes()
        assert list(seen) == [3, 6, 7]
    assert to_bytes(ours.decode(seen[7])).tobytes() == whole.tobytes()
    assert np.abs(seen[3] - seen[6]).mean() > 0.01, "latents on their way"

    class Enough(Exception):
        pass

    def stop(step, latents):
        raise Enough(step)

    with pytest.raises(Enough, match="1"):
        ours("a star", **chosen, on_step=stop)
    with pytest.raises(ConfigError, match="every must be at least 1 step, got 0"):
        ours("a star", **chosen, on_step=keep, every=0)


@pytest.mark.parametrize(
    ("component", "leaf", "words"),
    [
        ("text_encoder", "final_layer_norm.bias", r"CLIP text encoder \(text_encoder\)"),
        ("text_encoder_2", "final_layer_norm.scale", r"T5 encoder \(text_encoder_2\)"),
        ("transformer", "proj_out.bias", "the transformer is the first"),
        ("vae", "decoder.conv_out.bias", r"the autoencoder \(vae\) is the first"),
    ],
)
def test_the_first_network_that_is_not_finite_is_named(ours, monkeypatch, component, leaf, words):
    changed = []

    def spoil(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not name.endswith(leaf):
            return x
        changed.append(name)
        return x.at[..., 0].set(np.nan)

    params = jax.tree.map_with_path(spoil, ours.params(component))
    assert changed
    monkeypatch.setitem(ours._params, component, params)
    with pytest.raises(ConfigError, match=f"not finite; .*{words}"):
        ours("a star", width=64, height=64, steps=4, max_sequence_length=16)


def test_programs_of_many_sizes_are_not_kept_for_ever(ours, monkeypatch):
    programs, compiled = Executables(FLUX, ours.config, "float32", True), []
    monkeypatch.setattr(programs, "compile", lambda program: compiled.append(program.name) or print)

    def ask(name, sizes):
        for size in sizes:
            programs.get(name, jax.ShapeDtypeStruct((1, 16, 2, 2 * size), np.float32))

    ask("decode", range(1, 30))
    ask("decode", range(22, 30))  # the last ones are there
    assert len(compiled) == 29
    ask("reference", [1])  # and are not driven out by others
    ask("decode", range(22, 30))
    assert len(compiled) == 30
    ask("decode", [1])
    assert len(compiled) == 31


def test_true_cfg_and_negative_prompt_need_each_other(ours):
    for given, words in (
        ({"true_cfg": 4.0}, "true_cfg needs a negative_prompt"),
        ({"negative_prompt": "a star"}, "negative_prompt needs true_cfg above 1"),
        ({"negative_prompt": "", "true_cfg": 1.0}, "negative_prompt needs true_cfg above 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            ours("a ring", **given)


def test_names_of_diffusers_are_answered_with_ours(ours):
    with pytest.raises(ConfigError) as error:
        ours("a star", num_inference_steps=4, guidance_scale=3.0, generator=None, colour="red")
    said = str(error.value)
    for words in (
        "num_inference_steps is called steps here",
        "guidance_scale is called guidance here",
        "generator is called seed here",
        "'colour' is no setting; there are ",
    ):
        assert words in said
    others = (
        StableDiffusionXLPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusion3Pipeline,
        PixArtAlphaPipeline,
        HunyuanVideoPipeline,
    )
    known = [inspect.signature(kind.__call__).parameters for kind in (*THEIR_CLASSES, *others)]
    assert set(OTHER_NAMES) <= {name for parameters in known for name in parameters}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 33}, "width must be a multiple of 16, got 33"),
        ({"steps": 0}, "steps must be from 1 to 1000, got 0"),
        ({"seed": 2**64}, "seed must be"),
        ({"guidance": float("nan")}, "guidance must be a number"),
        ({"colour": "red"}, "'colour' is no setting"),
        ({"max_sequence_length": 513}, "from 1 to 512"),
    ],
)
def test_impossible_settings_are_named(ours, settings, message):
    with pytest.raises(ConfigError, match=message):
        ours("a star", **settings)
