"""The causal autoencoder of clips: published names, diffusers layer by layer, both directions."""

import json
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from comfy_names import comfy_autoencoder
from parameter_trees import parameter_count
from safetensors.numpy import load_file, save_file

from fluxjax.checkpoint.component_json import config_json, network_config
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.engine import published_leaves
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import CausalAutoencoderConfig, ConfigError
from fluxjax.convert.__main__ import main
from fluxjax.diff.live import compare_network
from fluxjax.networks.foreign import foreign_words

TINY = CausalAutoencoderConfig(
    block_out_channels=(8, 12, 16, 24), layers_per_block=1, norm_num_groups=4
)


def published(shared, name):
    recorded = json.loads((shared / f"checkpoints/{name}.json").read_text())
    return recorded, {name: tuple(shape) for name, shape in recorded["tensors"].items()}


@pytest.mark.parametrize("name", ["hunyuan_vae", "opensora_vae"])
def test_every_published_name_and_shape(shared, name, tmp_path):
    recorded, shapes = published(shared, name)
    network, dialect = detect_network(shapes)
    config = infer_config(network, dialect, shapes)
    assert config == CausalAutoencoderConfig() and dialect.name == "published"
    comfy = {comfy_autoencoder(name): shape for name, shape in shapes.items()}
    network, dialect = detect_network(comfy)
    assert dialect.name == "comfy" and infer_config(network, dialect, comfy) == config
    template = abstract_params(config)
    assert {n: leaf.shape for n, leaf in published_leaves(template).items()} == shapes
    assert parameter_count(template) == recorded["parameters"] == 246_478_803
    kind = {"hunyuan_vae": "AutoencoderKLHunyuanVideo", "opensora_vae": "AutoencoderKLCausal3D"}
    values = {"_class_name": kind[name]} | recorded["config"]
    assert network_config(values, tmp_path) == config


def test_what_shapes_do_not_tell_is_asked_for(shared):
    _, shapes = published(shared, "hunyuan_vae")
    network, dialect = detect_network(shapes)
    odd = {name: shape for name, shape in shapes.items() if "down_blocks.1.downs" not in name}
    with pytest.raises(ConfigError, match=r"halves frames .* config.json with --config"):
        infer_config(network, dialect, odd)
    narrow = {n: s for n, s in shapes.items() if "down" not in n} | {
        n: (24, *s[1:]) for n, s in shapes.items() if "down" in n
    }
    with pytest.raises(ConfigError, match=r"widths 24, 24.* 32 groups .*config.json"):
        infer_config(network, dialect, narrow)
    later = {"encoder.conv_in.conv.weight", "encoder.down_blocks.0.resnets.0.norm1.gamma"}
    assert foreign_words(dict.fromkeys(later, (1,))) == "HunyuanVideo 1.5's autoencoder"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"spatial_compression_ratio": 16}, "must be one of 1, 2, 4, 8"),
        ({"norm_num_groups": 5}, "divide by norm_num_groups=5"),
        ({"scaling_factor": 0.0}, "must be positive"),
    ],
)
def test_impossible_configurations(values, said):
    with pytest.raises(ConfigError, match=said):
        replace(TINY, **values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """diffusers' network with random weights, no norm left without scale and bias."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {k: v for k, v in config_json(TINY).items() if k[0] != "_"}
    network = diffusers.AutoencoderKLHunyuanVideo(**sizes)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if "norm" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif tensor.ndim > 1:
                # What goes through keeps its size, and branches are weaker: as drawn, either's
                # bfloat16 loses 3 %.
                tensor.mul_(0.2 if "conv2" in name else 1.7)
    path = tmp_path_factory.mktemp("causal") / "vae"
    network.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layer_equals_diffusers(folder, dtype):
    report = compare_network(folder, "vae", dtype=dtype)
    assert report.passed, report.first_failure
    names = {row.tensor for row in report.rows}
    assert {"encoder.down_blocks.1.downsamplers.0.conv.conv", "quant_conv"} <= names
    assert {"decoder.mid_block.attentions.0.to_k", "decoder.up_blocks.2.upsamplers.0"} <= names
    assert len(names) > 120 and report.rows[-1].tensor == "output decoded"


def test_both_directions_bit_for_bit(folder, tmp_path):
    """A folder to one file, that to a folder and to Orbax; Tencent's prefix and ComfyUI's names are
    read too."""
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    one, back, ours = tmp_path / "one.safetensors", tmp_path / "back", tmp_path / "ours"
    assert main([str(folder), str(one), "--to", "bfl"]) == 0
    assert main([str(one), str(back), "--to", "diffusers"]) == 0
    assert main([str(back), str(ours), "--to", "orbax"]) == 0
    prefixed = tmp_path / "pytorch_model.safetensors"
    save_file({f"vae.{name}": value for name, value in weights.items()}, prefixed)
    comfy = tmp_path / "comfy.safetensors"
    named = {comfy_autoencoder(name): value for name, value in weights.items()}
    for name in filter(lambda name: "attn_1" in name and named[name].ndim == 2, named):
        named[name] = named[name][..., None, None, None]
    save_file(named, comfy)
    config_file = folder / "config.json"
    for path in (one, back / "diffusion_pytorch_model.safetensors"):
        found = load_file(path)
        assert found.keys() == weights.keys()
        assert all(np.array_equal(found[name], weights[name]) for name in weights)
    diffusers.AutoencoderKLHunyuanVideo.from_pretrained(back)
    for path in (ours, prefixed, comfy):
        (network,) = open_source(path, None if path is ours else config_file).values()
        assert network.config == TINY
        assert all(np.array_equal(network.tensors[n].read(), weights[n]) for n in weights)
