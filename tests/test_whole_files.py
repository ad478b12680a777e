"""Whole pipelines of Stable Diffusion in single files: their names, and there and back."""

import json
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from parameter_trees import to_theirs
from random_checkpoints import random_tree
from safetensors.numpy import load_file, save_file

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.pipeline_folder import assembled, read_config
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.config import (
    PRESETS,
    AutoencoderConfig,
    CLIPTextConfig,
    ConfigError,
    SD3Config,
    T5Config,
    UNetConfig,
)
from fluxjax.config.stable_diffusion import EULER
from fluxjax.convert.__main__ import main
from fluxjax.hub import tiny_folder
from fluxjax.networks import network_of
from fluxjax.networks.whole_files import WHOLE_FILES, whole_file, whole_file_of


@pytest.mark.slow
def test_published_files_are_told_and_every_name_has_its_place(shared):
    """At full size, from shapes alone: each tensor of a file is one of a network of the preset."""
    clip_l, bigg, clip_h = (
        json.loads((shared / f"checkpoints/{name}.json").read_text())["tensors"]
        for name in ("clip_l", "clip_bigg", "openclip_h_23")
    )
    for file, preset in (
        ("ldm_sd15", "sd15"),
        ("ldm_sdxl_base", "sdxl"),
        ("ldm_sd3_medium", "sd3"),
        ("ldm_sd35_medium", "sd35-medium"),
        ("ldm_sd35_large", "sd35-large"),
    ):
        shapes = json.loads((shared / f"checkpoints/{file}.json").read_text())["tensors"]
        if "sd3" in file:
            prefix = "text_encoders.{}.transformer."
            shapes |= {prefix.format("clip_l") + name: shape for name, shape in clip_l.items()}
            shapes |= {prefix.format("clip_g") + name: shape for name, shape in bigg.items()}
        check(shapes, PRESETS[preset])
    base = json.loads((shared / "checkpoints/ldm_sd15.json").read_text())["tensors"]
    assert clip_h and not whole_file({n: s for n, s in base.items() if "cond_stage" not in n})


def check(shapes, preset):
    whole = whole_file(shapes)
    assert whole is not None
    left = set(shapes)
    for component, part in whole.parts.items():
        own = {n.removeprefix(part.prefix): n for n in shapes if n.startswith(part.prefix)}
        if not own:
            continue
        config = preset.networks[component]
        network = network_of(config)
        leaves = engine.published_leaves(abstract_params(config))
        expected = {name: leaf.shape for name, leaf in leaves.items()}
        lazy = {n: unread(shapes[full]) for n, full in own.items()}
        if part.identity and "text_projection.weight" not in lazy:
            lazy["text_projection.weight"] = unread(expected["text_projection.weight"])
        found = engine.to_published(lazy, network.dialect(part.dialect).table(config), expected)
        assert found.keys() == expected.keys()
        given = {name: tensor.shape for name, tensor in lazy.items()}
        assert part.config is None or part.config(given) == config
        left -= set(own.values())
    assert not left


def unread(shape):
    def read(start, stop):
        raise AssertionError("nothing is read")

    return Tensor(tuple(shape), np.dtype(np.float32), read)


CLIP = CLIPTextConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    projection_dim=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    max_position_embeddings=77,
)
OPENCLIP = replace(CLIP, hidden_act="gelu", hidden_size=128, num_attention_heads=2)
UNET = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(8, 8),
    cross_attention_dim=64,
)
LINEAR = replace(
    UNET, block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True
)
VAE = AutoencoderConfig(
    latent_channels=4,
    block_out_channels=(32, 64),
    layers_per_block=1,
    scaling_factor=0.18215,
    shift_factor=0.0,
    use_quant_conv=True,
    use_post_quant_conv=True,
)
XL: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
PROJECTED = replace(OPENCLIP, with_projection=True, projection_dim=128)
SMALL: dict[str, dict[str, Any]] = {
    "1": {"unet": UNET, "vae": VAE, "text_encoder": CLIP},
    "2": {
        "unet": replace(LINEAR, cross_attention_dim=128),
        "vae": VAE,
        "text_encoder": replace(OPENCLIP, projection_dim=512),
    },
    "xl": {
        "unet": replace(
            LINEAR,
            cross_attention_dim=192,
            projection_class_embeddings_input_dim=128 + 6 * 256,
            **XL,
        ),
        "vae": replace(VAE, scaling_factor=0.13025),
        "text_encoder": CLIP,
        "text_encoder_2": PROJECTED,
    },
    "refiner": {
        "unet": replace(
            LINEAR,
            cross_attention_dim=128,
            projection_class_embeddings_input_dim=512 + 5 * 256,
            **XL,
        ),
        "vae": replace(VAE, scaling_factor=0.13025),
        "text_encoder_2": replace(PROJECTED, projection_dim=512),
    },
    "3": {
        "transformer": SD3Config(
            num_layers=2,
            num_attention_heads=1,
            joint_attention_dim=256,
            pooled_projection_dim=192,
            pos_embed_max_size=12,
        ),
        "vae": AutoencoderConfig(
            block_out_channels=(32, 64),
            layers_per_block=1,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ),
        "text_encoder": replace(CLIP, with_projection=True),
        "text_encoder_2": PROJECTED,
        "text_encoder_3": T5Config(
            vocab_size=40, d_model=256, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        ),
    },
}


def whole_arrays(configs):
    """A file of random half precision, as its original code has it."""
    whole = whole_file_of(configs)
    assert whole is not None
    arrays = {}
    for seed, (component, config) in enumerate(configs.items()):
        part = whole.parts[component]
        table = network_of(config).dialect(part.dialect).table(config)
        theirs = to_theirs(random_tree(config, ml_dtypes.bfloat16, seed), table)
        arrays |= {f"{part.prefix}{n}": np.ascontiguousarray(t.read()) for n, t in theirs.items()}
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_file_becomes_a_folder_and_back_without_a_bit_lost(tmp_path, name):
    """What nothing reads, a training's leavings and OpenCLIP's last layer, is left out and said."""
    configs, file = SMALL[name], tmp_path / "whole.safetensors"
    arrays = whole_arrays(configs)
    more = {"model_ema.decay": np.ones(1, np.float32), "betas": np.ones(4, np.float32)}
    more["first_stage_model.loss.logvar"] = np.ones(1, np.float32)
    last = "cond_stage_model.model.transformer.resblocks.1."
    if name == "2":
        extra = {n.replace("blocks.1.", "blocks.2."): a for n, a in arrays.items() if last in n}
        more |= extra | {"cond_stage_model.model.text_projection": np.ones((128, 128), np.float32)}
    if name == "3":  # Stability's have none
        projection = "text_encoders.clip_l.transformer.text_projection.weight"
        arrays.pop(projection)
        more = {}
    save_file(arrays | more, file)
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    family = ["--family", "sd2-v"] if name == "2" else []
    if name == "2":
        with pytest.raises(ConfigError, match="say --family sd2-v for models of 768 pixels"):
            main([str(file), str(folder)])
    main([str(file), str(folder), *family])
    config: Any = read_config(folder)
    assert {n: type(c) for n, c in config.networks.items()} == {
        n: type(c) for n, c in configs.items()
    }
    config.require_whole(folder)
    if name == "2":
        assert (config.scheduler.prediction_type, config.width) == ("v_prediction", 192)
    assert getattr(config, "requires_aesthetics_score", False) == (name == "refiner")
    main([str(folder), str(back), "--to", "bfl"])
    found = load_file(back)
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert found[key].dtype == array.dtype and found[key].tobytes() == array.tobytes(), key
    again = {n: network.config for n, network in open_source(back).items()}
    assert assembled(again, "") == assembled(config.networks, "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), [("xl", False), ("xl", True), ("1", True)])
def test_a_file_tells_that_its_model_predicts_v(tmp_path, name, zero):
    """XL's to everybody, by tensors without values; any to us, which sampler it has, too."""
    arrays = whole_arrays(SMALL[name])
    flags = {key: np.zeros(0, np.float32) for key in ("v_pred", "ztsnr")[: 1 + zero]}
    file, folder, back = tmp_path / "v.safetensors", tmp_path / "folder", tmp_path / "b.safetensors"
    save_file(arrays | flags, file)
    if name != "xl":
        with pytest.raises(ConfigError, match="belong to none of its networks: 'v_pred', 'ztsnr'"):
            open_source(file)
        save_file(arrays, file)
    main([str(file), str(folder)])
    place = folder / "scheduler" / "scheduler_config.json"
    said = json.loads(place.read_text())
    if name == "xl":
        assert read_config(folder).scheduler == replace(
            EULER, prediction_type="v_prediction", rescale_betas_zero_snr=zero
        )
    else:
        assert "prediction_type" not in said
        said |= {"prediction_type": "v_prediction", "_class_name": "DDIMScheduler"}
        place.write_text(json.dumps(said | {"rescale_betas_zero_snr": zero}))
    main([str(folder), str(back), "--to", "bfl"])
    assert load_file(back).keys() == arrays.keys() | (flags.keys() if name == "xl" else set())
    main([str(back), str(tmp_path / "again")])
    assert read_config(tmp_path / "again").scheduler == read_config(folder).scheduler


def test_names_that_belong_nowhere_are_refused(tmp_path):
    arrays = {
        "model.diffusion_model.input_blocks.0.0.weight": np.ones((32, 4, 3, 3), np.float32),
        "cond_stage_model.model.ln_final.weight": np.ones(4, np.float32),
        "first_stage_model.encoder.conv_in.weight": np.ones((32, 3, 3, 3), np.float32),
    }
    save_file(arrays, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"broken.safetensors"):
        open_source(tmp_path / "broken.safetensors")
    assert len({one.words for one in WHOLE_FILES}) == len(WHOLE_FILES)


def test_what_is_no_stable_diffusion_has_no_file_of_all(tmp_path):
    """FLUX's networks are called as some of Stable Diffusion 3's are."""
    found = {name: whole_file_of(config.networks) for name, config in PRESETS.items()}
    without = {name for name in found if not name.startswith("sd")}
    assert {"dev", "opensora-256", "hunyuan-720", "pixart-alpha"} <= without
    assert all((found[name] is None) == (name in without) for name in found)
    file = tmp_path / "all.safetensors"
    for source in (tiny_folder(), tiny_folder().parent / "tiny-pixart"):
        with pytest.raises(ConfigError, match="network\\(s\\) as bfl make a folder"):
            main([str(source), str(file), "--to", "bfl"])
    assert not file.exists()
