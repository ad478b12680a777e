"""What a pipeline's networks must have in common."""

from dataclasses import replace

import pytest

from fluxjax.config import DEV, FILL, PRESETS, ConfigError


def test_text_to_image_models_are_known_by_their_widths():
    for name in ("dev", "schnell", "kontext", "tiny"):
        PRESETS[name].require_whole(name, text_alone=True)
    with pytest.raises(ConfigError, match=r"^some/folder: .* in_channels is 384, .* give 64$"):
        FILL.require_whole("some/folder", text_alone=True)
    for part, width in (("text_encoder", "hidden_size"), ("text_encoder_2", "d_model")):
        other = replace(getattr(DEV, part), **{width: 1536})
        with pytest.raises(ConfigError, match=r"_dim is \d+, .* give 1536$"):
            replace(DEV, **{part: other}).require_whole("some/folder", text_alone=True)
