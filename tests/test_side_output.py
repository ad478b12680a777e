"""A plot, a sheet, recorded outputs replace their own kind and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fluxjax.diff.commands import Golden, Live
from fluxjax.diff.golden import save_outputs
from fluxjax.diff.report import Report, Row, plot_report
from fluxjax.sample.picture_formats import encode_picture
from fluxjax.side_output import check_side_output, marker, side_output
from fluxjax.train.embedded.captioned_sheet import write_sheet
from fluxjax.train.embedded.evaluate import evaluate
from fluxjax.train.embedded.evaluate_settings import EvaluateSettings

PIXELS = np.zeros((1, 8, 8, 3), np.uint8)


def write_plot(path: Path) -> None:
    row = Row(tensor="a", shape=(1,), max_abs=1e-7, relative_l2=1e-7, cosine=1.0, bound=1e-5)
    plot_report(Report(title="a comparison", rows=(row,)), path)


def write_outputs(path: Path) -> None:
    save_outputs(path, {"outputs.a": np.ones(3, np.float32)})


WRITERS = {
    "plot": (write_plot, "a.png"),
    "sheet": (lambda path: write_sheet(path, [*PIXELS], ["a"]), "a.png"),
    "outputs": (write_outputs, "a.safetensors"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_only_its_own_kind_is_replaced(tmp_path: Path, kind) -> None:
    write, name = WRITERS[kind]
    path = tmp_path / name
    write(path)
    first = path.read_bytes()
    write(path)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == [name]
    others = {"notes": lambda p: p.write_text("mine"), "folder": Path.mkdir}
    drawn = encode_picture(Image.fromarray(PIXELS[0]), ".png", {"settings": {}})
    others["picture"] = lambda p: p.write_bytes(drawn)
    others["theirs"] = lambda p: Image.fromarray(PIXELS[0]).save(p, format="PNG")
    others |= {k: w for k, (w, n) in WRITERS.items() if k != kind and n == name}
    for other, make in others.items():
        path = tmp_path / other / name
        path.parent.mkdir()
        make(path)
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(FileExistsError, match="is not overwritten"):
            write(path)
        assert (path.read_bytes() if path.is_file() else b"") == before
        assert [p.name for p in path.parent.iterdir()] == [name]


def test_commands_refuse_before_they_work(tmp_path: Path) -> None:
    """Their other arguments would fail later."""
    path = tmp_path / "thesis.png"
    path.write_text("mine")
    nowhere = tmp_path / "no model"
    with pytest.raises(FileExistsError, match=r"thesis\.png"):
        Live(folder=str(nowhere), plot=path).reports()
    with pytest.raises(FileExistsError, match=r"thesis\.png"):
        evaluate(EvaluateSettings(model=str(nowhere), sheet=path))
    with pytest.raises(ValueError, match=r"thesis\.png: .* ends in \.safetensors"):
        Golden(files=(nowhere,), save=path).reports()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_side_output(tmp_path / "none" / "a.png", "plot")
    assert path.read_text() == "mine"


def test_a_writer_that_forgets_the_marker_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), side_output(tmp_path / "a.png", "plot") as part:
        Image.fromarray(PIXELS[0]).save(part, format="PNG")
    assert not list(tmp_path.iterdir())


def test_a_marker_elsewhere_is_no_marker(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", str(marker("plot")))
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(FileExistsError):
        check_side_output(tmp_path / "a.png", "plot")
