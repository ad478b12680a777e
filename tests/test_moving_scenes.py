"""Drawn scenes that move, their captions, and the reader that measures clips."""

import numpy as np
import pytest

from fluxjax.train.embedded.moving_captions import SENTENCES, moving_captions
from fluxjax.train.embedded.moving_reader import CLIP_ATTRIBUTES, read_clip, score_clip
from fluxjax.train.embedded.moving_scenes import (
    MOTIONS,
    MOVING_COLOURS,
    MOVING_SHAPES,
    MovingScene,
    render_clips,
    sample_moving_scenes,
)
from fluxjax.train.embedded.scenes import BACKGROUNDS, HELD_OUT_OBJECTS

SIDE, FRAMES = 48, 9


def one_of_each(seed: int) -> MovingScene:
    """A scene of every motion, in the order of MOTIONS."""
    scenes = sample_moving_scenes(seed, 128)
    rows = [int(np.flatnonzero(scenes.motion == i)[0]) for i in range(len(MOTIONS))]
    return MovingScene(*(field[rows] for field in scenes))


@pytest.fixture(scope="module")
def scenes():
    return one_of_each(2)


@pytest.fixture(scope="module")
def clips(scenes):
    return np.asarray(render_clips(scenes, frames=FRAMES, side=SIDE))


def pairs(scenes):
    return {
        (MOVING_COLOURS[scenes.colour[i, k]], MOVING_SHAPES[scenes.shape[i, k]])
        for i in range(len(scenes.motion))
        for k in range(scenes.count[i])
    }


def test_scenes_follow_from_their_seed_and_some_pairs_are_held_out():
    ordinary, again = sample_moving_scenes((1, 5), 64), sample_moving_scenes((1, 5), 64)
    for one, other in zip(ordinary, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not pairs(ordinary) & set(HELD_OUT_OBJECTS)
    held = sample_moving_scenes(1, 64, held_out=True)
    alone = held.count == 1
    single = MovingScene(*(field[alone] for field in held))
    assert pairs(single) <= set(HELD_OUT_OBJECTS)


def test_objects_stay_inside_of_the_frame():
    scenes = sample_moving_scenes(3, 512)
    used = scenes.radius > 0
    reach = scenes.radius * 1.08
    for axis in range(2):
        at = scenes.centre[..., axis]
        assert (at - reach)[used].min() > 0 and (at + reach)[used].max() < 1


def test_captions_say_what_is_drawn(scenes):
    for seed in range(4):
        for i, text in enumerate(moving_captions(scenes, seed)):
            assert MOVING_SHAPES[scenes.shape[i, 0]] in text
            stems = {form.split("{a} ")[1].split()[0] for form in SENTENCES[MOTIONS[i]]}
            assert any(stem in text for stem in stems), text


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_true_clips_are_read(scenes, clips, noise):
    rng = np.random.default_rng(0)
    for i, clip in enumerate(clips):
        seen = clip + rng.normal(0, noise, clip.shape)
        found = score_clip(scenes, i, read_clip(seen.astype(np.float32)))
        assert tuple(found) == CLIP_ATTRIBUTES
        assert all(tally.right == tally.asked for tally in found.values()), (MOTIONS[i], found)


@pytest.mark.slow
def test_what_moves_otherwise_is_read_otherwise(scenes, clips):
    back = {"left": "right", "up": "down", "growing": "shrinking"}
    for name, other in back.items():
        clip = clips[MOTIONS.index(name)][::-1]
        assert read_clip(clip).motion == other
    still = np.repeat(clips[0][:1], FRAMES, axis=0)
    assert read_clip(still).motion == "none"
    # Two that stand still side by side do not pass.
    passing = MOTIONS.index("passing")
    assert read_clip(np.repeat(clips[passing][:1], FRAMES, axis=0)).motion == "none"


@pytest.mark.slow
def test_another_object_in_one_frame_is_not_the_same(scenes, clips):
    i = MOTIONS.index("right")
    for field, value in (
        ("shape", (scenes.shape + 1) % len(MOVING_SHAPES)),
        ("colour", (scenes.colour + 1) % len(MOVING_COLOURS)),
    ):
        other = np.asarray(
            render_clips(scenes._replace(**{field: value}), frames=FRAMES, side=SIDE)
        )
        mixed = clips[i].copy()
        mixed[4] = other[i, 4]
        found = score_clip(scenes, i, read_clip(mixed))
        assert found["itself"].right == 0 and found["direction"].right == 1
    gone = clips[i].copy()
    gone[4] = gone[4, 0, 0]
    assert not read_clip(gone).itself


@pytest.mark.slow
def test_another_scene_is_not_what_was_asked_for(scenes, clips):
    i = MOTIONS.index("up")
    reading = read_clip(clips[i])
    for field, count, attribute in (
        ("colour", len(MOVING_COLOURS), "colour"),
        ("shape", len(MOVING_SHAPES), "shape"),
        ("background", len(BACKGROUNDS), "background"),
        ("motion", 4, "direction"),
    ):
        asked = scenes._replace(**{field: (getattr(scenes, field) + 1) % count})
        found = score_clip(asked, i, reading)
        assert found[attribute].right == 0 and found["all"].right == 0
