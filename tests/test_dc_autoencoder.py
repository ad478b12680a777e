"""The deep-compression autoencoder of clips: its names, its configurations, both directions."""

import json
from dataclasses import replace

import numpy as np
import pytest
from parameter_trees import parameter_count
from safetensors.numpy import load_file, save_file

from fluxjax.checkpoint.component_json import config_json, network_config
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.engine import from_tree
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import ConfigError, DCAutoencoderConfig
from fluxjax.config.dc_autoencoder import DC_AUTOENCODERS
from fluxjax.convert.__main__ import main
from fluxjax.diff.live import compare_network

TINY = DCAutoencoderConfig(
    latent_channels=8,
    width_list=(8, 8, 8, 32, 32, 32),
    encoder_depth_list=(1, 2, 1, 1, 1, 1),
    decoder_depth_list=(1, 1, 1, 2, 1, 1),
)


def shapes_of(config):
    """Published names and shapes; of arrays that hold nothing."""
    return {name: tensor.shape for name, tensor in from_tree(abstract_params(config)).items()}


@pytest.mark.parametrize("name", ["dc-ae-f32t4c128", "dc-ae-f64t4c128"])
def test_the_published_sizes(name, tmp_path):
    config = DC_AUTOENCODERS[name]
    shapes = shapes_of(config)
    network, dialect = detect_network(shapes)
    assert infer_config(network, dialect, shapes) == config
    assert network_config({"model_name": name}, tmp_path) == config
    scaled = replace(config, scaling_factor=0.493)
    values = config_json(scaled)
    assert values["model_name"] == name and network_config(values, tmp_path) == scaled
    if name == "dc-ae-f32t4c128":
        assert parameter_count(abstract_params(config)) == 459_462_147
        assert shapes["decoder.stages.3.op_list.1.context_module.main.aggreg.0.1.weight"] == (
            *(1536, 32),
            *(1, 1, 1),
        )


def test_sizes_of_other_files():
    assert infer_config(*detect_network(shapes_of(TINY)), shapes_of(TINY)) == TINY
    shapes = shapes_of(TINY)
    fewer = {name: shape for name, shape in shapes.items() if ".stages.5." not in name}
    with pytest.raises(ConfigError, match=r"5 stages halve frames .* 6 or 7.*--config"):
        infer_config(*detect_network(fewer), fewer)
    flat = {name: shape[:4] for name, shape in shapes.items()}
    with pytest.raises(ConfigError, match="autoencoder of pictures, as Sana has"):
        infer_config(*detect_network(flat), flat)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"encoder_depth_list": (1, 1)}, "encoder_depth_list must be 6 numbers"),
        ({"first_attention_stage": 2}, "divide by attention_head_dim=32 from stage 2"),
        ({"temporal_stages": (5,)}, "temporal_stages must be from 0 to 4"),
        ({"latent_channels": 5}, "must divide the last width, 32"),
        ({"width_list": (8, 40, 40, 32, 32, 32)}, "40 channels after 8 must divide 32"),
        ({"scaling_factor": -1.0}, "must be positive"),
    ],
)
def test_impossible_configurations(values, said):
    with pytest.raises(ConfigError, match=said):
        replace(TINY, **values)


def test_both_directions_bit_for_bit(tmp_path):
    random = np.random.default_rng(0)
    weights = {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in shapes_of(TINY).items()
    }
    source, one = tmp_path / "source.safetensors", tmp_path / "one.safetensors"
    back, ours = tmp_path / "back", tmp_path / "ours"
    save_file(weights, source)
    assert main([str(source), str(one), "--to", "bfl"]) == 0
    assert main([str(one), str(back), "--to", "diffusers"]) == 0
    assert main([str(back), str(ours), "--to", "orbax"]) == 0
    for path in (one, back / "model.safetensors"):
        found = load_file(path)
        assert found.keys() == weights.keys()
        assert all(np.array_equal(found[name], weights[name]) for name in weights)
    (network,) = open_source(ours).values()
    assert network.config == TINY
    assert all(np.array_equal(network.tensors[n].read(), weights[n]) for n in weights)
    with pytest.raises(ConfigError, match=r"has no DCAE_HF to compare with; `diff golden`"):
        compare_network(back, "vae")
    (back / "config.json").write_text(json.dumps({"model_name": "dc-ae-f32t4c9"}))
    with pytest.raises(ConfigError, match=r"config.json: .*'dc-ae-f32t4c9' is no deep"):
        open_source(back)
