"""Edits of drawn scenes, and the judge of what a model makes of them."""

import numpy as np
import pytest
from scipy import ndimage
from test_scenes import N, is_held_out, numpy_scenes

from fluxjax.hub import tiny_folder
from fluxjax.sample.known_words import outside
from fluxjax.text.tokenizers import load_t5_tokenizer
from fluxjax.train.data.drawn_scenes import edit_items, scene_items
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.embedded.edits import CHANGES, draw_edits
from fluxjax.train.embedded.scenes import SHAPES, Scene
from fluxjax.train.embedded.tool_cases import draw_cases, judge

SIDE = {"width": 96, "height": 96}


@pytest.fixture(scope="module")
def edits():
    found = draw_edits(numpy_scenes(), np.random.default_rng(0), held_out=False, **SIDE)
    return [edit for edit in found if edit is not None]


def test_an_edit_changes_what_it_names_and_nothing_else(edits):
    assert len(edits) > 0.95 * N and {edit.change for edit in edits} == set(CHANGES)
    fields = {"colour": "colour", "shape": "shape", "size": "size"}
    for edit in edits:
        before, after, named = edit.before, edit.after, list(edit.objects)
        assert not is_held_out(after)
        if edit.change == "removal":
            assert int(after.count) == int(before.count) - 1
            (gone,) = named
            rest = [i for i in range(int(before.count)) if i != gone]
            np.testing.assert_array_equal(after.shape[: len(rest)], before.shape[rest])
            np.testing.assert_array_equal(after.centre[: len(rest)], before.centre[rest])
            continue
        for field in fields.values():
            differs = (getattr(before, field) != getattr(after, field))[: int(before.count)]
            expected = [edit.change == field and i in named for i in range(int(before.count))]
            assert differs.tolist() == expected, edit
        np.testing.assert_array_equal(before.centre, after.centre)
        moved = [before.split != after.split, (before.background != after.background).any()]
        assert any(moved) == (edit.change == "background")


def test_what_is_named_can_be_no_other_object(edits):
    for edit in edits:
        words = edit.instruction.split()
        if edit.change == "background" or len(edit.objects) > 1 or int(edit.before.count) == 1:
            continue
        assert "it" not in words and "them" not in words
        scene, (i,) = edit.before, edit.objects
        alike = [j for j in range(int(scene.count)) if scene.shape[j] == scene.shape[i]]
        if len(alike) > 1 and "one" not in words:  # then its colour is named too
            after_the = words[words.index("the") + 1]
            assert after_the not in SHAPES, edit.instruction


def test_instructions_fit_into_what_t5_reads(edits):
    tokenizer = load_t5_tokenizer(tiny_folder() / "tokenizer_2", 188)
    ids = tokenizer([edit.instruction for edit in edits], 64)
    assert ids.attention_mask.sum(-1).max() <= 32


def test_drawn_edits_are_a_source_with_their_references():
    settings = DataSettings(
        source="edits", references="before", resolution=96, bucket_step=16, scenes=70
    )
    items = edit_items(settings)
    assert len(items) == 70 and len({item.digest for item in items}) == 70
    first = items[0]
    assert first.beside is not None
    pixels, before = (np.asarray(item.read()) for item in (first, first.beside("before")))
    assert (pixels != before).any() and pixels.shape == (96, 96, 3)
    assert "no 'masks'" in first.beside("masks").problem
    assert [item.caption for item in edit_items(settings)] == [item.caption for item in items]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["edit", "fill", "canny"])
def test_the_judge_tells_what_was_asked_for_from_what_was_given(task):
    cases = draw_cases(task, 24, seed=0, **SIDE)
    assert len(cases.prompts) == 24
    assert any(is_held_out(Scene(*e.before)) for e in cases.edits)
    right = judge(cases, cases.wanted, cases.wanted)
    assert all(verdict.asked and verdict.kept for verdict in right)
    given = next(iter(cases.pictures.values()))
    assert not any(verdict.asked for verdict in judge(cases, given, cases.wanted))
    noise = np.random.default_rng(0).uniform(-1, 1, given.shape).astype(np.float32)
    assert not any(verdict.kept for verdict in judge(cases, noise, cases.wanted))


def test_what_instructions_say_is_known_to_the_model_that_edits(edits):
    assert all(outside(edit.instruction, edits=True) == "" for edit in edits)
    assert "never read" in outside("make the star blue") and "goat" in outside("a goat", edits=True)


def test_holes_lie_around_objects_of_scenes_every_other_time():
    size = {"resolution": 96, "bucket_step": 16}
    settings = DataSettings(source="scenes", fill_masks="objects", scenes=128, **size)
    items = scene_items(settings)
    drawn = [np.asarray(item.read()) for item in items]
    masks = [np.asarray(item.beside("objects").read()) for item in items]
    assert all(mask.shape == (96, 96, 3) and set(np.unique(mask)) <= {0, 255} for mask in masks)
    small = np.mean([mask.mean() < 0.3 * 255 for mask in masks])
    assert small > 0.5 and np.mean([mask.mean() > 0.4 * 255 for mask in masks]) > 0.1

    def hides(picture: np.ndarray, mask: np.ndarray) -> bool:
        """Whether an object is gone in a hole that is not much larger than it."""
        parts, count = ndimage.label((picture != picture[0, 0]).any(-1))
        white = mask[:, :, 0] > 0
        each = [parts == part for part in range(1, count + 1)]
        return any(white[one].all() and white.sum() < 8 * one.sum() for one in each)

    plain = [i for i, one in enumerate(drawn) if (one == one[0, 0]).all(-1)[:, [0, -1]].all()]
    assert len(plain) > 50 and 0.4 < np.mean([hides(drawn[i], masks[i]) for i in plain]) < 0.8
    again = scene_items(settings)[5]
    assert (np.asarray(again.beside("objects").read()) == masks[5]).all()
    assert "no 'before'" in again.beside("before").problem
