"""Adapters of HunyuanVideo's transformer in the names of diffusers, musubi and ComfyUI."""

import copy
import inspect
from pathlib import Path
from typing import Any, get_args

import numpy as np
import peft
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.loaders import lora_conversion_utils
from open_sora_folders import SMALL
from random_checkpoints import random_tree
from safetensors.numpy import save_file
from test_hunyuan_video import TINY, torch_model

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.merge import merge
from fluxjax.checkpoint.lora.reader import read_adapters
from fluxjax.checkpoint.lora.writer import write_adapters
from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.source_record import Record
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config.choices import LoraNaming
from fluxjax.networks.hunyuan_video import TENCENT

RANK, ALPHA = 3, 6.0
MODULES = (
    "double_blocks.0.img_attn_qkv",
    "double_blocks.0.txt_attn_proj",
    "double_blocks.0.img_mlp.fc1",
    "double_blocks.0.txt_mod.linear",
    "single_blocks.1.linear1",
    "single_blocks.0.linear2",
    "single_blocks.0.modulation.linear",
)
COMFY = {"_mlp.fc1": "_mlp.0", "_mod.linear": "_mod.lin", "modulation.linear": "modulation.lin"}
COMFY |= {"_attn_": "_attn."}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return {n: t.read() for n, t in engine.from_tree(random_tree(TINY, np.float32)).items()}


def merged(path: Path, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a file makes of the weights that it changes."""
    changes = read_adapters(path, {"transformer": abstract_params(TINY)}).changes["transformer"]
    tensors = {name: of_array(array) for name, array in weights.items()}
    opened = OpenNetwork("transformer", TINY, tensors, Record(), "published", Path())
    after = merge(opened, [(changes, 1.0)])
    return {name: after.tensors[name].read() for name in changes}


def in_diffusers(low_rank: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """By diffusers' own function, in which the published width is written."""
    name = "_convert_hunyuan_video_lora_to_diffusers"
    source = inspect.getsource(getattr(lora_conversion_utils, name))
    scope = vars(lora_conversion_utils).copy()
    exec(source.replace("3072", str(TINY.inner_dim)), scope)
    found = scope[name]({key: torch.from_numpy(array) for key, array in low_rank.items()})
    return {key.removeprefix("transformer."): tensor for key, tensor in found.items()}


def test_names_of_the_original_code_are_read_as_diffusers_reads_them(weights, tmp_path):
    tensors = {name: of_array(array) for name, array in weights.items()}
    original = engine.from_published(tensors, TENCENT)
    random, pairs = np.random.default_rng(0), {}
    for module in MODULES:
        out, inputs = original[f"{module}.weight"].shape
        shapes = (RANK, inputs), (out, RANK)
        pairs[module] = [random.standard_normal(s).astype(np.float32) for s in shapes]
    plain = {
        f"{module}.lora_{letter}.weight": array
        for module, pair in pairs.items()
        for letter, array in zip("AB", pair, strict=True)
    }
    theirs = in_diffusers(plain)
    deltas = {
        key.removesuffix(".lora_A.weight"): theirs[key.replace("lora_A", "lora_B")] @ a
        for key, a in theirs.items()
        if "lora_A" in key
    }
    assert len(deltas) == len(MODULES) + 2 + 3, "q, k and v, and the MLP beside them"

    def comfy(name: str) -> str:
        for old, new in COMFY.items():
            name = name.replace(old, new)
        return name

    files: dict[str, tuple[dict[str, np.ndarray], float]] = {
        "diffusion-pipe": ({f"transformer.{key}": x for key, x in plain.items()}, 1.0),
        "original": ({f"diffusion_model.{key}": x for key, x in plain.items()}, 1.0),
        "ComfyUI": ({f"diffusion_model.{comfy(key)}": x for key, x in plain.items()}, 1.0),
    }
    musubi: dict[str, np.ndarray] = {}
    for module, (a, b) in pairs.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        musubi |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        musubi[f"{name}.alpha"] = np.asarray(ALPHA, np.float32)
    files["musubi"] = musubi, ALPHA / RANK
    for name, (arrays, scale) in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(arrays, path)
        found = merged(path, weights)
        assert found.keys() == {f"{module}.weight" for module in deltas}, name
        for module, delta in deltas.items():
            expected = weights[f"{module}.weight"] + scale * delta.numpy()
            np.testing.assert_allclose(found[f"{module}.weight"], expected, atol=1e-5)


def test_what_diffusers_saves_and_what_we_write(tmp_path):
    model = copy.deepcopy(torch_model(TINY))
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["attn.to_q", "attn.add_k_proj", "ff.net.2", "proj_mlp"],
        init_lora_weights=False,
    )
    model.add_adapter(config)
    layers: Any = peft.get_peft_model_state_dict(model)
    HunyuanVideoPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    pairs = {
        key.removesuffix(".lora_A.weight"): (a, layers[key.replace("lora_A", "lora_B")])
        for key, a in layers.items()
        if "lora_A" in key
    }
    expected = {
        f"{module}.weight": before[f"{module}.weight"] + ALPHA / RANK * (b @ a).detach().numpy()
        for module, (a, b) in pairs.items()
    }
    adapters = {n: Adapter(a.numpy(), b.numpy(), ALPHA / RANK) for n, (a, b) in pairs.items()}
    files = [tmp_path / "pytorch_lora_weights.safetensors"]
    for naming in get_args(LoraNaming):
        files.append(tmp_path / f"{naming}.safetensors")
        model_of: Any = {"transformer": TINY}
        write_adapters(files[-1], {"transformer": adapters}, {}, naming=naming, model=model_of)
    for path in files:
        found = merged(path, before)
        assert found.keys() >= expected.keys(), path
        for name, after in found.items():
            np.testing.assert_allclose(after, expected.get(name, before[name]), atol=1e-5)


@pytest.mark.parametrize("naming", get_args(LoraNaming))
def test_open_soras_are_read_as_they_were_written(naming, tmp_path):
    """In the names of our modules, whose queries' and keys' rows are FLUX's."""
    rng, config = np.random.default_rng(0), SMALL.transformer
    template = abstract_params(config)
    shapes = {name: tensor.shape for name, tensor in engine.from_tree(template).items()}
    modules = ("cond_in", "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp")
    adapters = {}
    for module in modules:
        out, inputs = shapes[f"{module}.weight"]
        a, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, inputs), (out, 2)))
        adapters[module] = Adapter(a, b, 1.5)
    path, model = tmp_path / "lora.safetensors", {"transformer": config}
    write_adapters(path, {"transformer": adapters}, {}, naming=naming, model=model)
    found = read_adapters(path, {"transformer": template}).changes["transformer"]
    assert found.keys() == {f"{module}.weight" for module in modules}
    for module, adapter in adapters.items():
        read = found[f"{module}.weight"].low_rank
        assert read is not None
        expected = 1.5 * adapter.b @ adapter.a
        np.testing.assert_allclose(read.scale * read.b @ read.a, expected, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_the_kernel_of_patches_is_changed_as_by_diffusers_loader(dora, weights, tmp_path):
    """It is a convolution's, over frames too."""
    model = copy.deepcopy(torch_model(TINY))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    parts: dict[str, Any] = dict.fromkeys(inspect.signature(HunyuanVideoPipeline).parameters)
    theirs = HunyuanVideoPipeline(**{**parts, "transformer": model})
    targets = ["x_embedder.proj", "context_embedder.proj_in"]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=dora, init_lora_weights=False
    )
    adapted = copy.deepcopy(model)
    adapted.add_adapter(config)
    HunyuanVideoPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(adapted),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    theirs.load_lora_weights(tmp_path)
    theirs.fuse_lora(components=["transformer"])
    theirs.unload_lora_weights()
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = merged(tmp_path / "pytorch_lora_weights.safetensors", weights)
    assert found.keys() == {f"{target}.weight" for target in targets}
    for name, after in found.items():
        assert np.abs(after - weights[name]).max() > 1e-3, name
        np.testing.assert_allclose(after, expected[name], atol=1e-5, err_msg=name)
