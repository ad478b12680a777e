"""Pipelines of clips: their folders, their numbers of frames, and what must fit together."""

from dataclasses import replace

import pytest
from PIL import Image

from fluxjax.checkpoint.component_json import write_json
from fluxjax.checkpoint.pipeline_folder import read_config, write_config
from fluxjax.config import (
    DEV,
    OPEN_SORA_256,
    OPEN_SORA_768,
    OPEN_SORA_768_DC_AE,
    ConfigError,
    HunyuanVideoImageToVideoPipelineConfig,
)
from fluxjax.config.tiling import OPEN_SORA, OPEN_SORA_DC
from fluxjax.json_input import read_json
from fluxjax.sample.given_clips import check_given
from fluxjax.sample.given_pictures import Given
from fluxjax.sample.settings import Settings

KINDS = {"256": OPEN_SORA_256, "768": OPEN_SORA_768, "dc-ae": OPEN_SORA_768_DC_AE}


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_says_all_of_a_pipeline(tmp_path, name):
    config = replace(KINDS[name], image_guidance=2.0, fps=16)
    write_config(tmp_path, config)
    assert read_config(tmp_path) == config
    config.require_whole(name)
    assert config.tiling == (OPEN_SORA_DC if name == "dc-ae" else OPEN_SORA)
    index = read_json(tmp_path / "model_index.json")
    assert index["_class_name"] == "OpenSoraPipeline"
    assert index["transformer"] == ["diffusers", "MMDiTModel"]


def test_an_autoencoder_of_pictures_is_refused(tmp_path):
    write_config(tmp_path, OPEN_SORA_256)
    write_json(tmp_path / "vae" / "config.json", {"_class_name": "AutoencoderKL"})
    with pytest.raises(ConfigError, match="AutoencoderKL, expected AutoencoderKLHunyuan"):
        read_config(tmp_path)


def test_sizes_are_the_published_ones():
    sizes = [(config.height, config.width, config.unit) for config in KINDS.values()]
    assert sizes == [(192, 336, 16), (576, 1024, 16), (576, 1024, 32)]
    assert [config.latent_frames(config.frames) for config in KINDS.values()] == [33, 33, 32]
    assert OPEN_SORA_256.latent_frames(1) == OPEN_SORA_768_DC_AE.latent_frames(1) == 1


def test_frames_that_are_not_drawn():
    with pytest.raises(ConfigError, match="1 more than a multiple of 4, got 40; 41 would do"):
        OPEN_SORA_256.require_frames(40)
    with pytest.raises(ConfigError, match="frames must be a multiple of 4, got 129; 128 would do"):
        OPEN_SORA_768_DC_AE.require_frames(129)
    with pytest.raises(ConfigError, match="FluxPipeline draws pictures: got 5"):
        DEV.require_frames(5)
    DEV.require_frames(1)
    with pytest.raises(ConfigError, match=r"frames must be from 1 to 4097, got 0"):
        replace(OPEN_SORA_256, frames=0)


@pytest.mark.parametrize("config", [OPEN_SORA_256, HunyuanVideoImageToVideoPipelineConfig()])
def test_a_clip_of_nothing_but_its_given_frames_is_refused(config):
    settings, picture = Settings(frames=1), Image.new("RGB", (8, 8))
    with pytest.raises(
        ConfigError, match="a first frame needs a clip of at least 5 frames around it, not 1"
    ):
        check_given(config, Given(reference=picture), settings)
    check_given(config, Given(reference=picture), replace(settings, frames=5))


def test_networks_of_different_models_are_refused():
    with pytest.raises(ConfigError, match=r"^some/folder: .* is 64, .* it is 512: they"):
        replace(OPEN_SORA_256, vae=OPEN_SORA_768_DC_AE.vae).require_whole("some/folder")
