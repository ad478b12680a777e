"""How models of clips are measured, with one that draws what it is asked for and one that does not.

`Drawer` stands for a pipeline: it renders the scenes of the measurement itself.
"""

from dataclasses import replace
from types import SimpleNamespace

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image

from fluxjax.config import TINY, ConfigError, OpenSoraPipelineConfig
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.pipeline import Pipeline
from fluxjax.sample.settings import Settings
from fluxjax.train.embedded.evaluate_clips import evaluate_clips, print_clip_evaluation
from fluxjax.train.embedded.evaluate_settings import EvaluateSettings
from fluxjax.train.embedded.moving_captions import moving_captions, states_background
from fluxjax.train.embedded.moving_scenes import render_clips, sample_moving_scenes

ASKED = EvaluateSettings(task="clip", prompts=6, seed=3)


class Same(nn.Module):
    """An autoencoder that loses nothing."""

    @nn.compact
    def __call__(self, clips):
        return clips


class Drawer(Pipeline):
    """`turned` draws each clip backwards; `firsts` keeps what was given as first frames."""

    def __init__(self, turned: bool, config=None):
        self.turned, self.firsts = turned, []
        self.config = config or OpenSoraPipelineConfig(width=48, height=48, frames=9)
        self.executables = SimpleNamespace(modules=lambda stage: (Same(),))
        stream = (7919, ASKED.seed)
        scenes = sample_moving_scenes(stream, ASKED.prompts, held_out=True)
        self.texts = moving_captions(scenes, stream)
        self.clips = np.asarray(render_clips(scenes, frames=9, side=48))

    @property
    def defaults(self):
        return Settings(prompt="", width=48, height=48, steps=2, guidance=4.0)

    def params(self, component):
        return {}

    def __call__(self, prompt, *, seed, steps, guidance, reference=None):  # pyright: ignore
        i = seed - ASKED.seed
        assert prompt == self.texts[i]
        if reference is not None:
            np.testing.assert_array_equal(np.asarray(reference), to_bytes(self.clips[i, :1])[0])
            self.firsts.append(i)
        return [SimpleNamespace(frames=to_bytes(self.clips[i][:: -1 if self.turned else 1]))]


@pytest.mark.slow
def test_a_model_that_draws_what_it_is_asked_for_is_right(tmp_path, capsys):
    drawer = Drawer(turned=False)
    found = evaluate_clips(drawer, replace(ASKED, sheet=tmp_path / "sheet.png"))
    assert set(found.counts) == {"text", "first frame", "autoencoder"}
    for group in found.counts.values():
        assert all(tally.right == tally.asked for tally in group.values())
    assert drawer.firsts == list(range(6))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.n_frames == 9 and sheet.info["duration"] == 1000 / drawer.config.fps
        assert sheet.info["loop"] == 0, "it moves on and on"
    assert sum(tally.asked for tally in found.motions.values()) == 6
    print_clip_evaluation(found)
    assert "1.000 of 6" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_that_draws_backwards_gets_directions_wrong():
    found = evaluate_clips(Drawer(turned=True), ASKED)
    text = found.counts["text"]
    assert text["itself"].right == 6 and text["all"].right == 0
    # Two that pass the other way round pass too, and each is where the other was to be.
    assert text["direction"].right == found.motions["passing"].asked < 6
    assert found.counts["autoencoder"]["all"].right == 6


def test_models_of_pictures_are_refused():
    with pytest.raises(ConfigError, match="tiny draws pictures"):
        evaluate_clips(Drawer(turned=False, config=TINY), ASKED)


def test_what_a_caption_leaves_open_is_not_asked():
    assert states_background("a red circle moving left on a navy blue background")
    assert not states_background("an orange star rising")
