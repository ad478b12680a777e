"""FLUX.1's tools joined with each other and with LoRAs: diffusers' pictures, seed for seed."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxFillPipeline, FluxPipeline
from safetensors.torch import save_file
from test_sample import same_picture
from test_sample_pictures import folder, hole, photo  # noqa: F401
from torch_pipeline import random_pipeline  # noqa: F401

import fluxjax

SMALL: dict[str, Any] = {"width": 96, "height": 64, "max_sequence_length": 24}


def peft_file(path, layers, *, bias: bool = False):
    """A LoRA of rank 3 of `layers`, inputs and outputs by name."""
    tensors = {}
    for name, (inputs, outputs) in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = 0.3 * torch.randn(3, inputs)
        tensors[f"transformer.{name}.lora_B.weight"] = 0.15 * torch.randn(outputs, 3)
        if bias:
            tensors[f"transformer.{name}.lora_B.bias"] = 0.1 * torch.randn(outputs)
    save_file(tensors, path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_text_models_lora_beside_a_control_lora(random_pipeline, tmp_path):  # noqa: F811
    """Of the first layer too, to which the control LoRA has given more inputs."""
    parts = FluxPipeline.from_pretrained(random_pipeline).components
    theirs = FluxControlPipeline(
        **{k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
    )
    theirs.set_progress_bar_config(disable=True)
    linear = {
        name: (module.in_features, module.out_features)
        for name, module in theirs.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    torch.manual_seed(0)
    control = peft_file(tmp_path / "c.safetensors", linear | {"x_embedder": (128, 32)}, bias=True)
    chosen = ("x_embedder", "transformer_blocks.0.attn.to_q")
    style = peft_file(tmp_path / "s.safetensors", {name: linear[name] for name in chosen})
    for file, name in ((control, "control"), (style, "style")):
        theirs.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)

    def drawn(scale: float):
        theirs.set_adapters(["control", "style"], [0.85, scale])
        return theirs(
            "a red circle",
            control_image=photo(1),
            num_inference_steps=4,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(7),
            **SMALL,
        ).images[0]

    ours = fluxjax.load_pipeline(random_pipeline, loras=[(control, 0.85), (style, 1.3)])
    (got,) = ours("a red circle", control=photo(1), steps=4, guidance=3.5, seed=7, **SMALL)
    expected = drawn(1.3)
    same_picture(got, expected)
    assert np.abs(np.asarray(drawn(0.0), int) - np.asarray(expected, int)).mean() > 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_a_text_models_lora_of_the_first_and_last_layer_over_fill(folder, tmp_path):  # noqa: F811
    """Fill's first layer has more inputs, to which diffusers gives the LoRA zeros."""
    parts = FluxPipeline.from_pretrained(folder("fill")).components
    theirs = FluxFillPipeline(
        **{k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
    )
    theirs.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    style = peft_file(tmp_path / "s.safetensors", {"x_embedder": (64, 32), "proj_out": (32, 64)})
    theirs.load_lora_weights(tmp_path, weight_name=style.name, adapter_name="style")

    def drawn(scale: float):
        theirs.set_adapters(["style"], [scale])
        return theirs(
            "a red circle",
            image=photo(),
            mask_image=hole(),
            num_inference_steps=3,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(7),
            **SMALL,
        ).images[0]

    ours = fluxjax.load_pipeline(folder("fill"), loras=[(style, 1.2)])
    given = {"image": photo(), "mask": hole()}
    (got,) = ours("a red circle", **given, steps=3, guidance=3.5, seed=7, **SMALL)
    expected = drawn(1.2)
    same_picture(got, expected)
    assert np.abs(np.asarray(drawn(0.0), int) - np.asarray(expected, int)).mean() > 2
