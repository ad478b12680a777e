"""Checkpoints of other families are called by their true name, and nothing is guessed."""

import json

import pytest

from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.config import ConfigError
from fluxjax.networks import NETWORKS
from fluxjax.networks.foreign import FOREIGN, foreign_words

WHOLE = "a whole Stable Diffusion checkpoint, in its original names"
KINDS = {
    "ldm_sd15": WHOLE,
    "ldm_sdxl_base": WHOLE,
}
# Read, and held against their networks elsewhere.
READ = {
    *("sd15_unet", "sd21_unet", "sdxl_unet", "sdxl_refiner_unet"),
    *("sd3_medium", "sd35_medium", "sd35_large"),
    *("pixart_alpha_1024", "opensora_v2", "hunyuan_video", "hunyuan_vae", "opensora_vae"),
    *("ldm_sd3_medium", "ldm_sd35_medium", "ldm_sd35_large"),
}
# Ours by their names, where the shapes leave something open.
ASKED = {
    "sd_vae": ("autoencoder", "0.18215"),
    "sd3_vae": ("autoencoder", "1.5305"),
    "bfl_ae": ("autoencoder", "1.5305"),
    "pixart_sigma_1024": ("PixArt transformer", "2048 pixels"),
    "clip_l": ("CLIP text encoder", "quick_gelu"),
    "clip_bigg": ("CLIP text encoder", "gelu"),
    "openclip_h_23": ("CLIP text encoder", "gelu"),
}


def published(shared, name):
    recorded = json.loads((shared / f"checkpoints/{name}.json").read_text())
    return {name: tuple(shape) for name, shape in recorded["tensors"].items()}


def test_every_published_file_is_tried(shared):
    files = {path.stem for path in (shared / "checkpoints").glob("*.json")}
    assert files == KINDS.keys() | ASKED.keys() | READ | {
        n for n in files if n.startswith("bfl_flux1")
    }


@pytest.mark.parametrize("name", KINDS)
def test_it_has_its_true_name(shared, name):
    shapes = published(shared, name)
    assert foreign_words(shapes) == KINDS[name]
    # As exported by a trainer, under one more prefix.
    assert foreign_words({f"module.{n}": s for n, s in shapes.items()}) == KINDS[name]
    with pytest.raises(ConfigError) as error:
        detect_network(shapes)
    assert f"these are the tensors of {KINDS[name]}, which fluxjax cannot" in str(error.value)


@pytest.mark.parametrize("name", ASKED)
def test_what_shapes_cannot_tell_is_asked_for(shared, name):
    shapes = published(shared, name)
    network, dialect = detect_network(shapes)
    words, twin = ASKED[name]
    assert network.words == words
    with pytest.raises(ConfigError, match=f"{twin}.*config.json with --config"):
        infer_config(network, dialect, shapes)


def test_an_autoencoder_of_four_channels_is_not_flux_s(shared):
    shapes = published(shared, "sd_vae")
    with pytest.raises(ConfigError, match=r"4 latent channels, as Stable Diffusion.*of 16"):
        infer_config(*detect_network(shapes), shapes, family="FLUX.1")
    shapes = published(shared, "bfl_ae")
    config = infer_config(*detect_network(shapes), shapes, family="FLUX.1")
    assert (config.latent_channels, config.scaling_factor) == (16, 0.3611)


def test_an_openclip_is_not_flux_s(shared):
    for name in ("clip_bigg", "openclip_h_23"):
        shapes = published(shared, name)
        with pytest.raises(ConfigError, match=r"activation.*config.json with --config"):
            infer_config(*detect_network(shapes), shapes, family="FLUX.1")
    shapes = published(shared, "clip_l")
    config = infer_config(*detect_network(shapes), shapes, family="FLUX.1")
    assert config.hidden_act == "quick_gelu"


def test_whose_an_autoencoder_is_may_be_said(shared):
    shapes = published(shared, "sd3_vae")
    network, dialect = detect_network(shapes)
    config = infer_config(network, dialect, shapes, family="Stable Diffusion 3")
    assert (config.scaling_factor, config.shift_factor) == (1.5305, 0.0609)
    config = infer_config(network, dialect, shapes, family="FLUX.1")
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)
    with pytest.raises(ConfigError, match="Stable Diffusion XL needs its own, of 4"):
        infer_config(network, dialect, shapes, family="Stable Diffusion XL")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"}, "a LoRA"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lokr_w1"}, "a LoRA"),
        ({"controlnet_cond_embedding.conv_in.weight"}, "a ControlNet of Stable Diffusion"),
        ({"distilled_guidance_layer.in_proj.weight", "img_in.weight"}, "Chroma's"),
        ({"visual.transformer.resblocks.0.attn.in_proj_weight"}, "OpenCLIP, in its own names"),
        ({"model.visual.transformer.resblocks.0.attn.in_proj_weight"}, "OpenCLIP"),
        ({"encoder.down_blocks.3.0.attn.to_q.weight", "decoder.conv_in.weight"}, "as Sana has"),
        ({"blocks.1.attn.sr.weight", "t_block.1.weight"}, "compressed keys and values"),
        ({"a", "b"}, "has names like 'a', 'b'"),
        ({"x" * 10**6, "y\n" * 10**5}, "has names like"),
    ],
)
def test_others_by_their_names(names, what):
    with pytest.raises(ConfigError, match=what):
        detect_network(dict.fromkeys(names, (1,)))


def test_each_description_tells_its_own(shared):
    """No kind that is read is taken for one that is not, and each of these is reached."""
    for name in ("dev", "schnell", "fill-dev", "canny-dev"):
        network, dialect = detect_network(published(shared, f"bfl_flux1-{name}"))
        assert (network.component, dialect.name) == ("transformer", "bfl")
    assert len({kind.signature for kind in FOREIGN}) == len(FOREIGN)
    kinds = {(network.component, network.words) for network in NETWORKS.values()}
    assert len(kinds) == len(NETWORKS)
