"""`python -m fluxjax.sample`: files, lines and errors; alone, without PyTorch."""

import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ctrl_c import heeding_ctrl_c
from PIL import Image
from torch_pipeline import random_pipeline  # noqa: F401

import fluxjax
from fluxjax.cli import run
from fluxjax.config import ConfigError
from fluxjax.hub import embedded_adapter
from fluxjax.sample.__main__ import main
from fluxjax.sample.cache import cache_folder, enable_cache
from fluxjax.sample.known_words import outside, outside_sizes
from fluxjax.sample.picture_formats import encode_picture, read_record

SIZE = ("--width", "64", "--height", "48", "--steps", "3", "--max-sequence-length", "16")
one_pipeline = cache(fluxjax.load_pipeline)


@pytest.fixture
def sample(random_pipeline, monkeypatch, capsys, tmp_path):  # noqa: F811
    """Run the command in this process, on one pipeline: (exit code, stdout lines, stderr)."""
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fluxjax.sample.loading.load_pipeline", lambda model, **options: one_pipeline(model)
    )

    def call(*arguments: str, model: Path | None = random_pipeline):
        source = () if model is None else ("--model", str(model))
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments), *source])
        with pytest.raises(SystemExit) as ended:
            run(main)
        printed = capsys.readouterr()
        return ended.value.code, printed.out.splitlines(), printed.err

    return call


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_one_line_per_picture_and_nothing_is_overwritten(sample):
    code, lines, _ = sample("a", "red", "circle", *SIZE, "--seed", "7", "--number", "2", "--grid")
    assert code == 0
    first, second, sheet = lines
    assert first.startswith("out/a-red-circle-7.png  seed 7  loading ")
    for phase in ("loading", "compiling", "encoding", "denoising", "decoding"):
        assert f"  {phase} " in first
    assert second.startswith("out/a-red-circle-8.png  seed 8  ") and sheet == "out/grid.png"
    assert pixels("out/a-red-circle-7.png").shape == (48, 64, 3)
    np.testing.assert_array_equal(pixels(sheet)[4:52, 72:136], pixels("out/a-red-circle-8.png"))
    before = Path("out/a-red-circle-7.png").read_bytes()
    code, lines, _ = sample("a red circle", *SIZE, "--seed", "7")
    assert lines[0].startswith("out/a-red-circle-7-2.png")
    assert Path("out/a-red-circle-7.png").read_bytes() == before
    assert not list(Path("out").glob(".*")), "no temporary file is left"


def test_what_a_killed_run_left_half_written_goes(sample):
    mine = [f".a-star-1.{kind}.0123abcd.part" for kind in ("png", "jpg", "webp", "mp4")]
    others = [
        ".a-1.txt.0123abcd.part",
        ".notes.part",
        f"deep/{mine[0]}",
        ".a-star-2.png.89abcdef.part",
    ]
    Path("out/deep").mkdir(parents=True)
    for name in (*mine, *others):
        Path("out", name).write_bytes(b"half")
        made = time.time() + 600 if name == others[-1] else 0  # one is just made
        os.utime(Path("out", name), (made, made))
    assert sample("a star", *SIZE, "--seed", "1")[0] == 0
    assert not any(Path("out", name).exists() for name in mine)
    assert all(Path("out", name).exists() for name in others)


def test_like_repeats_a_picture_exactly(sample, random_pipeline):  # noqa: F811
    options = ("--guidance", "2", "--negative-prompt", "", "--true-cfg", "2.5", "--noise", "jax")
    sample(
        "a blue star", *SIZE, *options, "--prompt-2", "rings", "--rounding", "bfl", "--seed", "5"
    )
    original = "out/a-blue-star-5.png"
    code, _, error = sample("--like", original, "--out", "again.png", model=None)
    assert code == 0, error
    np.testing.assert_array_equal(pixels("again.png"), pixels(original))
    assert read_record(Path("again.png")) == read_record(Path(original))
    assert str(random_pipeline.parent) not in Path(original).read_bytes().decode("latin-1")
    sample("--like", original, "--seed", "6", "--out", "other.png", model=None)
    assert (pixels("other.png") != pixels(original)).any()
    assert read_record(Path("other.png"))["settings"]["guidance"] == 2.0


def test_a_file_of_prompts_with_settings_per_line(sample, tmp_path):
    lines = ['{"prompt": "a star", "seed": 3, "width": 96}', "", '"a ring"', '{"prompt": ""}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    code, printed, error = sample("--prompts", "prompts.jsonl", *SIZE)
    assert code == 0, error
    assert len(printed) == 3
    assert printed[0].startswith("out/a-star-3.png") and pixels("out/a-star-3.png").shape[1] == 96
    assert printed[1].startswith("out/a-ring-") and printed[2].startswith("out/picture-")


def test_prompts_from_standard_input(sample, monkeypatch):
    def given(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return sample("--prompts", "-", *SIZE, "-q")

    lines = b'{"prompt": "a star", "seed": 3}\r\n\n{"prompt": "a ring", "seed": 4}'
    code, printed, error = given(lines)
    assert code == 0 and printed == ["out/a-star-3.png", "out/a-ring-4.png"], error
    code, printed, error = given("ein größerer Ring\n".encode())
    assert code == 0 and printed[0].startswith("out/ein-größerer-ring-"), error
    assert given(b"a star\n\xff\n")[::2] == (
        2,
        "error: standard input, line 2: not UTF-8 (byte 0xff at 1)\n",
    )
    assert given(b"")[::2] == (2, "error: standard input has no prompts\n")


@pytest.mark.slow
def test_an_edit_repeats_while_its_reference_is_the_same_file(
    sample,
    tmp_path,
    random_pipeline,  # noqa: F811
    monkeypatch,
):
    pipe = fluxjax.load_pipeline(random_pipeline)
    pipe.defaults = replace(pipe.defaults, width=96, height=96)
    monkeypatch.setattr("fluxjax.sample.loading.load_pipeline", lambda *_, **__: pipe)
    few = ("--steps", "3", "--max-sequence-length", "16", "--seed", "5")
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 80, 112, 3), np.uint8)
    for name, picture in zip(("in/one.png", "in/other.png"), noise, strict=True):
        Image.fromarray(picture).save(name)
    lines = [{"prompt": "a ring", "reference": name} for name in ("one.png", "../in/other.png")]
    (tmp_path / "in" / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, printed, error = sample("--prompts", "in/edits.jsonl", *few, model=None)
    said = "--model tiny-edit draws this" if embedded_adapter("tiny-edit") else "has not learnt to"
    assert code == 0 and error.count(said) == 1
    one, other = (line.split()[0] for line in printed)
    assert pixels(one).shape == (80, 112, 3), "the reference's shape, not the model's"
    assert (pixels(one) != pixels(other)).any()
    settings = read_record(Path(one))["settings"]
    assert settings["reference"] == "../in/one.png"

    code, _, error = sample("--like", one, "--out", "same.png", model=None)
    assert code == 0, error
    np.testing.assert_array_equal(pixels("same.png"), pixels(one))
    again = read_record(Path("same.png"))["settings"]
    assert again == {**settings, "reference": "in/one.png"}
    sample("--like", one, "--reference", "in/other.png", "--out", "new.png", model=None)
    np.testing.assert_array_equal(pixels("new.png"), pixels(other))
    Path("in/one.png").write_bytes(Path("in/other.png").read_bytes())
    code, _, error = sample("--like", one, model=None)
    assert code == 2 and "in/one.png has changed since it was the reference" in error
    Path("in/one.png").unlink()
    code, _, error = sample("--like", one, model=None)
    assert (
        code == 2
        and "made with the reference '../in/one.png', which is not" in error
        and error.count("\n") == 1
    )


@pytest.mark.slow
def test_pictures_from_pictures_repeat_while_their_files_are_the_same(sample, tmp_path):
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    Image.fromarray(noise).save("in/photo.png")
    Image.fromarray((np.indices((48, 80))[1] < 30).astype(np.uint8) * 255).save("in/mask.png")
    few = ("--steps", "3", "--max-sequence-length", "16", "--seed", "5")
    given = ("--image", "in/photo.png", "--mask", "in/mask.png")
    code, (line,), error = sample("a ring", *given, "--soft-mask", *few)
    assert code == 0, error
    drawn = line.split()[0]
    assert pixels(drawn).shape == (48, 80, 3)
    settings = read_record(Path(drawn))["settings"]
    assert (settings["image"], settings["mask"]) == ("../in/photo.png", "../in/mask.png")
    assert settings["strength"] == 0.85 and settings["soft_mask"] is True
    sample("--like", drawn, "--out", "same.png", model=None)
    np.testing.assert_array_equal(pixels("same.png"), pixels(drawn))
    lines = [
        {"prompt": "a ring", "image": "photo.png", "mask": "mask.png", "strength": 1.0},
        {"prompt": "a ring", "image": "photo.png", "expand": [16, 0, 0, 0]},
        {"prompt": "a ring"},
    ]
    (tmp_path / "in" / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, printed, error = sample("--prompts", "in/all.jsonl", *few, "--grid")
    assert code == 0, error
    names = [line.split()[0] for line in printed]
    assert [pixels(name).shape[:2] for name in names[:2]] == [(48, 80), (48, 96)]
    sample("--like", names[1], "--out", "wide.png", model=None)
    np.testing.assert_array_equal(pixels("wide.png"), pixels(names[1]))
    Image.fromarray(noise[..., 0]).save("in/mask.png")
    code, _, error = sample("--like", drawn, model=None)
    assert code == 2 and "in/mask.png has changed since it was the mask" in error
    code, _, error = sample("--like", drawn, "--like-anyway", "--out", "other.png", model=None)
    assert code == 0 and (pixels("other.png") != pixels(drawn)).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "there is nothing to draw"),
        (("a", "--width", "33"), "width must be a multiple of 16, got 33; 32 would do"),
        (("a", "--steps", "0"), "steps must be from 1 to 1000, got 0"),
        (("a", "--seed", "-1"), "seed must be from 0"),
        (("a", "--seed", str(2**64)), "seed must be from 0 to 2**64 - 1"),
        (("a", "--seed", str(2**64 - 1), "--number", "2"), "seed must be from 0"),
        (("a", "--number", str(2**70)), "number must be at most 1048576"),
        (("a", "--number", "0"), "number must be at least 1, got 0"),
        (("a", "--true-cfg", "3"), "true_cfg needs a negative_prompt"),
        (("a", "--negative-prompt", "b"), "negative_prompt needs true_cfg above 1"),
        (("a", "--out", "file/x"), "file"),
        (("a", "--out", "circle"), "circle is a link that leads nowhere"),
        (("a", "--out", "circle/x.png"), "circle is a link that leads nowhere"),
        (("a", "--coordinator", ""), "--coordinator is empty: give a value, or leave it out"),
        (("a", "--lora", "x.safetensors", "--lora", ""), "--lora is empty"),
        (("--prompts", "missing.jsonl"), "there is no file missing.jsonl"),
        (("--prompts", "bad.jsonl"), "bad.jsonl, line 1: 'colour' is no setting"),
        (("--prompts", "types.jsonl"), "types.jsonl, line 1: steps must be an integer, got 'many'"),
        (("--prompts", "broken.jsonl"), "broken.jsonl, line 3: not JSON"),
        (("a", "--prompts", "bad.jsonl"), "give a PROMPT or --prompts, not both"),
        (
            ("--like", "sheet.png"),
            "sheet.png is a sheet: --like takes one of its pictures: a-1.png",
        ),
        (("a", "--width", "0"), "width must be from 1 to 16384, got 0"),
        (
            ("a", "--height", str(2**70)),
            "height must be from 1 to 16384, got 1180591620717411303424",
        ),
        (
            ("a", "--true-cfg", "1e30", "--negative-prompt", ""),
            "true_cfg must be from -1000 to 1000, got 1e+30",
        ),
        (("a", "--true-cfg", "0.5"), "true_cfg needs a negative_prompt"),
        (("a", "--guidance-rescale", "0.5"), "guidance_rescale is of classifier-free guidance"),
        (
            ("a", "--aesthetic-score", "9"),
            "aesthetic_score is told to Stable Diffusion XL's refiner",
        ),
        (("a", "--no-noise-mask"), "noise_mask is for models that read a mask"),
        (("--prompts", "noise_mask.jsonl"), "line 1: noise_mask is for models that read a mask"),
        (("a", "--no-size-bins"), "size_bins are PixArt's: FluxPipeline draws in the size"),
        (("a", "--prompt-3", "b"), "prompt_3 is for a third text encoder"),
        (("a", "--negative-crop", "1,1"), "negative_crop is told to Stable Diffusion XL alone"),
        (("a", "--skip-layer-scale", "2"), "skip_layer_scale must be given with skip_layers"),
        (("a", "--skip-layer-range", "0,0.5"), "skip_layer_range must be given with skip_layers"),
        (("a", "--sequence", "ring"), "give --mesh too"),
        (("a", "--guidance", "nan"), "guidance must be a number, got nan"),
        (("a", "--guidance", "-inf"), "guidance must be a number, got -inf"),
        (
            ("a", "--lora", "x.safetensors:inf"),
            "x.safetensors: its scale must be a number within 1e+30, got inf",
        ),
        (("a\udcff",), "prompt is not Unicode text: the byte 0xff at character 2"),
        (("a", "--prompt-2", "\ud800"), "prompt_2 is not Unicode text: U+D800 at character 1"),
        (
            ("a", "--out", "x.gif"),
            "x.gif: pictures are written as .png, .jpg, .jpeg, .webp, clips as .mp4, .webp, not as",
        ),
        (("a", "--out", "x.mov"), "clips as .mp4, .webp, not as .mov"),
        (("a", "--out", "file"), "file is a file, but no picture's"),
        (("a", "--name", "{promt}"), "there is no field 'promt', but prompt, seed"),
        (("a", "--name", "../{seed}"), "'/' cannot be in a file's name; folders belong into --out"),
        (("a", "--vae", "~nosuchuser/x"), "~nosuchuser/x: there is no user of that name"),
        (("a", "--like-anyway"), "give that too"),
        (("a", "--reference", "missing.png"), "there is no reference picture"),
        (("a", "--reference", "file"), "file cannot be the reference: it is no picture in a known"),
        (("a", "--reference", "tiny.png"), "at least 16 pixels on each side, got 8 x 20"),
        (("--prompts", "reference.jsonl"), "line 1: reference must be a text, got 3"),
        (("--like", "missing.png"), "there is no picture missing.png"),
        (("--like", "plain.png"), "plain.png does not say how it was made"),
        (("--like", "file"), "file is not a picture"),
    ],
)
def test_impossible_requests_are_one_sentence(sample, arguments, words):
    Path("file").write_text("some text")
    Path("circle").symlink_to("circle")
    Path("bad.jsonl").write_text('{"prompt": "a", "colour": "red"}')
    Path("types.jsonl").write_text('{"prompt": "a", "steps": "many"}')
    Path("reference.jsonl").write_text('{"prompt": "a", "reference": 3}')
    Path("noise_mask.jsonl").write_text('{"prompt": "a", "noise_mask": false}')
    Path("broken.jsonl").write_text('"a"\r\n\r\n{"prompt": \r\n')
    Image.new("RGB", (16, 16)).save("plain.png")
    sheet = {"fluxjax": "1", "pictures": [{"file": "a-1.png"}, {"file": "a-2.png"}]}
    Path("sheet.png").write_bytes(encode_picture(Image.new("RGB", (16, 16)), ".png", sheet))
    Image.new("RGB", (8, 20)).save("tiny.png")
    code, lines, error = sample(*arguments)
    assert code == 2 and not lines
    assert words in error and error.startswith("error: ") and len(error.splitlines()) == 1


def test_half_a_folder_is_one_sentence(random_pipeline, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("FLUXJAX_CACHE", "off")

    def attempt(model: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["sample", "a", "--model", str(model), *SIZE])
        with pytest.raises(SystemExit) as ended:
            run(main)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and len(error.splitlines()) == 1, error
        return error

    assert "there is no model folder" in attempt(tmp_path / "nowhere")
    half = tmp_path / "half"
    half.mkdir()
    assert "model_index.json is missing" in attempt(half)
    for entry in random_pipeline.iterdir():
        (half / entry.name).symlink_to(entry)
    (half / "vae").unlink()
    assert "vae/config.json is missing" in attempt(half)
    (half / "vae").mkdir()
    (half / "vae" / "config.json").write_bytes((random_pipeline / "vae/config.json").read_bytes())
    assert "vae" in attempt(half)
    (half / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x08\x00\x00")
    assert "cut short" in attempt(half)
    shutil.rmtree(half / "vae")
    (half / "vae").symlink_to(random_pipeline / "vae")
    (half / "tokenizer_2").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = attempt(half)
    assert "has no tokenizer_2, and the published one is not to be had" in error
    assert "HF_HUB_OFFLINE is set" in error


def test_no_space_is_one_sentence_and_leaves_nothing_behind(sample, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fluxjax.atomic_write.os.fsync", full)
    code, lines, error = sample("a", *SIZE)
    assert code == 2 and not lines
    assert re.search(r"^error: out.a-\d+\.png: No space left on device$", error, re.MULTILINE)
    assert not list(Path("out").iterdir())


def test_cache_folder_is_private_and_can_be_moved_or_switched_off(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    assert cache_folder() is None
    monkeypatch.delenv("FLUXJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fluxjax" / "compiled"
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("FLUXJAX_CACHE", str(shared))
    assert "open to other users" in str(enable_cache())


def test_prompts_outside_the_embedded_models_world(tmp_path):
    world = {"words": ["a", "red", "circle"], "knows": "drawn shapes"}
    (tmp_path / "world.json").write_text(json.dumps(world))
    assert outside("A red circle.", tmp_path) == ""
    note = outside("a photo of a Cat", tmp_path)
    assert '"photo", "of", "cat"' in note and "drawn shapes" in note and "--model" in note


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("you're a red circle", '"you\'re"'),
        ("a zigzag, a ZIGZAG and the zigzag’s circle", '"zigzag", "zigzag’s"'),
        ("a circle’s left, a red-coloured circle & “a GREY star”", ""),
        ("A RED CIRCLE; underneath: 2 rhombuses!", ""),
        ("please draw 🔴 one ﬁsh", '"🔴", "fish"'),
        ("rings under the background of a kite-square", '"kite-square"'),
        ("a b c d e f g h", '"b", "c", "d", "e", "f" and 2 more'),
    ],
)
def test_the_note_names_what_is_really_unknown_once(prompt, unknown):
    note = outside(prompt)
    assert note.partition(" it draws")[0] == (
        f"the tiny model never read {unknown};" if unknown else ""
    )


def test_sizes_outside_the_embedded_models_world(tmp_path, monkeypatch, capsys):
    sizes = {"least": 64, "most": 160, "aspect": 2, "refused_below": 48, "refused_above": 320}
    world = {"words": ["a", "star"], "knows": "stars", "sizes": sizes}
    (tmp_path / "world.json").write_text(json.dumps(world))
    for width, height in ((64, 64), (160, 160), (80, 160), (128, 64)):
        assert outside_sizes(width, height, tmp_path) == ""
    for width, height in ((48, 64), (176, 160), (160, 64), (320, 320)):
        note = outside_sizes(width, height, tmp_path)
        assert "64 to 160 pixels" in note and f"{width} x {height}" in note and "\n" not in note
    for width, height in ((32, 64), (336, 160), (1024, 1024)):
        with pytest.raises(ConfigError, match=f"64 to 160 .*{width} x {height}"):
            outside_sizes(width, height, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "world.json").write_text(json.dumps({"words": [], "knows": ""}))
    assert outside_sizes(1024, 1024, tmp_path / "other") == ""
    # The second picture is refused before the first one is drawn.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('"a star"\n{"prompt": "a star", "width": 1024}\n')
    with pytest.raises(ConfigError, match="1024 x"):
        main(["--prompts", "p.jsonl"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_alone_without_pytorch_with_a_cache_and_ctrl_c(random_pipeline, tmp_path):  # noqa: F811
    program = (
        "import sys\n"
        "from fluxjax.sample.__main__ import main\n"
        "from fluxjax.cli import run\n"
        "def checked():\n"
        "    code = main()\n"
        "    foreign = {'torch', 'diffusers', 'transformers', 'orbax'} & set(sys.modules)\n"
        "    assert not foreign, foreign\n"
        "    return code\n"
        "run(checked)\n"
    )
    cached = tmp_path / "cache"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"FLUXJAX_CACHE": str(cached), "XLA_FLAGS": ""}
    command = [sys.executable, "-c", program, "a star", "--model", str(random_pipeline), *SIZE]
    ended = subprocess.run(
        [*command, "--seed", "1"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "note:" not in ended.stderr and "Traceback" not in ended.stderr
    assert (tmp_path / "out" / "a-star-1.png").is_file()
    assert stat.S_IMODE(cached.stat().st_mode) == 0o700
    compiled = {path.name for path in cached.iterdir() if path.name.endswith("-cache")}
    assert len(compiled) >= 3

    (tmp_path / "many.jsonl").write_text('"a star"\n' * 500)
    running = subprocess.Popen(
        heeding_ctrl_c(
            [*command[:3], "--model", str(random_pipeline), *SIZE, "--prompts", "many.jsonl"]
        ),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    assert "seed" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=300)
    assert running.returncode == 130 and "Traceback" not in error
    assert {path.name for path in cached.iterdir() if path.name.endswith("-cache")} == compiled
    assert not list((tmp_path / "out").glob(".*"))


def test_what_has_changed_is_refused_unless_drawn_anyway(sample, tmp_path, random_pipeline):  # noqa: F811
    model = tmp_path / "model"
    model.mkdir()
    for entry in random_pipeline.iterdir():
        (model / entry.name).symlink_to(entry)
    sample("a star", *SIZE, "--seed", "5", model=model)
    code, _, error = sample("--like", "out/a-star-5.png", "--out", "same.png", model=None)
    assert code == 0 and f"out/a-star-5.png names: model {model}" in error
    (model / "scheduler").unlink()
    shutil.copytree(random_pipeline / "scheduler", model / "scheduler")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text() + " ")
    code, lines, error = sample("--like", "out/a-star-5.png", model=None)
    assert code == 2 and not lines
    assert error.splitlines()[-1] == (
        "error: not what out/a-star-5.png was made with any more: model scheduler; "
        "--like-anyway draws all the same"
    )
    code, lines, error = sample("--like", "out/a-star-5.png", "--like-anyway", model=None)
    assert code == 0 and len(lines) == 1 and "drawn all the same" in error
    code, _, error = sample("--like", "out/a-star-5.png", model=random_pipeline)
    assert code == 0 and "what is given is not what" not in error, "the same content elsewhere"
    code, _, error = sample("--like", "out/a-star-5.png", model=model)
    assert code == 0 and "what is given is not what out/a-star-5.png was made with: " in error


def test_formats_quiet_records_and_lines_with_numbers(sample, tmp_path):
    code, lines, error = sample("a star", *SIZE, "-n", "2", "-o", "x.jpg", "--seed", "1", "-q")
    assert code == 0 and lines == ["x.jpg", "x-2.jpg"] and not error
    assert read_record(Path("x-2.jpg"))["settings"]["seed"] == 2
    code, _, error = sample("a star", *SIZE, "--out", "x.jpg", "--no-record")
    assert "note: x.jpg was there already and is kept" in error
    with pytest.raises(ValueError, match="does not say how it was made"):
        read_record(Path("x-3.jpg"))
    (tmp_path / "list.txt").write_text("a star\r\nein größerer Ring\r\n")
    name = ("--name", "{number}-{prompt}-{seed:03}.webp", "--seed", "4")
    code, lines, _ = sample("--prompts", "list.txt", *SIZE, *name, "-q")
    assert lines == ["out/1-a-star-004.webp", "out/2-ein-größerer-ring-004.webp"]
    (tmp_path / "l.jsonl").write_text('{"prompt": "a", "number": 3, "seed": 1}\n"b"')
    code, lines, _ = sample("--prompts", "l.jsonl", *SIZE, "--grid", "-q")
    assert lines[:3] == ["out/a-1.png", "out/a-2.png", "out/a-3.png"] and len(lines) == 5
    code, _, error = sample("--like", "out/grid.png")
    assert "is a sheet: --like takes one of its pictures: a-1.png, a-2.png, a-3.png, b-" in error


def test_every_picture_is_drawn_though_nobody_reads_the_lines(sample, monkeypatch):
    def gone(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout.write", gone)
    code, _, _ = sample("a", *SIZE, "-n", "3", "--seed", "1")
    assert code == 0 and len(list(Path("out").iterdir())) == 3


def test_sizes_that_cannot_fit_are_said_at_once(sample, monkeypatch):
    monkeypatch.setattr("fluxjax.sample.memory_estimate.available_bytes", lambda: 20_000_000)
    code, lines, error = sample("a", *SIZE[4:], "--width", "4096", "--height", "4096")
    assert code == 2 and not lines
    assert "4096 x 4096 pixels cannot fit" in error and "20 MB are free" in error


@pytest.mark.slow
def test_pictures_of_the_python_api_repeat(sample, random_pipeline, tmp_path):  # noqa: F811
    pipe = fluxjax.load_pipeline(random_pipeline)
    size = {"width": 64, "height": 48, "steps": 3, "max_sequence_length": 16}
    (picture,) = pipe("a star", seed=9, **size)
    with pytest.raises(ValueError, match="no pipeline returned it"):
        fluxjax.save_picture(Image.new("RGB", (16, 16)), "x.png")
    path = fluxjax.save_picture(picture.copy(), "star.png")
    assert fluxjax.save_picture(picture, "star.png") == Path("star-2.png")
    code, _, error = sample("--like", path, "--out", "again.png", model=None)
    assert code == 0, error
    np.testing.assert_array_equal(pixels("again.png"), np.asarray(picture))
    together = pipe("a star", seed=9, number=2, **size)
    fluxjax.save_picture(together[1], "second.png")
    code, _, error = sample("--like", "second.png", model=None)
    assert code == 2 and "second.png cannot be repeated: 'one of 2 pictures from one seed" in error


@pytest.mark.slow
def test_whatever_a_killed_run_leaves_under_a_final_name_is_whole(random_pipeline, tmp_path):  # noqa: F811
    (tmp_path / "many.jsonl").write_text('"a star"\n' * 2000)
    environment = {**os.environ, "FLUXJAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "fluxjax.sample", "--model", str(random_pipeline), *SIZE]
    random = np.random.default_rng(0)
    for _ in range(4):
        running = subprocess.Popen(
            [*command, "--prompts", "many.jsonl"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert running.stdout is not None
        assert "seed" in running.stdout.readline()
        time.sleep(random.uniform(0, 0.5))
        running.kill()
        running.communicate()
    drawn = [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert len(drawn) >= 4
    for path in drawn:
        assert pixels(path).shape == (48, 64, 3) and read_record(path)["settings"]["steps"] == 3


def test_lines_with_loras_of_their_own_are_drawn_one_lora_after_another(sample, monkeypatch):
    asked = []

    def load(model, **options):
        asked.append(options["loras"])
        return one_pipeline(model)

    monkeypatch.setattr("fluxjax.sample.loading.load_pipeline", load)
    for name in ("one.st", "two.st"):
        Path(name).write_text(name)
    lines = [
        '"a"',
        '{"prompt": "b", "lora": "one.st:0.5"}',
        '{"prompt": "c", "lora": []}',
        '{"prompt": "d", "lora": ["one.st:0.5"]}',
    ]
    Path("l.jsonl").write_text("\n".join(lines))
    code, printed, error = sample("--prompts", "l.jsonl", *SIZE, "--lora", "two.st", "-q")
    assert code == 0, error
    two, one = (f"{Path.cwd()}/two.st:1",), (f"{Path.cwd()}/one.st:0.5",)
    assert asked == [two, one, ()] * 2, "checked before the first picture, then drawn"
    assert [path.split("-")[0][-1] for path in printed] == ["a", "b", "d", "c"]
    records = [read_record(Path(path)) for path in printed]
    assert [one.get("lora") for one in records] == [
        ["../two.st:1"],
        ["../one.st:0.5"],
        ["../one.st:0.5"],
        None,
    ]
    Path("l.jsonl").write_text('"a"\n{"prompt": "b", "lora": "three.st"}')
    code, printed, error = sample("--prompts", "l.jsonl", *SIZE)
    assert code == 2 and not printed
    assert error.startswith("error: l.jsonl, line 2: there is no LoRA file")


def test_without_a_terminal_a_line_every_few_seconds_tells_how_far_it_is(capsys, monkeypatch):
    from fluxjax.sample import step_progress

    monkeypatch.setattr(step_progress, "EVERY", 0.05)
    said = ""

    def until(words: str) -> None:
        nonlocal said
        for _ in range(3000):
            said += capsys.readouterr().err
            if words in said:
                return
            time.sleep(0.01)

    with step_progress.step_progress(8, "picture 2 of 3") as report:
        assert report is not None
        until("compiling, 0 s\n")
        report(3)
        until("step 3 of 8")
        time.sleep(0.1)
        report(5)
        until("step 5 of 8")
    each = float(re.findall(r"([\d.]+) s a step", said)[0])
    assert 0.05 <= each < 5, "seconds of each step after the third"
    lines = [re.sub(r"[\d.]+ s\b", "N s", line) for line in said.splitlines()]
    assert list(dict.fromkeys(lines)) == [
        "picture 2 of 3: loading and compiling, N s",
        "picture 2 of 3: step 3 of 8, N s",
        "picture 2 of 3: step 5 of 8, N s a step, N s",
    ]
    with step_progress.step_progress(8, "picture", quiet=True) as report:
        assert report is None
