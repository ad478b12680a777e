"""Sheets of pictures: every pixel is there, apart from its neighbours, with its caption below."""

import numpy as np
import pytest

from fluxjax.picture_sheet import GAP, picture_sheet


def coloured(height, width, colour):
    return np.full((height, width, 3), colour, np.uint8)


def test_pictures_of_several_sizes_lie_in_equal_cells_with_gaps():
    pictures = [coloured(8, 12, 10), coloured(6, 4, 90), coloured(8, 12, 170)]
    sheet = picture_sheet(pictures)
    assert sheet.shape == (2 * (8 + GAP) + GAP, 2 * (12 + GAP) + GAP, 3)
    places = ((GAP, GAP), (GAP, 12 + 2 * GAP), (8 + 2 * GAP, GAP))
    for picture, (top, left) in zip(pictures, places, strict=True):
        height, width, _ = picture.shape
        np.testing.assert_array_equal(sheet[top : top + height, left : left + width], picture)
    # Between two neighbours lie the outline of each and white.
    assert [int(value) for value in sheet[GAP, 12 + GAP : 12 + 2 * GAP, 0]] == [210, 255, 255, 210]


def test_a_white_picture_has_an_edge():
    sheet = picture_sheet([coloured(8, 8, 255)])
    edge = sheet[GAP - 1 : GAP + 9, GAP - 1 : GAP + 9]
    assert (edge[0] == 210).all() and (edge[:, -1] == 210).all() and (edge[1:-1, 1:-1] == 255).all()


@pytest.mark.parametrize(("number", "columns", "shape"), [(5, 6, (1, 5)), (5, 2, (3, 2))])
def test_columns(number, columns, shape):
    sheet = picture_sheet([coloured(6, 6, 0)] * number, columns=columns)
    assert sheet.shape[:2] == tuple(n * (6 + GAP) + GAP for n in shape)


def test_captions_stand_below_their_picture_and_are_wrapped():
    pictures = [coloured(20, 120, 0)] * 2
    short = picture_sheet(pictures, captions=["", "one"])
    long = picture_sheet(pictures, captions=["", "as many words as need three lines"])
    assert short.shape[1] == long.shape[1] == 2 * (120 + GAP) + GAP
    assert long.shape[0] > short.shape[0] > 20 + 2 * GAP
    below = long[20 + GAP + 1 :]
    ink = (below < 200).any((0, 2))
    assert not ink[: 120 + GAP].any(), "the empty caption"
    assert ink[120 + 2 * GAP :].any() and not ink[-GAP:].any()
