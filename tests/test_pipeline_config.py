"""What a pipeline's networks must have in common."""

from dataclasses import replace

import pytest

from fluxjax.config import DEV, FILL, PRESETS, SCHNELL, ConfigError, ControlNetConfig
from fluxjax.families import family_of
from fluxjax.sample.refusals import check_told
from fluxjax.sample.settings import Settings


def test_text_to_image_models_are_known_by_their_widths():
    for name in ("dev", "schnell", "kontext", "tiny"):
        PRESETS[name].require_whole(name, text_alone=True)
    with pytest.raises(ConfigError, match=r"^some/folder: .* in_channels is 384, .* give 64$"):
        FILL.require_whole("some/folder", text_alone=True)
    for part, width in (("text_encoder", "hidden_size"), ("text_encoder_2", "d_model")):
        other = replace(getattr(DEV, part), **{width: 1536})
        with pytest.raises(ConfigError, match=r"_dim is \d+, .* give 1536$"):
            replace(DEV, **{part: other}).require_whole("some/folder", text_alone=True)


def test_guidance_that_no_network_is_told_is_refused():
    """FLUX.1-schnell has no embedding of it, unless a ControlNet beside it does."""
    usual = Settings(guidance=SCHNELL.guidance)
    flux = family_of(SCHNELL.class_name)
    check_told(flux, SCHNELL, usual, usual, changed=False)
    with pytest.raises(ConfigError, match="guidance is told to models that were distilled with it"):
        check_told(flux, SCHNELL, Settings(guidance=3.5), usual, changed=False)
    hears = replace(SCHNELL, controlnets=(ControlNetConfig(guidance_embeds=True),))
    check_told(flux, hears, Settings(guidance=3.5), usual, changed=False)
