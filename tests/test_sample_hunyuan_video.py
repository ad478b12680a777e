"""Clips of HunyuanVideo: those of diffusers, from text and from a first frame; as files."""

import sys
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hunyuan_video_folders import hunyuan_video, save_hunyuan_video  # noqa: F401
from PIL import Image

import fluxjax
from fluxjax.cli import run
from fluxjax.config import HUNYUAN_VIDEO_720, PRESETS, ConfigError
from fluxjax.families import family_of
from fluxjax.sample.__main__ import main
from fluxjax.sample.clip_files import read_clip, read_clip_record

PROMPT = "the main objects of a video: light, style and {movements}"
SIZE: dict[str, Any] = {"width": 48, "height": 32}
OURS: dict[str, Any] = {"steps": 4, "seed": 3, "frames": 9, "max_sequence_length": 24, **SIZE}
THEIRS: dict[str, Any] = {
    "num_inference_steps": 4,
    "num_frames": 9,
    "max_sequence_length": 24,
    "output_type": "pil",
    **SIZE,
}
slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def ours(hunyuan_video):  # noqa: F811
    return fluxjax.load_pipeline(hunyuan_video)


@pytest.fixture(scope="module")
def theirs(hunyuan_video):  # noqa: F811
    return diffusers.HunyuanVideoPipeline.from_pretrained(hunyuan_video)


@pytest.fixture(scope="module")
def picture():
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(colours).resize((70, 50), Image.Resampling.BICUBIC)


def drawn(pipeline, **choices) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    choices = {"generator": torch.Generator().manual_seed(3), **THEIRS, **choices}
    (frames,) = pipeline(prompt=PROMPT, **choices).frames
    return np.stack([np.asarray(frame, int) for frame in frames])


def assert_same(clip, expected, frames=9):
    drawn = clip.frames.astype(int)
    assert drawn.shape == expected.shape == (frames, 32, 48, 3) and drawn.std() > 20
    assert (np.abs(drawn - expected) <= 1).mean() >= 0.999


def apart(clip, other) -> float:
    return float(np.abs(clip.frames.astype(int) - other.frames.astype(int)).mean())


@slow
def test_a_clip_is_that_of_diffusers(ours, theirs):
    (clip,) = ours(PROMPT, **OURS)
    assert_same(clip, drawn(theirs))
    assert (clip.frames[1:] != clip.frames[:-1]).any(axis=(1, 2, 3)).all()
    for change in ({"guidance": 1.0}, {"seed": 4}, {"prompt_2": "a cat"}, {"flow_shift": 2.0}):
        (other,) = ours(PROMPT, **{**OURS, **change})
        assert apart(other, clip) > 1, change
    (other,) = ours(PROMPT.replace("light", "camera"), **OURS)
    assert apart(other, clip) > 1


@slow
def test_true_cfg_beside_embedded_guidance(ours, theirs):
    asked = {"negative_prompt": "color and shape"}
    expected = drawn(theirs, true_cfg_scale=3.0, **asked)
    assert_same(ours(PROMPT, true_cfg=3.0, **asked, **OURS)[0], expected)


@slow
@pytest.mark.parametrize("kind", ["token_replace", "latent_concat"])
def test_a_clip_from_a_picture_is_that_of_diffusers(kind, shared, picture, tmp_path):
    """Of a first frame that is joined the first frames are dropped; with true CFG it has black in
    the picture's place."""
    folder = save_hunyuan_video(tmp_path / "model", shared / "tokenizers", kind)
    ours = fluxjax.load_pipeline(folder)
    theirs = diffusers.HunyuanVideoImageToVideoPipeline.from_pretrained(folder)
    asked, frames = {}, 9
    if kind == "latent_concat":
        asked, frames = {"negative_prompt": "color and shape"}, 5
    guided = {"true_cfg_scale": 3.0} if asked else {}
    expected = drawn(theirs, image=picture, **asked, **guided)
    guided = {"true_cfg": 3.0} if asked else {}
    (clip,) = ours(PROMPT, reference=picture, **asked, **guided, **OURS)
    assert_same(clip, expected, frames)
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    (other,) = ours(PROMPT, reference=turned, **asked, **guided, **OURS)
    assert apart(other, clip) > 1
    with pytest.raises(ConfigError, match="draws from a reference; it was given text alone"):
        ours(PROMPT, **OURS)


@slow
def test_with_less_memory(ours, hunyuan_video):  # noqa: F811
    """Networks one after the other, in 8 bits."""
    less = fluxjax.load_pipeline(hunyuan_video, offload=True, quantise="int8")
    assert apart(less(PROMPT, **OURS)[0], ours(PROMPT, **OURS)[0]) <= 5


@slow
def test_in_bfloat16(ours, hunyuan_video):  # noqa: F811
    """Guidance of 6 is told as 6016 there, to which random weights make another clip."""
    pipeline = diffusers.HunyuanVideoPipeline.from_pretrained(hunyuan_video).to(torch.bfloat16)
    low = fluxjax.load_pipeline(hunyuan_video, dtype="bfloat16")
    frames = low(PROMPT, **OURS)[0].frames.astype(int)
    assert np.abs(frames - drawn(pipeline)).mean() <= 8


@slow
def test_a_file_says_how_its_clip_was_made(ours, hunyuan_video, tmp_path, monkeypatch, capsys):  # noqa: F811
    """By the command, with previews."""
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("fluxjax.sample.loading.load_pipeline", lambda model, **options: ours)

    def sample(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return ended.value.code, "".join(capsys.readouterr())

    named = [f"--{n.replace('_', '-')}={value}" for n, value in OURS.items()]
    path = tmp_path / "clip.webp"
    model = (PROMPT, "--model", hunyuan_video)
    assert sample(*model, *named, "--preview", 2, "-o", path)[0] == 0
    settings = read_clip_record(path)["settings"]
    assert (settings["frames"], settings["guidance"], settings["seed"]) == (9, 6.0, 3)
    assert sample("--like", path, "--like-paths", "-o", tmp_path / "again.webp")[0] == 0
    first, again = read_clip(path), read_clip(tmp_path / "again.webp")
    np.testing.assert_array_equal(again.frames, first.frames)
    assert first.frames.std() > 20
    wrong = sample(*model, *named, "--motion", 6)
    assert wrong[0] == 2 and wrong[1].count("\n") == 1 and "motion is Open-Sora's" in wrong[1]


@slow
def test_mistakes_are_one_sentence(ours, picture):
    for choices, words in (
        ({"frames": 6}, "frames must be 1 more than a multiple of 4, got 6; 5 would do"),
        ({"width": 40}, "width must be a multiple of 16, got 40"),
        ({"true_cfg": 2.0}, "true_cfg needs a negative_prompt"),
        ({"negative_prompt": "fog"}, "negative_prompt needs true_cfg above 1"),
        ({"oscillation": False}, "oscillation is Open-Sora's, and HunyuanVideoPipeline has no"),
        ({"reference": picture}, "this model draws from text alone; it was given a reference"),
        ({"eta": 0.5}, "eta is how much noise DDIM adds, and this model is a flow"),
        ({"clip_skip": 1}, "clip_skip leaves out layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            ours(PROMPT, **{**OURS, **choices})


def test_what_belongs_together():
    for name in ("hunyuan-540", "hunyuan-720"):
        config = PRESETS[name]
        config.require_whole(name)
        assert family_of(config.class_name).shape_of(config, 960, 544, 129) == (16, 33, 68, 120)
    whole = replace(config.text_encoder, stops_after=None)
    assert type(config).published({"text_encoder": whole}, "") == HUNYUAN_VIDEO_720
