"""Clips of HunyuanVideo: those of diffusers, from text and from a first frame; as files."""

import functools
import json
import math
import shutil
import struct
import sys
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from comfy_names import comfy_autoencoder, comfy_transformer
from gguf_files import gguf_bytes, info
from hunyuan_video_folders import (
    hunyuan_video,  # noqa: F401
    llava,
    save_hunyuan_video,
    word_tokenizer,
)
from PIL import Image
from safetensors.numpy import load_file
from torch_reference import relative_l2

import fluxjax
from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json, write_json
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.source import open_component
from fluxjax.checkpoint.source_record import METADATA_KEY
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import as_tensor
from fluxjax.cli import run
from fluxjax.config import HUNYUAN_VIDEO_720, LLAMA3_8B, PRESETS, ConfigError
from fluxjax.config.llava import LLAVA_LLAMA3
from fluxjax.convert import convert
from fluxjax.families import family_of
from fluxjax.networks import network_of
from fluxjax.sample.__main__ import main
from fluxjax.sample.clip_files import read_clip, read_clip_record
from fluxjax.sample.given_pictures import Given
from fluxjax.sample.override import override

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
    settings = override(ours.defaults, {"prompt": PROMPT, **asked, **guided, **OURS})
    (streamed,) = ours.draw_clips(settings, given=Given(reference=picture))
    np.testing.assert_array_equal(np.concatenate([*streamed]), clip.frames)
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
@pytest.mark.parametrize(
    ("mesh", "sequence"), [("sequence=2,fsdp=2,tensor=2", "ring"), ("sequence=2,fsdp=4", "ulysses")]
)
def test_a_mesh_draws_what_one_device_draws(mesh, sequence, ours, hunyuan_video):  # noqa: F811
    """18 tokens of a clip, and of 24 of text those that are no padding."""
    many = fluxjax.load_pipeline(hunyuan_video, mesh=mesh, sequence=sequence)
    noise = np.random.default_rng(0).standard_normal((1, 4, 3, 4, 6), np.float32)

    def latents(pipe):
        heard = pipe.encode_prompt(PROMPT, max_sequence_length=24)
        assert 0 < np.asarray(heard.mask).sum() < heard.mask.size
        return np.asarray(pipe.denoise(heard, noise, steps=4))

    assert relative_l2(latents(many), latents(ours)) < 1e-5
    pixels = many.decode(noise)
    assert relative_l2(pixels, ours.decode(noise)) < 1e-5 and pixels.shape[1:] == (9, 32, 48, 3)


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


def write_named(path, network, dialect, prefix="", more=None):
    """One file of a network under other names, with what shapes of a small one do not tell."""
    table = network_of(network.config).dialect(dialect).table(network.config)
    tensors = engine.from_published(network.tensors, table) | (more or {})
    told = {METADATA_KEY: json.dumps({"config": config_json(network.config)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {f"{prefix}{name}": one for name, one in tensors.items()}, told)


@slow
@pytest.mark.parametrize("whose", ["Tencent", "ComfyUI"])
def test_single_files_draw_what_their_folder_draws(whose, ours, hunyuan_video, tmp_path):  # noqa: F811
    transformer, vae = tmp_path / "hunyuan_video.safetensors", tmp_path / "vae.safetensors"
    heard = hunyuan_video
    if whose == "Tencent":
        for component, file in (("transformer", transformer), ("vae", vae)):
            convert.run(convert.plan(hunyuan_video / component, file, "bfl"))
    else:
        parts = {n: open_component(hunyuan_video, n) for n in ("transformer", "vae")}
        write_named(transformer, parts["transformer"], "comfy", "model.model.")
        write_named(vae, parts["vae"], "comfy")
        heard = tmp_path / "text"
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(hunyuan_video / name, heard / name)
        llama = open_component(hunyuan_video, "text_encoder")
        more = {"lm_head.weight": as_tensor(np.zeros((2, 2), np.float32))}
        write_named(heard / "llava_llama3_fp16.safetensors", llama, "causal", more=more)
        clip = open_component(hunyuan_video, "text_encoder_2")
        write_named(heard / "clip_l.safetensors", clip, "published")
        for other in ("llava_llama3_fp8_scaled", "t5xxl_fp16", "clip_g"):  # read of nobody
            (heard / f"{other}.safetensors").write_bytes(b"another")
    files = fluxjax.load_pipeline(transformer, vae=vae, text_encoders=heard)
    assert files.family is ours.family and files.config.networks["text_encoder"].stops_after == 2
    files.executables = ours.executables  # the same networks: nothing to compile again
    (clip,), (expected,) = (one(PROMPT, **OURS) for one in (files, ours))
    np.testing.assert_array_equal(clip.frames, expected.frames)
    back = tmp_path / "back"
    convert.run(convert.plan(transformer, back, "diffusers"))
    theirs = load_file(hunyuan_video / "transformer/diffusion_pytorch_model.safetensors")
    found = load_file(back / "diffusion_pytorch_model.safetensors")
    assert found.keys() == theirs.keys()
    assert all(np.array_equal(found[name], theirs[name]) for name in theirs)


def all_of_clip(folder):
    """transformers' CLIP with the text encoder in `folder`, as OpenAI published it."""
    text = transformers.CLIPTextModel.from_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 24, "image_size": 28, "patch_size": 14}
    vision = {**size, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=text.config.to_dict(), vision_config=vision, projection_dim=20
    )
    whole = transformers.CLIPModel(config)
    state = {name.removeprefix("text_model."): v for name, v in text.state_dict().items()}
    whole.text_model.load_state_dict(state)
    return whole


@slow
def test_tokenizers_beside_the_weights_are_found(hunyuan_video, tmp_path):  # noqa: F811
    """As in Tencent's folders of text encoders, the second of which may be a whole CLIP."""

    def ids(folder):
        pipe = fluxjax.load_pipeline(folder)
        return pipe.family.tokenize(pipe._load_tokenizers(), [PROMPT], max_sequence_length=24)[0]

    folder = shutil.copytree(hunyuan_video, tmp_path / "model")
    for end in ("", "_2"):
        tokenizer = folder / f"tokenizer{end}"
        for file in tokenizer.iterdir():
            shutil.move(file, folder / f"text_encoder{end}" / file.name)
        tokenizer.rmdir()
    for one, other in zip(ids(folder), ids(hunyuan_video), strict=True):
        np.testing.assert_array_equal(one, other)
    whole = all_of_clip(folder / "text_encoder_2")
    whole.save_pretrained(folder / "text_encoder_2")
    pipe, name = fluxjax.load_pipeline(folder), "text_encoder_2"
    before = open_component(hunyuan_video, name).tensors
    found = open_component(folder, name, pipe.config.networks[name]).tensors
    assert found.keys() - before.keys() == {"text_projection.weight"}
    for key, tensor in before.items():
        np.testing.assert_array_equal(tensor.read(), found[key].read())
    (folder / "text_encoder" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a whole model: tokenizer is missing"):
        fluxjax.load_pipeline(folder)


def write_empty(path, shapes, prefix=""):
    """The header of a published file, and a hole for its values."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[prefix + name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_empty_gguf(path, shapes):
    """As ComfyUI-GGUF's tools leave HunyuanVideo's, whose first convolution has five axes."""
    infos, end = b"", 0
    for name, shape in shapes.items():
        infos += info(name, shape, 30, end)
        end += 2 * math.prod(shape) + -2 * math.prod(shape) % 32
    start = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 0) + infos
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(len(start) + -len(start) % 32 + end)


def shapes_of(part):
    return {n: leaf.shape for n, leaf in engine.published_leaves(abstract_params(part)).items()}


@functools.cache
def comfys_llava(dialect="comfy"):
    """The published one, and the names and shapes of ComfyUI's two files of it."""
    text = replace(LLAMA3_8B, stops_after=None)
    whole = replace(LLAVA_LLAMA3, text_config=text, heard_stride=1)
    table = network_of(whole).dialect(dialect).table(whole)
    at_size = {n: as_tensor(np.broadcast_to(np.float32(), s)) for n, s in shapes_of(whole).items()}
    return whole, {n: one.shape for n, one in engine.from_published(at_size, table).items()}


@slow
def test_comfys_llava_in_two_files(tmp_path):
    """As they are at real size, and small ones beside a config.json: each value in its place."""
    whole, named = comfys_llava()
    text, vision = whole.text_config, whole.vision_config
    seen = {f"vision_model.{name.removeprefix('vision_model.')}" for name in shapes_of(vision)}
    heard = {f"model.{name}" for name in shapes_of(text)}
    projector = {
        f"multi_modal_projector.linear_{i}.{n}" for i in (1, 2) for n in ("weight", "bias")
    }
    assert named.keys() == (seen | heard | projector) - {"vision_model.visual_projection.weight"}
    assert network_of(whole).dialect("comfy").infer(named, "") == whole
    folder = tmp_path / "model"
    save_llava = llava(word_tokenizer()).save_pretrained
    save_llava(folder / "text_encoder")
    small = open_component(folder, "text_encoder")
    parts = tmp_path / "text_encoder"
    write_named(parts / "all.safetensors", small, "comfy")
    tensors = load_file(parts / "all.safetensors")
    (parts / "all.safetensors").unlink()
    is_text = {name: name.startswith("model.") for name in tensors}
    for file, text in (("llava_llama3_fp16", True), ("llava_llama3_vision", False)):
        own = {name: as_tensor(one) for name, one in tensors.items() if is_text[name] is text}
        write_safetensors(parts / f"{file}.safetensors", own, {})
    with pytest.raises(ConfigError, match="cannot be told from shapes"):
        open_component(tmp_path, "text_encoder")
    shutil.copy(folder / "text_encoder/config.json", parts)
    found = open_component(tmp_path, "text_encoder")
    assert found.config == small.config
    same_values(found, small)
    (parts / "llava_llama3_vision.safetensors").rename(parts / "other.txt")
    with pytest.raises(ConfigError, match=r"language model, but the configuration .* LLaVA"):
        open_component(tmp_path, "text_encoder")
    (parts / "other.txt").rename(parts / "llava_llama3_vision.safetensors")
    (parts / "a.gguf").write_bytes(b"GGUF and no more")
    same_values(open_component(tmp_path, "text_encoder"), small)  # it is no part of these
    (parts / "a.gguf").unlink()
    (parts / "llava_llama3_fp16.safetensors").unlink()
    write_gguf_text(parts / "llava-llama-3-8B-v1_1-Q4_K_M.gguf", small)
    quantised = open_component(tmp_path, "text_encoder")
    assert quantised.config == small.config
    same_values(quantised, small)


GGUF_TEXT = ("blk.", "token_embd.", "output_norm.")


def same_values(found, expected):
    assert found.tensors.keys() == expected.tensors.keys()
    for name, one in expected.tensors.items():
        assert np.array_equal(found.tensors[name].read(), one.read()), name


def write_gguf_text(path, llava):
    """The language model as it is written by itself, with llama.cpp's order of q's and k's rows."""
    text, inner = llava.config.text_config, "language_model.model."
    own = {n.removeprefix(inner): one for n, one in llava.tensors.items() if n.startswith(inner)}
    named = engine.from_published(own, network_of(text).dialect("gguf").table(text))
    held = {name: one.read() for name, one in named.items()}
    path.write_bytes(gguf_bytes({n: (0, one.shape, one.tobytes()) for n, one in held.items()}))


def beside_each_other(tmp_path, folder, llama, clip):
    """Text encoders as they lie in ComfyUI's folder; the part that sees says what is drawn."""
    flat = tmp_path / "flat"
    write_empty(flat / "llava_llama3_fp8_scaled.safetensors", llama)
    write_empty(flat / "clip_l.safetensors", clip)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folder / name, flat / name)
    files = tmp_path / "comfy.safetensors", tmp_path / "vae_comfy.safetensors"

    def opened(**told):
        return fluxjax.load_pipeline(files[0], vae=files[1], text_encoders=flat, **told).config

    assert opened() == HUNYUAN_VIDEO_720
    with pytest.raises(ConfigError, match="language model that sees pictures, LLaVA, it"):
        opened(family="hunyuan-video-i2v")
    whole, named = comfys_llava()
    seeing = {name: shape for name, shape in named.items() if not name.startswith("model.")}
    write_empty(flat / "llava_llama3_vision.safetensors", seeing)
    seen = opened().networks
    assert opened(family="hunyuan-video") == HUNYUAN_VIDEO_720
    assert seen["transformer"].image_condition_type == "token_replace"
    assert seen["text_encoder"].vision_config == whole.vision_config
    (flat / "llava_llama3_fp8_scaled.safetensors").rename(tmp_path / "llama")
    text = {name: s for name, s in comfys_llava("gguf")[1].items() if name.startswith(GGUF_TEXT)}
    write_empty_gguf(flat / "llava-llama-3-8B-v1_1-Q4_K_M.gguf", text)
    assert opened().networks == seen
    (flat / "llava-llama-3-8B-v1_1-Q4_K_M.gguf").unlink()
    (tmp_path / "llama").rename(flat / "llava_llama3_fp8_scaled.safetensors")
    write_empty(flat / "llava_llama3_fp8_e5m2.safetensors", llama)
    with pytest.raises(ValueError, match="several text_encoder files, keep one of: llava_llama3_f"):
        opened()


@slow
def test_published_files_as_they_are(shared, hunyuan_video, tmp_path):  # noqa: F811
    """At real size with no config.json: text encoders tell what a transformer draws from."""
    recorded = json.loads((shared / "checkpoints/hunyuan_video.json").read_text())
    original = recorded["original_tensors"]
    comfy = {comfy_transformer(name): shape for name, shape in original.items()}
    write_empty(tmp_path / "tencent.safetensors", original)
    write_empty(tmp_path / "comfy.safetensors", comfy, "model.model.")
    vae, whole = HUNYUAN_VIDEO_720.vae, replace(LLAMA3_8B, stops_after=None)
    write_empty(tmp_path / "vae.safetensors", shapes_of(vae))
    named = {comfy_autoencoder(name): shape for name, shape in shapes_of(vae).items()}
    write_empty(tmp_path / "vae_comfy.safetensors", named)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(hunyuan_video / name, tmp_path / name)
    llama = {f"model.{name}": shape for name, shape in shapes_of(whole).items()}
    write_empty(tmp_path / "text_encoder/llava_llama3_fp16.safetensors", llama)
    clip = json.loads((shared / "checkpoints/clip_l.json").read_text())["tensors"]
    write_empty(tmp_path / "text_encoder_2/clip_l.safetensors", clip)

    def opened(transformer, autoencoder="vae"):
        files = (tmp_path / f"{name}.safetensors" for name in (transformer, autoencoder))
        return fluxjax.load_pipeline(next(files), vae=next(files), text_encoders=tmp_path)

    assert opened("tencent").config == opened("comfy", "vae_comfy").config == HUNYUAN_VIDEO_720
    write_empty_gguf(tmp_path / "quantised.gguf", original)
    quantised = fluxjax.load_pipeline(
        tmp_path / "quantised.gguf", vae=tmp_path / "vae.safetensors", text_encoders=tmp_path
    )
    assert quantised.config == HUNYUAN_VIDEO_720
    concat = recorded["i2v_latent_concat"]
    shapes = recorded["tensors"] | concat["other_shapes"]
    shapes = {name: shape for name, shape in shapes.items() if name not in concat["absent"]}
    write_empty(tmp_path / "concat.safetensors", shapes)
    with pytest.raises(ConfigError, match="image_condition_type is latent_concat, and that of a"):
        opened("concat")
    write_json(tmp_path / "text_encoder/config.json", config_json(LLAVA_LLAMA3))
    with pytest.raises(ConfigError, match=r"language model, but the configuration .* LLaVA"):
        opened("tencent")
    with pytest.raises(ConfigError, match="give the text encoders that it is drawn with, or say"):
        fluxjax.load_pipeline(tmp_path / "tencent.safetensors", vae=tmp_path / "vae.safetensors")
    beside_each_other(tmp_path, hunyuan_video, llama, clip)
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(ValueError, match=r"is a pickle.*python -c .*module.*save_file"):
        fluxjax.load_pipeline(tmp_path / "mp_rank_00_model_states.pt")
