"""LoRAs of Stable Diffusion and XL drawn, merged and written: the pictures of diffusers."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stable_diffusion_folders import save_stable_diffusion, save_xl

import fluxjax
from fluxjax.convert.__main__ import main as convert

PROMPT = "a red circle"
SIZE: dict[str, Any] = {"width": 32, "height": 32}
OURS: dict[str, Any] = {"steps": 2, "seed": 3, "guidance": 4.0, **SIZE}
FOLDERS = {
    "sd": (save_stable_diffusion, diffusers.StableDiffusionPipeline, ("lora_te_text_model_",)),
    "xl": (
        save_xl,
        diffusers.StableDiffusionXLPipeline,
        ("lora_te1_text_model_", "lora_te2_"),
    ),
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def kohya(prefix, network, chosen):
    """Tensors of a LoRA of rank 2, of the modules whose names have one of `chosen`."""
    found = {}
    for name, weight in network.state_dict().items():
        module = name.removesuffix(".weight")
        if module != name and weight.ndim in (2, 4) and any(part in name for part in chosen):
            key = f"{prefix}{module.replace('.', '_')}"
            found[f"{key}.lora_down.weight"] = torch.randn(2, *weight.shape[1:]) * 0.3
            up = torch.randn(len(weight), 2, *(1 for _ in weight.shape[2:])) * 0.3
            found |= {f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.5)}
    return found


def pipeline(kind, folder):
    found = kind.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    return found


def drawn(theirs) -> np.ndarray:
    choices = {"num_inference_steps": 2, "guidance_scale": 4.0, **SIZE}
    generator = torch.Generator().manual_seed(3)
    return np.asarray(theirs(PROMPT, generator=generator, **choices).images[0], int)


@pytest.fixture(scope="module", params=FOLDERS)
def model(request, shared, tmp_path_factory):
    """(folder, pipeline of diffusers, {file: tensors of a LoRA}): one of linear layers and text
    encoders, one of convolutions too."""
    save, kind, encoders = FOLDERS[request.param]
    place = tmp_path_factory.mktemp(request.param)
    folder = save(place / "base", shared / "tokenizers")
    theirs = pipeline(kind, folder)
    torch.manual_seed(5)
    linear = kohya("lora_unet_", theirs.unet, ("attn1.to_q", "attn2.to_k", "ff.net.2"))
    for prefix, name in zip(encoders, ("text_encoder", "text_encoder_2"), strict=False):
        linear |= kohya(prefix, getattr(theirs, name), ("q_proj", "fc1"))
    files = place / "linear.safetensors", place / "all.safetensors"
    save_file(linear, files[0])
    save_file(linear | kohya("lora_unet_", theirs.unet, ("conv1", "proj_in")), files[1])
    return folder, theirs, files


def drawn_with(theirs, folder: Path, file: Path) -> np.ndarray:
    """At a strength of 0.7, in PEFT's names, which the command writes: of kohya's, diffusers drops
    attention in text encoders. Leaves the pipeline as it was."""
    peft = file.with_name(f"peft_{file.name}")
    assert (
        convert([str(file), str(peft), "--to", "peft", "--config", str(folder), "--overwrite"]) == 0
    )
    names = [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(theirs, name)]
    theirs.load_lora_weights(file.parent, weight_name=peft.name)
    theirs.fuse_lora(components=names, lora_scale=0.7)
    picture = drawn(theirs)
    theirs.unfuse_lora(components=names)
    theirs.unload_lora_weights()
    return picture


def test_beside_the_weights_and_in_them(model, tmp_path):
    folder, theirs, (_, file) = model
    plain, expected = drawn(theirs), drawn_with(theirs, folder, file)
    assert np.abs(expected - plain).mean() > 10
    (picture,) = fluxjax.load_pipeline(folder, loras=[f"{file}:0.7"])(PROMPT, **OURS)
    assert np.abs(np.asarray(picture, int) - expected).max() <= 1
    assert convert([str(folder), str(tmp_path / "merged"), "--lora", f"{file}:0.7"]) == 0
    merged = pipeline(type(theirs), tmp_path / "merged")
    assert np.abs(drawn(merged) - expected).max() <= 1


@pytest.mark.parametrize("model", ["sd"], indirect=True)
def test_chosen_by_call(model):
    folder, theirs, (linear, convolutions) = model
    slots = fluxjax.load_pipeline(folder, lora_slots=2)
    for file in (linear, convolutions):
        (picture,) = slots(PROMPT, lora=[f"{file}:0.7"], **OURS)
        assert np.abs(np.asarray(picture, int) - drawn_with(theirs, folder, file)).max() <= 1
