"""First frames of clips that another model draws."""

from pathlib import Path

import numpy as np
import pytest
from open_sora_folders import open_sora  # noqa: F401
from PIL import Image

from fluxjax import load_pipeline
from fluxjax.config import HUNYUAN_VIDEO_720, OPEN_SORA_768, ConfigError
from fluxjax.sample.first_frames import with_first_frames
from fluxjax.sample.options import Options
from fluxjax.sample.picture_record import remembered
from fluxjax.sample.prompts_file import Line
from fluxjax.schedules.open_sora import shift_of


@pytest.mark.slow
def test_a_model_of_pictures_draws_the_first_frame(open_sora, tmp_path):  # noqa: F811
    """Of the clip's prompt, size, steps and seed, by Open-Sora's noise levels."""
    pipe = load_pipeline(open_sora)
    asked = {"prompt": ("a", "red", "circle"), "out": tmp_path, "number": 2, "steps": 4}
    options = Options(first_frame_model="tiny", **asked)
    lines = with_first_frames(options, {}, [Line("", {"seed": 5})], pipe)
    assert [line.values["seed"] for line in lines] == [5, 6]
    files = [Path(line.values["reference"]) for line in lines]
    assert [file.name for file in files] == ["first-frame-5.png", "first-frame-6.png"]
    first, second = (np.asarray(Image.open(file)) for file in files)
    assert first.shape == (32, 48, 3) and (first != second).any()
    told = remembered(files[0]).settings
    assert (told["prompt"], told["seed"], told["steps"]) == ("a red circle", 5, 4)
    assert told["guidance"] == 4.0 and told["flow_shift"] == pytest.approx(shift_of(6, 1))
    for chosen, line, model, words in (
        (options, Line("line 2", {"reference": "a.png"}), pipe, "line 2: .* and one is given"),
        (options, Line("", {}), load_pipeline("tiny"), "is for clips, and FluxPipeline draws"),
        (
            Options(first_frame_model=str(open_sora), **asked),
            Line("", {}),
            pipe,
            "is to draw pictures, and OpenSoraPipeline draws clips",
        ),
        (
            Options(first_frame_model="tiny-pixart", **asked),
            Line("", {}),
            pipe,
            r"it is to be a flow, such as FLUX\.1, and PixArt\w* is none",
        ),
        (options, Line("line 3", {"frames": 1}), pipe, "line 3: .* at least 5 frames around it"),
        (options, Line("", {"sampler": "heun"}), pipe, "drawn by Euler's steps alone"),
    ):
        with pytest.raises(ConfigError, match=words):
            with_first_frames(chosen, {}, [line], model)
    assert sorted(tmp_path.iterdir()) == files, "a frame was drawn of a clip that is refused"


def test_noise_levels_of_first_frames():
    assert OPEN_SORA_768.first_frame_shift(1024, 576) == pytest.approx(shift_of(64 * 36, 1))
    assert HUNYUAN_VIDEO_720.first_frame_shift(1280, 720) is None
