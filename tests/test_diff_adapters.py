"""`python -m fluxjax.diff live FOLDER --component ...` of what is added to a pipeline."""

from dataclasses import replace

import numpy as np
import pytest
import random_checkpoints as make
import transformers
from safetensors.numpy import load_file, save_file
from test_adapter_files import HINTED, WIDE
from test_convert_roundtrip import write
from test_image_encoders import ADAPTER, PROJECTOR, SIGLIP, xlabs_file
from test_pixart import TINY as PIXART
from test_sd3 import TINIES
from test_unet import TINIES as UNET

from fluxjax.checkpoint.component_json import config_json, write_json
from fluxjax.config import CLIPVisionConfig, ConfigError
from fluxjax.diff.commands import Live, execute
from fluxjax.diff.live import compare_network
from fluxjax.networks import network_of

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")
CLIP = CLIPVisionConfig(
    hidden_size=40,
    intermediate_size=64,
    projection_dim=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=24,
    patch_size=8,
    with_projection=True,
)
SD3 = TINIES["3.5"]
ONE_LEVEL = replace(
    UNET["1.5"],
    block_out_channels=(32,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    transformer_layers_per_block=(1,),
    attention_head_dim=(4,),
)
NARROW = replace(WIDE, num_layers=1)


def folder_of(path, config):
    """Its folder as PyTorch's libraries write one, with small weights."""
    path.mkdir(parents=True)
    arrays = {k: 0.1 * v for k, v in make.hf_arrays(config, np.float32).items()}
    library = network_of(config).json.library
    name = "diffusion_pytorch_model" if library == "diffusers" else "model"
    save_file(arrays, path / f"{name}.safetensors", {"format": "pt"})
    write_json(path / "config.json", config_json(config))
    return path


@pytest.mark.parametrize(
    ("component", "config", "layer"),
    [
        pytest.param("controlnet", NARROW, "controlnet_blocks.0", marks=pytest.mark.slow),
        pytest.param(
            "controlnet",
            replace(HINTED, num_layers=1),
            "input_hint_block.blocks.5",
            marks=pytest.mark.slow,
        ),
        ("siglip", SIGLIP, "encoder.layers.1.mlp.fc2"),
        ("image_embedder", PROJECTOR, "redux_up"),
        ("image_encoder", CLIP, "encoder.layers.1.mlp.fc2"),
    ],
    ids=["union", "pixels", "siglip", "redux", "clip"],
)
def test_folders(tmp_path, component, config, layer):
    pipeline = tmp_path / "pipeline"
    inner = folder_of(pipeline / "some_name", config)
    for folder, dtype in ((pipeline, "float32"), (inner, "bfloat16")):
        report = compare_network(folder, component, dtype=dtype)
        assert report.passed, report.first_failure
        names = [row.tensor.removeprefix("vision_model.") for row in report.rows]
        assert layer in names and names[-1].startswith("output ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "config", "layer"),
    [
        ("transformer", SD3, "transformer_blocks.4.attn.norm_q"),
        ("transformer", PIXART, "transformer_blocks.1.attn2.to_v"),
        ("unet", ONE_LEVEL, "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2"),
    ],
    ids=["sd3", "pixart", "unet"],
)
def test_other_families(tmp_path, component, config, layer):
    report = compare_network(folder_of(tmp_path / "network", config), component)
    assert report.passed, report.first_failure
    assert layer in [row.tensor for row in report.rows]


def test_files(tmp_path):
    arrays = {k: 0.1 * v for k, v in make.bfl_arrays(NARROW, np.float32).items()}
    source = write(tmp_path / "controlnet.safetensors", arrays)
    report = compare_network(source, "controlnet")
    assert report.passed, report.first_failure
    adapter = write(tmp_path / "ip_adapter.safetensors", xlabs_file(ADAPTER))
    for dtype in ("float32", "bfloat16"):
        report = compare_network(adapter, "ip_adapter", dtype=dtype)
        assert report.passed, report.first_failure
    names = [row.tensor for row in report.rows]
    assert {"image_proj.image_embeds", "image_proj.norm", "ip_adapter.2.to_v_ip"} <= set(names)


def test_a_planted_fault_is_named(tmp_path):
    folder = folder_of(tmp_path / "right", NARROW)
    wrong = folder_of(tmp_path / "wrong", NARROW)
    path = wrong / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["controlnet_single_blocks.0.bias"] += 0.5
    save_file(tensors, path, {"format": "pt"})
    report = compare_network(folder, "controlnet", against=wrong)
    failed = [row.tensor for row in report.rows if not row.passed]
    assert failed == ["controlnet_single_blocks.0", "output single sample 0"]


def test_a_whole_clip_has_its_vision_encoder(tmp_path):
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 99,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 8,
        },
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    report = compare_network(tmp_path, "image_encoder")
    assert report.passed, report.first_failure


def test_another_network_is_named(tmp_path):
    folder = folder_of(tmp_path / "redux", PROJECTOR)
    with pytest.raises(ConfigError, match=r"expected the FLUX ControlNet.*Redux projector"):
        execute(Live(folder=str(folder), component="controlnet"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        execute(Live(folder=str(tmp_path / "nowhere"), component="siglip"))
