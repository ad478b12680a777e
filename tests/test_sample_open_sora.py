"""Clips of Open-Sora: against three passes in a plain loop; as files; what is refused."""

import shutil
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from open_sora_folders import SMALL, open_sora  # noqa: F401
from PIL import Image
from torch_reference import relative_l2

from fluxjax import load_pipeline, save_clip
from fluxjax.cli import run
from fluxjax.config import OPEN_SORA_256, OPEN_SORA_768, ConfigError
from fluxjax.convert import convert
from fluxjax.families import OPEN_SORA
from fluxjax.families.family import Guidance
from fluxjax.hub import tiny_folder
from fluxjax.models.latents import pack_video, text_ids, unpack_video, video_ids
from fluxjax.models.open_sora import OpenSoraTransformer
from fluxjax.models.video_tiles import decode_tiled
from fluxjax.sample.__main__ import main
from fluxjax.sample.clip_files import Clip, read_clip, read_clip_record, write_clip
from fluxjax.sample.denoise import denoise, passes_run
from fluxjax.sample.given_clips import clip_size, condition_of
from fluxjax.sample.given_pictures import NO_PICTURES, read_given
from fluxjax.sample.noise import TorchGenerator
from fluxjax.sample.override import override
from fluxjax.sample.picture_inputs import NOTHING
from fluxjax.sample.undecoded import Undecoded
from fluxjax.schedules.flow_euler import flow_euler
from fluxjax.schedules.open_sora import VideoGuidance, open_sora_levels, open_sora_passes
from fluxjax.schedules.schedule import pad

STEPS = 13  # of which the one after the eleventh rests


@pytest.fixture(scope="module")
def pipe(open_sora: Path):  # noqa: F811
    return load_pipeline(open_sora)


@pytest.fixture
def sample(pipe, monkeypatch, capsys, tmp_path):
    """Run the command in this process, on that pipeline: (exit code, what it says)."""
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("fluxjax.sample.loading.load_pipeline", lambda model, **options: pipe)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return ended.value.code, "".join(capsys.readouterr())

    return call


def plainly(pipe, noise, texts, condition, guidance):
    """The latents of Open-Sora's own loop: at each step three passes, one after the other."""
    module = OpenSoraTransformer(SMALL.transformer, timestep_rounding="bfl")
    params = pipe.params("transformer")
    frames, rows, columns = noise.shape[2:]
    ids = video_ids(frames, rows, columns), text_ids(texts[0].sequence.shape[1])
    apply = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, *ids))
    levels = open_sora_levels(STEPS, rows * columns // 4, frames)
    weights = open_sora_passes(STEPS, frames, guidance, pictures=condition is not None)
    nothing = np.zeros((1, 1 + noise.shape[1], *noise.shape[2:]), np.float32)
    given = nothing if condition is None else condition
    x = noise
    for i in range(STEPS):
        t = jnp.full(1, levels[i])
        p, n, u = (
            np.asarray(
                unpack_video(
                    apply(params, pack_video(x), pack_video(c), text.sequence, text.vector, t),
                    rows,
                    columns,
                )
            )
            for text, c in ((texts[0], given), (texts[1], given), (texts[1], nothing))
        )
        text_scale, image_scale = (w[None, None, :, None, None] for w in weights[i])
        velocity = u + image_scale * (n - u) + text_scale * (p - n)
        x = x + (levels[i + 1] - levels[i]) * velocity
    return x


@pytest.mark.slow
def test_a_clip_is_that_of_three_passes(pipe, monkeypatch):
    """Text alone: two passes, and one where guidance rests."""
    drawn, decode = {}, pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda x: decode(drawn.setdefault("latents", x)))
    (clip,) = pipe("a red ball rolls", seed=2, steps=STEPS, frames=5, fps=8, motion=2)
    texts = [pipe.encode_prompt(text) for text in ("a red ball rolls. 8 FPS. 2 motion score.", "")]
    noise = pipe.draw_noise(pipe.defaults, 2)
    assert noise.shape == (1, 4, 2, 4, 6)
    expected = plainly(pipe, noise, texts, None, VideoGuidance())
    assert relative_l2(np.asarray(drawn["latents"]), expected) < 1e-5
    vae = pipe.executables.modules("decode")[0]
    latents = np.moveaxis(expected, 1, -1) / SMALL.vae.scaling_factor
    pixels = decode_tiled(vae, pipe.params("vae"), latents, SMALL.tiling)[0]
    rounded = np.floor(np.clip(pixels / 2 + 0.5, 0, 1) * 255 + 0.5)
    assert clip.frames.shape == (5, 32, 48, 3) and clip.fps == 8
    assert np.abs(clip.frames - rounded).max() <= 1
    assert (
        clip.frames.std() > 20 and (clip.frames[1:] != clip.frames[:-1]).any(axis=(1, 2, 3)).all()
    )


@pytest.mark.slow
def test_a_clip_from_a_picture_is_that_of_three_passes(pipe, monkeypatch, tmp_path):
    """Scaled and cropped, its posterior drawn from, put back at the end; guided by frame."""
    drawn, decode = {}, pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda x: decode(drawn.setdefault("latents", x)))
    seen = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    Image.fromarray(seen).save(tmp_path / "first.png")
    chosen = {"steps": STEPS, "frames": 5, "fps": 8, "motion": 0}
    (clip,) = pipe("a ball", seed=2, reference=tmp_path / "first.png", **chosen)
    texts = [pipe.encode_prompt(text) for text in ("a ball. 8 FPS.", "")]
    draws = TorchGenerator(2)
    noise, own = (draws.randn((1, 4, 2, 4, 6)) for _ in range(2))
    vae, params = pipe.executables.modules("decode")[0], pipe.params("vae")
    middle = Image.fromarray(seen).resize((48, 40), Image.Resampling.BICUBIC).crop((0, 4, 48, 36))
    pixels = np.asarray(middle, np.float32)[None, None] / 127.5 - 1
    found = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))(params, pixels)
    sample = found.mean + np.exp(found.logvar / 2) * np.moveaxis(own[:, :, :1], 1, -1)
    condition = np.zeros((1, 5, 2, 4, 6), np.float32)
    condition[:, :1, :1] = 1
    condition[:, 1:, :1] = 0.476986 * np.moveaxis(np.asarray(sample), -1, 1)
    expected = np.array(plainly(pipe, noise, texts, condition, VideoGuidance()))
    expected[:, :, 0] = condition[:, 1:, 0]
    assert relative_l2(np.asarray(drawn["latents"]), expected) < 1e-4
    path, *_ = save_clip(clip, tmp_path / "clip.webp")
    record = read_clip_record(path)["settings"]
    assert record["reference_sha256"] and record["reference"].endswith("first.png")


def test_what_is_given_is_named(pipe):
    black, own = Image.new("RGB", (96, 96)), pipe.defaults
    clip = Clip(np.zeros((40, 8, 8, 3), np.uint8), 24.0)
    for objects, chosen, kind in (
        ({"reference": black}, {}, "i2v_head"),
        ({"last": black}, {}, "i2v_tail"),
        ({"reference": black}, {"loop": True}, "i2v_loop"),
        ({"video": clip}, {"video_kind": "v2v_tail"}, "v2v_tail"),
    ):
        given, settings = read_given(override(own, chosen), objects)
        assert condition_of(given, settings) == kind
        assert pipe.family.find_task(pipe.config, given.names).channels == ("given",)
    frames = {"reference": black, "last": black}
    for objects, chosen, message in (
        (frames, {"loop": True}, "loop ends a clip with its reference: give a reference and no"),
        ({"video": clip, **frames}, {}, "from a video or from pictures: give one of the two"),
        ({"image": black}, {}, "from a last frame, or from .* or from a video; it was given an im"),
    ):
        with pytest.raises(ConfigError, match=message):
            given, _ = read_given(override(own, chosen), objects)
            pipe.family.find_task(pipe.config, given.names)
    with pytest.raises(
        ConfigError, match="v2v_head needs a clip of at least 37 frames around it, not 5"
    ):
        pipe("a ball", video=Clip(np.zeros((33, 8, 8, 3), np.uint8), 24.0))
    with pytest.raises(ConfigError, match="the given video has 30 frames, and v2v_head takes 33"):
        pipe("a ball", video=Clip(np.zeros((30, 8, 8, 3), np.uint8), 24.0), frames=41)
    assert clip_size(OPEN_SORA_768, (1024, 576)) == (1024, 576)
    assert clip_size(OPEN_SORA_768, (500, 900)) == (576, 1024)
    assert clip_size(OPEN_SORA_768, (700, 700)) == (768, 768)
    assert clip_size(SMALL, (500, 900)) == (48, 32)


def weights_of(steps, **asked):
    guided = OPEN_SORA.scale(SMALL, Guidance(**asked))
    return OPEN_SORA.passes(steps, guided)


def test_as_few_passes_as_give_the_same():
    text = {"guidance": 7.5, "frames": 5}
    assert passes_run(open_sora_passes(50, 2)) == 110 and 3 * 50 == 150
    assert passes_run(weights_of(50, **text)) == 80
    image = {**text, "pictures": frozenset({"reference"})}
    assert passes_run(weights_of(50, **image)) == 110
    assert passes_run(weights_of(50, **image, oscillates=False)) == 150
    assert passes_run(weights_of(50, **image, image=1.0)) == 80
    assert passes_run(weights_of(50, guidance=1.0, frames=5)) == 50
    assert OPEN_SORA.scale(SMALL, Guidance(1.0, frames=5)) is None
    with pytest.raises(ConfigError, match="negative_prompt needs another guidance than 1"):
        OPEN_SORA.scale(SMALL, Guidance(1.0, frames=5, negative_prompt="blurred"))


@pytest.mark.slow
def test_passes_that_are_left_out_are_not_run():
    """Counted where the network would be."""
    seen = []

    def network(x, each):
        jax.debug.callback(lambda count: seen.append(int(count)), len(x))
        return x * each

    weights = open_sora_passes(16, 2)
    schedule = pad(flow_euler(np.linspace(1, 0, 17, dtype=np.float32)))
    drawn = jax.jit(
        lambda x: denoise(
            network,
            jnp.ones(16),
            (x,),
            schedule,
            jnp.asarray(weights),
            alone=(network, jnp.ones(16)),
        )
    )
    jax.block_until_ready(drawn(jnp.ones((1, 2, 3))))
    jax.effects_barrier()
    assert seen == [3] * 11 + [1, 3, 1, 3, 1] and sum(seen) == passes_run(weights)


@pytest.mark.slow
def test_a_file_says_how_its_clip_was_made(pipe, tmp_path, sample):
    (clip,) = pipe("a red ball", seed=2, fps=8, guidance=1.0)
    path, *stills = save_clip(clip, tmp_path / "ball.webp")
    assert [still.name for still in stills] == [
        f"ball-{n}.png" for n in ("first", "middle", "last")
    ]
    settings = read_clip_record(path)["settings"]
    assert (settings["frames"], settings["fps"], settings["seed"]) == (5, 8, 2)
    assert sample("--like", path, "--like-paths", "-o", tmp_path / "again.webp")[0] == 0
    again = read_clip(tmp_path / "again.webp")
    np.testing.assert_array_equal(again.frames, read_clip(path).frames)
    pytest.importorskip("av")
    assert sample("--like", stills[1], "--like-paths", "-o", tmp_path)[0] == 0
    (third,) = tmp_path.glob("*.mp4")
    assert read_clip(third).frames.shape == clip.frames.shape
    assert read_clip_record(third)["settings"] == settings
    model = ("a ball", "--model", tmp_path)
    wrong = sample(*model, "-o", tmp_path / "ball.png")
    assert wrong[0] == 2 and "clips are written as .mp4 or .webp" in wrong[1]
    wrong = sample(*model, "--video", tmp_path / "none.mp4")
    assert wrong[0] == 2 and "there is no video /" in wrong[1]
    wrong = sample(*model, "--frames", 6)
    assert wrong[0] == 2 and wrong[1].count("\n") == 1 and "got 6; 5 would do" in wrong[1]


def test_frames_reach_the_file_as_they_are_decoded(pipe, monkeypatch, tmp_path):
    """However long a clip is, no more than two groups of frames are in memory."""
    pytest.importorskip("av")
    settings = pipe.defaults
    made: list[weakref.ref] = []
    most: list[int] = []

    class Group(np.ndarray):
        pass

    def groups(latents):
        for i in range(12):
            group = np.full((1, 4, 32, 48, 3), i / 12 - 0.5, np.float32).view(Group)
            made.append(weakref.ref(group))
            most.append(sum(one() is not None for one in made))
            yield group
            del group

    drawn = Undecoded(np.zeros((1, 4, 1, 4, 6)), settings, (48, 32), NO_PICTURES, NOTHING, (), pipe)
    monkeypatch.setattr(pipe, "_drawn", lambda settings, asked: drawn)
    monkeypatch.setattr(pipe, "clip_decoder", lambda: groups)
    (frames,) = pipe.draw_clips(settings)
    assert not most, "nothing is decoded before it is asked for"
    path, *_ = write_clip(tmp_path / "clip.mp4", frames, fps=24, frames=48)
    assert len(most) == 12 and max(most) <= 2
    assert read_clip(path).frames.shape == (48, 32, 48, 3)


def test_what_is_refused(pipe):
    for options, message in (
        ({"frames": 6}, "frames must be 1 more than a multiple of 4, got 6; 5 would do"),
        ({"width": 40}, "width must be a multiple of 16, got 40"),
        ({"sampler": "heun"}, "drawn by Euler's steps alone"),
        ({"true_cfg": 2.0}, "true_cfg is for models that were distilled"),
        ({"image": "/tmp"}, "there is no image"),
        ({"motion": 8}, "motion must be from 1"),
        ({"image_guidance": 2.0}, "by the frames that a clip is given: give a reference"),
        ({"video_kind": "v2v_tail"}, "video_kind says which part of a clip a video is: give a"),
    ):
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            pipe("a ball", **options)


@pytest.mark.slow
def test_the_published_files_draw_what_their_folder_draws(open_sora, pipe, tmp_path):  # noqa: F811
    transformer, vae = tmp_path / "Open_Sora_v2.safetensors", tmp_path / "hunyuan_vae.safetensors"
    texts = tmp_path / "texts"  # as ComfyUI's folder, with those of other models
    texts.mkdir()
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(open_sora / name, texts / name)
    clip, t5 = texts / "clip_l.safetensors", texts / "t5xxl_fp16.safetensors"
    parts = {"transformer": transformer, "vae": vae, "text_encoder": clip, "text_encoder_2": t5}
    for component, file in parts.items():
        convert.run(convert.plan(open_sora / component, file, "bfl"))
    for other in ("llava_llama3_fp8_scaled", "t5xxl_fp8_e4m3fn", "clip_g"):
        (texts / f"{other}.safetensors").write_bytes(b"another")
    files = load_pipeline(transformer, vae=vae, text_encoders=texts)
    assert files.family is OPEN_SORA and files.config.frames == OPEN_SORA_256.frames
    files.executables = pipe.executables  # the same networks: nothing to compile again
    size = {"width": 48, "height": 32, "frames": 5, "steps": 3, "max_sequence_length": 16}
    drawn, expected = (one("a red circle", seed=3, **size)[0] for one in (files, pipe))
    np.testing.assert_array_equal(drawn.frames, expected.frames)
    flux = tmp_path / "flux1-tiny.safetensors"
    convert.run(convert.plan(tiny_folder() / "transformer", flux, "bfl"))
    with pytest.raises(ConfigError, match=r"is no model that draws: .*HunyuanVideo"):
        load_pipeline(flux, vae=vae, text_encoders=open_sora)
