"""Every name and shape of the published checkpoints maps onto our trees, each exactly once."""

import json
from dataclasses import replace

import numpy as np
import pytest
from parameter_trees import parameter_count, to_theirs

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor, of_array
from fluxjax.config import DEV, PRESETS, T5_XXL, AutoencoderConfig
from fluxjax.networks.autoencoder import bfl as bfl_table
from fluxjax.networks.flux import BFL

PUBLISHED = {"dev": "dev", "schnell": "schnell", "canny-dev": "control", "fill-dev": "fill"}


def lazy(shapes):
    def never(start, stop):
        raise AssertionError("names and shapes alone must do")

    return {name: Tensor(tuple(s), np.dtype(np.float32), never) for name, s in shapes.items()}


def published_shapes(config, stacked):
    template = abstract_params(config, stacked=stacked)
    return template, {n: leaf.shape for n, leaf in engine.published_leaves(template).items()}


def inferred(shapes, family=""):
    network, dialect = detect_network(shapes)
    return network.component, dialect.name, infer_config(network, dialect, shapes, family)


def assert_maps_once(published, config, table, stacked):
    template, shapes = published_shapes(config, stacked)
    reference = engine.to_published(lazy(published["tensors"]), table, shapes)
    assert reference.keys() == shapes.keys()
    tree = engine.to_tree(reference, template, place=lambda _, tensor: tensor)
    assert engine.flatten(tree).keys() == engine.flatten(template).keys()
    assert parameter_count(tree) == parameter_count(template) == published["parameters"]
    back = to_theirs(tree, table)
    assert {name: list(t.shape) for name, t in back.items()} == published["tensors"]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_bfl_transformer(shared, name, stacked):
    published = json.loads((shared / f"checkpoints/bfl_flux1-{name}.json").read_text())
    config = PRESETS[PUBLISHED[name]].transformer
    assert_maps_once(published, config, BFL, stacked)
    shapes = {k: tuple(v) for k, v in published["tensors"].items()}
    assert inferred(shapes) == ("transformer", "bfl", config)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_diffusers_transformer(shared, name):
    folder = shared / f"checkpoints/FLUX.1-{name}/transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    config = PRESETS[name].transformer
    for stacked in (False, True):
        _, shapes = published_shapes(config, stacked)
        assert shapes.keys() == index["weight_map"].keys()
        size = sum(int(np.prod(shape)) for shape in shapes.values())
        assert 2 * size == index["metadata"]["total_size"]
    assert inferred(shapes) == ("transformer", "published", config)


def test_bfl_autoencoder(shared):
    published = json.loads((shared / "checkpoints/bfl_ae.json").read_text())
    assert_maps_once(published, DEV.vae, bfl_table(4), False)
    shapes = {k: tuple(v) for k, v in published["tensors"].items()}
    assert inferred(shapes, family="FLUX.1") == ("vae", "bfl", AutoencoderConfig())


@pytest.mark.parametrize(
    ("name", "preset"), [("sd_vae", "sd15"), ("sd_vae", "sdxl"), ("sd3_vae", "sd3")]
)
def test_diffusers_autoencoder(shared, name, preset):
    published = json.loads((shared / f"checkpoints/{name}.json").read_text())
    template, shapes = published_shapes(PRESETS[preset].networks["vae"], False)
    assert {name: list(shape) for name, shape in shapes.items()} == published["tensors"]
    assert parameter_count(template) == published["parameters"]


def test_t5_index(shared):
    path = shared / "checkpoints/FLUX.1-dev/text_encoder_2/model.safetensors.index.json"
    index = json.loads(path.read_text())
    for stacked in (False, True):
        template, shapes = published_shapes(T5_XXL, stacked)
        assert shapes.keys() == index["weight_map"].keys()
        assert 2 * parameter_count(template) == index["metadata"]["total_size"]
    assert inferred(shapes) == ("text_encoder_2", "published", T5_XXL)


def test_every_misfit_is_listed(shared):
    published = json.loads((shared / "checkpoints/bfl_flux1-dev.json").read_text())["tensors"]
    published["img_in.weight"] = [3072, 65]
    published["double_blocks.3.img_attn.qkv.weight"] = [9000, 3072]
    published["surprise\x1b.weight"] = [1]
    del published["single_blocks.7.linear1.bias"]
    _, shapes = published_shapes(DEV.transformer, False)
    with pytest.raises(engine.MappingError) as error:
        engine.to_published(lazy(published), BFL, shapes)
    text = str(error.value)
    assert "7 tensor(s) do not fit" in text
    assert "shape: img_in.weight is [3072, 65]" in text
    assert "shape: double_blocks.3.img_attn.qkv.weight is [9000, 3072]" in text
    assert "unknown: surprise\\x1b.weight [1]" in text
    for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        assert f"missing: single_transformer_blocks.7.{part}.bias" in text


def test_bfl_values_land_where_diffusers_puts_them():
    """Against diffusers' own converters: fused rows, swapped halves, reversed levels."""
    import torch
    from diffusers.loaders import single_file_utils as theirs

    rng = np.random.default_rng(0)

    def arrays_of(reference, table):
        lazy = {n: of_array(rng.standard_normal(s, np.float32)) for n, s in reference.items()}
        bfl = engine.from_published(lazy, table)
        arrays = {name: torch.from_numpy(tensor.read()) for name, tensor in bfl.items()}
        return arrays, {
            name: t.read() for name, t in engine.to_published(bfl, table, reference).items()
        }

    def assert_equal(converted, ours):
        assert converted.keys() == ours.keys()
        for name, tensor in converted.items():
            np.testing.assert_array_equal(tensor.numpy(), ours[name], name)

    # diffusers counts on FLUX's width; two columns are enough, since only rows are rearranged.
    config = replace(DEV.transformer, num_layers=1, num_single_layers=1)
    _, shapes = published_shapes(config, False)
    narrow = {name: (s[0], *(2 for _ in s[1:])) for name, s in shapes.items()}
    bfl, ours = arrays_of(narrow, BFL)
    assert_equal(theirs.convert_flux_transformer_checkpoint_to_diffusers(bfl), ours)

    config = AutoencoderConfig(block_out_channels=(32, 32, 64), norm_num_groups=32)
    _, shapes = published_shapes(config, False)
    bfl, ours = arrays_of(shapes, bfl_table(3))
    vae = {"down_block_types": [0] * 3, "up_block_types": [0] * 3, "layers_per_block": 2}
    assert_equal(theirs.convert_ldm_vae_checkpoint(bfl, vae), ours)
