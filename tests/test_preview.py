"""Previews: what the latents promise, by a linear map or the decoder, in a file that goes again."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import fluxjax
from fluxjax.config import AutoencoderConfig
from fluxjax.sample import preview
from fluxjax.sample.preview import FLUX, Preview, is_published, linear_map, preview_file

PROMPT = "a large red circle on a white background"


@pytest.fixture(scope="module")
def pipe():
    return fluxjax.load_pipeline("tiny")


def drawn(pipe, every: int, **options) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    settings = replace(pipe.defaults, prompt=PROMPT, seed=3, steps=8, width=64, height=64)
    shown: list[tuple[int, np.ndarray]] = []
    look = Preview(pipe, settings, 3, lambda step, p: shown.append((step, p)), **options)
    (picture,) = pipe.draw(settings, on_step=look, every=every)
    return picture, shown


def away(one: np.ndarray, other: np.ndarray) -> float:
    """Mean distance of colours, of pictures averaged over cells of 8 x 8."""
    cells = (x.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)) for x in (one, other))
    return float(np.abs(np.subtract(*cells)).mean())


@pytest.mark.slow
def test_previews_come_nearer_and_the_last_is_the_picture(pipe):
    picture, shown = drawn(pipe, 3)
    assert [step for step, _ in shown] == [3, 6, 8]
    assert all(pictures.shape == (1, 64, 64, 3) for _, pictures in shown)
    distances = [away(pictures[0], picture) for _, pictures in shown]
    assert distances[-1] < 35 and distances[-1] < away(255 - picture, picture) / 3
    plain, _ = drawn(pipe, 8)
    np.testing.assert_array_equal(picture, plain)
    picture, shown = drawn(pipe, 4, decoder=True)
    assert [step for step, _ in shown] == [4, 8]
    assert np.abs(shown[-1][1][0].astype(int) - picture).max() <= 1, "the last is the picture"


def test_the_map_of_an_autoencoder_is_fitted_and_flux_has_its_own(pipe):
    assert not is_published(pipe.config.vae) and is_published(AutoencoderConfig())
    assert FLUX.factors.shape == (16, 3)
    fitted = linear_map(pipe)
    colours = np.array([[-1, -1, -1], [1, -1, -1], [1, 1, 1], [-1, 1, 0.0]], np.float32)
    pictures = np.broadcast_to(colours[:, None, None], (4, 96, 96, 3))
    found = fitted(pipe.encode_pictures(pictures)).mean(axis=(1, 2))
    assert np.abs(found - colours).mean() < 0.25
    assert np.abs(fitted(np.zeros((1, 16, 2, 2))) - fitted.bias).max() == 0


def test_one_file_is_replaced_and_removed(tmp_path):
    kept = tmp_path / "star-7.preview.png"
    kept.write_text("somebody's")
    with preview_file(tmp_path / "star-7.png") as show:
        for value in (10, 20):
            show(value, np.full((1, 16, 24, 3), value, np.uint8))
            (file,) = (path for path in tmp_path.iterdir() if path != kept)
            assert file.name == "star-7.preview-2.png"
            assert np.asarray(Image.open(file))[0, 0, 0] == value
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    with pytest.raises(KeyboardInterrupt), preview_file(tmp_path / "a.png") as show:
        show(1, np.zeros((2, 16, 16, 3), np.uint8))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_a_full_disk_ends_no_run(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preview, "write_new", full)
    with preview_file(tmp_path / "a.png") as show:
        for step in range(2):
            show(step, np.zeros((1, 16, 16, 3), np.uint8))
    assert capsys.readouterr().err.count("no preview is written") == 1


@pytest.mark.slow
def test_the_command_writes_previews_and_draws_the_same_picture(tmp_path, monkeypatch, capsys):
    from fluxjax.sample.command import draw
    from fluxjax.sample.options import Options

    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    shown = []
    usual = preview.write_bytes
    monkeypatch.setattr(
        preview, "write_bytes", lambda path, data: (shown.append(path), usual(path, data))
    )
    size = {"steps": 8, "width": 64, "height": 64, "seed": 3}
    for name, options in (("with", {"preview": 2}), ("without", {})):
        assert draw(Options(prompt=(PROMPT,), out=tmp_path / f"{name}.png", **size, **options)) == 0
    assert [path.name for path in shown] == ["with.preview.png"] * 3, "after one that was new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["with.png", "without.png"]
    one, other = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("with", "without"))
    np.testing.assert_array_equal(one, other)
