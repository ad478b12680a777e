"""Files without tokenizers are read with the published ones, which the hub has."""

import json
import shutil
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from hunyuan_video_folders import word_tokenizer
from loopback_hub import run_python, serve
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stable_diffusion_folders import random_clip, random_t5, random_vae, save_sd3, save_xl
from test_whole_files import SMALL, whole_arrays

from fluxjax.convert.convert import plan, run
from fluxjax.hub import tiny_folder
from fluxjax.text.tokenizers import load_clip_tokenizer

CLIP, T5 = "clip-vit-large-patch14", "t5-v1_1-xxl"
PROMPT = "a red circle above a star!"  # "!" is what OpenCLIP's networks are padded with


@pytest.fixture(scope="module")
def hub(shared):
    """As the two repositories are, with other files beside."""
    served = {
        f"{owner}/{name}": {path.name: path for path in (shared / "tokenizers" / name).iterdir()}
        for owner, name in (("openai", CLIP), ("google", T5))
    }
    weights = tiny_folder() / "vae" / "diffusion_pytorch_model.safetensors"
    for files in served.values():
        files |= {"model.safetensors": weights, "config.json": tiny_folder() / "world.json"}
    with serve(served) as running:
        yield running


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>"])
def test_another_padding_is_as_transformers_has_it(shared, pad):
    folder = shared / "tokenizers" / CLIP
    theirs = transformers.CLIPTokenizer.from_pretrained(folder, pad_token=pad)
    prompts = [PROMPT, "", "!", "wow!! ! a!b", "<|endoftext|> !"]
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=77)
    got = load_clip_tokenizer(folder, pad=pad)(prompts).input_ids
    np.testing.assert_array_equal(got, expected["input_ids"])


SIZE = ("--width", "32", "--height", "32", "--steps", "2", "--seed", "3", "--guidance", "4")
IN_ONE_PROCESS = (
    "import json, sys\n"
    "from fluxjax import cli\n"
    "from fluxjax.sample.__main__ import main\n"
    "cli.run(lambda: max(main(line) for line in json.loads(sys.argv[1])))"
)


def drawn(hub, folder, lines, **changes):
    """Pictures by their names; of each the model's arguments, or all of them without a prompt."""
    commands = []
    for name, line in lines.items():
        first = [] if line[0] == "--like" else [PROMPT, *SIZE, "--model"]
        commands.append([*first, *map(str, line), "-o", f"{name}.png"])
    code, _, said = run_python(hub, folder, "-c", IN_ONE_PROCESS, json.dumps(commands), **changes)
    assert code == 0, said
    pictures = [np.asarray(Image.open(folder / f"{name}.png")) for name in lines]
    return pictures if len(pictures) > 1 else pictures[0]


@pytest.mark.slow
def test_one_file_is_all_that_is_needed(hub, shared, tmp_path):
    """XL, whose two text encoders are padded with other tokens."""
    folder, file = save_xl(tmp_path / "xl", shared / "tokenizers"), tmp_path / "whole.safetensors"
    run(plan(folder, file, "bfl"))
    code, _, said = run_python(
        hub, tmp_path, "-m", "fluxjax.sample", PROMPT, "--model", str(file), HF_HUB_OFFLINE="1"
    )
    assert code == 2 and "Traceback" not in said
    assert "has no tokenizer, and the published one is not to be had" in said, said
    expected, picture = drawn(hub, tmp_path, {"folder": (folder,), "file": (file,)})
    assert set(hub.downloads) == {path.name for path in (shared / "tokenizers" / CLIP).iterdir()}
    assert expected.std() > 20 and np.array_equal(picture, expected)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
    picture = drawn(hub, tmp_path, {"without": (folder,)}, HF_HUB_OFFLINE="1")
    assert np.array_equal(picture, expected)


@pytest.mark.slow
def test_text_encoders_as_comfyui_keeps_them(hub, shared, tmp_path):
    """A file of SD3 that holds none, and a folder of clip_l, clip_g and t5xxl."""
    folder = save_sd3(tmp_path / "sd3", shared / "tokenizers", widths=(64, 64, 128))
    file, texts = tmp_path / "sd3.safetensors", tmp_path / "text_encoders"
    run(plan(folder, file, "bfl"))
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    configs = json.loads(metadata["fluxjax_networks"])
    kept = {name: configs[name] for name in configs if not name.startswith("text_encoder")}
    whole = load_file(file)
    own = {name: tensor for name, tensor in whole.items() if not name.startswith("text_encoders.")}
    save_file(own, file, {"fluxjax_networks": json.dumps(kept)})
    texts.mkdir()
    for name in ("clip_l", "clip_g", "t5xxl"):
        prefix = f"text_encoders.{name}.transformer."
        part = {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}
        save_file(part, texts / f"{name}{'_fp16' if name == 't5xxl' else ''}.safetensors")
    # Of several the one in 16 bits is read.
    (texts / "t5xxl_fp8_e4m3fn.safetensors").write_bytes(b"another")
    files = (file, "--text-encoders", texts)
    expected, picture = drawn(hub, tmp_path, {"folder": (folder,), "files": files})
    assert expected.std() > 20 and np.array_equal(picture, expected)
    (texts / "t5xxl_fp16.safetensors").rename(texts / "t5xxl_fp8_scaled.safetensors")
    arguments = ("--model", str(file), "--text-encoders", str(texts))
    code, _, said = run_python(hub, tmp_path, "-m", "fluxjax.sample", PROMPT, *arguments)
    assert code == 2 and "several text_encoder_3 files, keep one of: t5xxl_fp8_e4" in said, said


@pytest.mark.slow
def test_flux_with_its_text_encoders_in_one_file(hub, shared, tmp_path):
    """As ComfyUI saves checkpoints."""
    torch.manual_seed(0)
    tokenizers, folder = shared / "tokenizers", tmp_path / "flux"
    t5: Any = transformers.T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
    )
    latents = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
    widths = {"block_out_channels": (32, 32, 64), "norm_num_groups": 32}
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=random_vae(0.3611, shift_factor=0.1159, **latents, **widths),
        text_encoder=random_clip(hidden_size=64, num_attention_heads=1),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizers / CLIP),
        text_encoder_2=random_t5(128),
        tokenizer_2=t5.from_pretrained(tokenizers / T5),
        transformer=transformer,
    ).save_pretrained(folder)
    run(plan(folder, tmp_path / "bfl", "bfl"))
    prefixes = {
        "flux1-dev": "model.diffusion_model.",
        "ae": "vae.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
    }
    whole = {"text_encoders.clip_l.logit_scale": np.ones((), np.float32)}
    for name, prefix in prefixes.items():
        part = load_file(tmp_path / "bfl" / f"{name}.safetensors")
        whole |= {f"{prefix}{key}": tensor for key, tensor in part.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    bfl = tmp_path / "bfl"
    inside = "split_files/text_encoders"
    names = ("clip_l.safetensors", "t5xxl.safetensors")
    texts = {f"{inside}/{name}": bfl / name for name in names}
    hub.files["someone/texts"] = {**texts, "README.md": bfl / "model_index.json"}
    parts = ("--vae", bfl / "ae.safetensors", "--text-encoders", "someone/texts")
    lines = {
        "folder": (folder,),
        "file": (tmp_path / "whole.safetensors",),
        "files": (bfl / "flux1-dev.safetensors", *parts),
    }
    expected, picture, apart = drawn(hub, tmp_path, lines)
    assert {*texts, "spiece.model"} < set(hub.downloads) and "README.md" not in hub.downloads
    assert expected.std() > 20
    assert np.array_equal(picture, expected) and np.array_equal(apart, expected)


@pytest.mark.slow
def test_a_language_model_has_that_of_its_llava(hub, tmp_path):
    """HunyuanVideo's, for which a whole run takes a model of real size."""
    word_tokenizer().save_pretrained(tmp_path / "llava")
    repo = "xtuner/llava-llama-3-8b-v1_1-transformers"
    hub.files[repo] = {path.name: path for path in (tmp_path / "llava").iterdir()}
    script = (
        "from fluxjax.checkpoint.tokenizer_places import open_tokenizers, tokenizer_places\n"
        "from fluxjax.config import HUNYUAN_VIDEO_720 as config\n"
        "places = tokenizer_places('file', None, config)\n"
        "print([one(['a {red} light'], 6).input_ids.tolist()\n"
        "       for one in open_tokenizers(places, config)])"
    )
    code, found, said = run_python(hub, tmp_path, "-c", script)
    assert code == 0, said
    language, clip = json.loads(found)
    theirs = word_tokenizer()(
        ["a {red} light"], padding="max_length", truncation=True, max_length=6
    )
    assert language == theirs["input_ids"] and clip[0][0] == 49406


@pytest.mark.slow
def test_of_stable_diffusion_2_the_size_is_said(hub, tmp_path):
    """Files of both sizes look alike; the picture remembers what was said."""
    configs = SMALL["2"]
    text = replace(configs["text_encoder"], vocab_size=49408)
    file, folder = tmp_path / "sd2.safetensors", tmp_path / "folder"
    save_file(whole_arrays({**configs, "text_encoder": text}), file)
    run(plan(file, folder, family="sd2-v"))
    arguments = ("-m", "fluxjax.sample", PROMPT, "--model", str(file))
    code, _, said = run_python(hub, tmp_path, *arguments)
    assert code == 2 and "say --family sd2-v for models of 768 pixels (v)" in said, said
    lines = {
        "file": (file, "--family", "sd2-v"),
        "again": ("--like", "file.png"),
        "other": ("--like", "file.png", "--model", folder, "--like-anyway"),
    }
    picture, again, other = drawn(hub, tmp_path, lines)
    assert picture.std() > 0
    assert np.array_equal(picture, again) and np.array_equal(picture, other)
    code, _, said = run_python(hub, tmp_path, *arguments[:-1], str(folder), "--family", "sd2")
    assert code == 2 and "family says whose a single file is, and" in said, said


@pytest.mark.slow
def test_a_unet_alone_takes_the_rest_of_folders(hub, tmp_path):
    """As distilled UNets are published, whose other networks are the base model's."""
    configs = {
        part: replace(config, vocab_size=49408) if part.startswith("text_encoder") else config
        for part, config in SMALL["xl"].items()
    }
    save_file(whole_arrays(configs), tmp_path / "whole.safetensors")
    run(plan(tmp_path / "whole.safetensors", tmp_path / "folder"))
    folder = tmp_path / "folder"
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    rest = ("--vae", folder, "--text-encoders", folder)
    original = tmp_path / "original.safetensors"
    run(plan(file.parent, original, "bfl"))
    lines = {"folder": (folder,), "file": (file, *rest), "original": (original, *rest)}
    expected, picture, other = drawn(hub, tmp_path, lines)
    assert expected.std() > 0
    assert np.array_equal(picture, expected) and np.array_equal(other, expected)
