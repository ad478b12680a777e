"""Files of ControlNets, SigLIP, Redux and IP-Adapters: through all forms and back, bit for bit."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import random_checkpoints as make
import torch
import transformers
from test_convert_roundtrip import run, through_all, write
from test_image_encoders import ADAPTER, PROJECTOR, SIGLIP, xlabs_file

from fluxjax.checkpoint.component_json import config_json, write_json
from fluxjax.checkpoint.engine import published_leaves
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import (
    REDUX,
    SIGLIP_SO400M,
    UNION,
    UNION_2,
    XLABS,
    CLIPVisionConfig,
    ConfigError,
    ControlNetConfig,
)

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")
WIDE = ControlNetConfig(
    **{**vars(make.SMALL.transformer), "num_single_layers": 1, "mlp_ratio": 4.0}, num_mode=3
)
HINTED = replace(WIDE, num_single_layers=0, num_mode=0, conditioning_embedding_channels=16)


@pytest.mark.slow
@pytest.mark.parametrize("config", [WIDE, HINTED], ids=["union", "pixels"])
@pytest.mark.parametrize("form", ["bfl", "diffusers"])
def test_controlnets(tmp_path, config, form):
    arrays = make.bfl_arrays(config) if form == "bfl" else make.hf_arrays(config)
    assert ("pos_embed_input.weight" in arrays) == (form == "bfl")
    assert any(name.startswith("input_hint_block") for name in arrays) == config.sees_pixels
    source = write(tmp_path / "source.safetensors", arrays)
    network = open_source(source)["controlnet"]
    assert (network.config, network.dialect) == (config, form.replace("diffusers", "published"))
    back = list(through_all(tmp_path, source, form))
    for path in back:
        make.assert_same_bits(make.read_arrays(path), arrays)
        assert open_source(path)["controlnet"].config == config
    model = diffusers.FluxControlNetModel.from_pretrained(
        tmp_path / "to_diffusers", dtype=torch.float32
    )
    expected = make.read_arrays(tmp_path / "to_diffusers")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].astype(np.float32), name)


def test_ip_adapters(tmp_path):
    arrays = xlabs_file(ADAPTER)
    source = write(tmp_path / "ip_adapter.safetensors", arrays)
    for back in through_all(tmp_path, source, "bfl"):
        make.assert_same_bits(make.read_arrays(back), arrays)
    assert "ip_adapter.2.to_v_ip.bias" in make.read_arrays(tmp_path / "to_diffusers")


@pytest.mark.parametrize("config", [SIGLIP, PROJECTOR], ids=["siglip", "redux"])
def test_image_encoders(tmp_path, config):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "model.safetensors", make.hf_arrays(config))
    write_json(folder / "config.json", config_json(config))
    for back in through_all(tmp_path, folder, "diffusers"):
        make.assert_same_bits(make.read_arrays(back), make.read_arrays(folder))
    if config is SIGLIP:  # PyTorch opens what we write, and we what it writes
        model = transformers.SiglipVisionModel.from_pretrained(tmp_path / "to_diffusers")
        name, probe = next((n, p) for n, p in model.named_parameters() if n.endswith("head.probe"))
        expected = make.read_arrays(folder)["vision_model.head.probe"].astype(np.float32)
        np.testing.assert_array_equal(probe.detach().float().numpy(), expected, name)
        model.save_pretrained(tmp_path / "theirs")
        again = run(tmp_path / "theirs", tmp_path / "again", "diffusers")
        make.assert_same_bits(make.read_arrays(again), make.read_arrays(tmp_path / "theirs"))
        assert open_source(again)["siglip"].config == SIGLIP


def test_a_projector_beside_a_transformer_is_not_taken_for_it(tmp_path):
    write(tmp_path / "flux1-redux-dev.safetensors", make.hf_arrays(PROJECTOR))
    write(tmp_path / "flux1-dev.safetensors", make.bfl_arrays(make.SMALL.transformer))
    found = open_source(tmp_path)
    assert {name: network.config for name, network in found.items()} == {
        "transformer": make.SMALL.transformer,
        "image_embedder": PROJECTOR,
    }


def published(build) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in build().state_dict().items()}


def controlnet(config: ControlNetConfig):
    values = {k: v for k, v in config_json(config).items() if not k.startswith("_")}
    return diffusers.FluxControlNetModel(**values)


def siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vars(SIGLIP_SO400M)))


def clip():
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**vars(CLIPVisionConfig()))
    )


@pytest.mark.parametrize(
    ("config", "build"),
    [
        (UNION, lambda: controlnet(UNION)),
        (UNION_2, lambda: controlnet(UNION_2)),
        (XLABS, lambda: controlnet(XLABS)),
        (SIGLIP_SO400M, siglip),
        (CLIPVisionConfig(with_projection=True), clip),
        (REDUX, diffusers.ReduxImageEncoder),
    ],
    ids=["union", "union 2", "xlabs", "siglip", "clip", "redux"],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_names_and_shapes_at_their_real_size(config, build, stacked):
    leaves = published_leaves(abstract_params(config, stacked=stacked))

    def bare(shapes):
        return {name.removeprefix("vision_model."): shape for name, shape in shapes.items()}

    expected = {k: v for k, v in published(build).items() if not k.endswith("position_ids")}
    assert bare({name: leaf.shape for name, leaf in leaves.items()}) == bare(expected)


def test_a_transformer_and_a_controlnet_are_never_confused(tmp_path):
    union, plain = make.hf_arrays(WIDE), make.hf_arrays(make.DIFFUSERS.transformer)
    for arrays, component in ((union, "controlnet"), (plain, "transformer")):
        source = write(tmp_path / f"{component}.safetensors", arrays)
        assert open_source(source).keys() == {component}
    del union["controlnet_blocks.1.bias"]
    union["controlnet_single_blocks.7.weight"] = np.zeros((2, 2), np.float16)
    with pytest.raises(ValueError, match=r"(?s)2 tensor.*single_blocks.7.*blocks\.1\.bias"):
        open_source(write(tmp_path / "damaged.safetensors", union))
    broken = {**make.hf_arrays(PROJECTOR), "redux_up.weight": np.zeros((9, 36), np.float16)}
    with pytest.raises(ConfigError, match="three times its output wide inside, 60, and this one 9"):
        open_source(write(tmp_path / "redux.safetensors", broken))
