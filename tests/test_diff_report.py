"""The rows, their verdicts, JSON and plot; pairing of layers by name."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from fluxjax.diff.commands import Live, execute
from fluxjax.diff.layers import Layer, captured, common_name, pair_layers, recorded
from fluxjax.diff.report import (
    Report,
    Row,
    closing_line,
    compare,
    plot_report,
    print_report,
    relative_l2,
    to_json,
)


def test_row_measures_what_numpy_measures():
    a, b = np.array([[3.0, 4.0]]), np.array([[3.0, 5.0]])
    row = compare("x", a, b, bound=0.5)
    assert row.shape == (1, 2) and row.passed and row.verdict == "ok"
    assert row.max_abs == 1.0
    assert row.relative_l2 == pytest.approx(1 / math.sqrt(34))
    assert row.cosine == pytest.approx(29 / (5 * math.sqrt(34)))
    assert not compare("x", a, b, bound=0.1).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_fails(bad):
    assert not compare("x", np.array([bad]), np.array([1.0]), bound=1e9).passed


def test_zero_reference():
    zero = np.zeros(3)
    assert compare("x", zero, zero, bound=1e-5).passed
    assert compare("x", zero, zero, bound=1e-5).cosine == 1.0
    assert relative_l2(np.ones(3), zero) == math.inf


def test_another_shape_fails_and_says_so():
    row = compare("x", np.zeros((2, 3)), np.zeros((3, 2)), bound=1.0)
    assert not row.passed and row.verdict == "ours is (2, 3)"


def report() -> Report:
    one = np.ones(4)
    rows = (
        compare("embed", one, one, bound=1e-5),
        compare("blocks.0.norm", one * 1.1, one, bound=1e-5),
        compare("blocks.1.norm", one * np.nan, one, bound=1e-5, own_error=0.1),
    )
    return Report(title="demo [x]", rows=rows, notes=("a [note]",))


def test_report_names_the_first_failure():
    assert not report().passed
    assert report().first_failure.tensor == "blocks.0.norm"
    assert "2 of 3" in closing_line(report()) and "blocks.0.norm" in closing_line(report())
    assert not Report(title="empty", rows=()).passed


def test_printed_table_holds_every_row(capsys):
    print_report(report(), Console(width=120))
    out = capsys.readouterr().out
    assert "blocks.1.norm" in out and "demo [x]" in out and "a [note]" in out
    assert "1.00e-01" in out and "FAIL" in out


def test_json_is_strict():
    def reject(constant):
        raise AssertionError(constant)

    (parsed,) = json.loads(to_json([report()]), parse_constant=reject)
    assert parsed["first_failure"] == "blocks.0.norm" and not parsed["passed"]
    assert parsed["rows"][2]["relative_l2"] is None
    assert parsed["rows"][1]["relative_l2"] == pytest.approx(0.1)


def test_what_was_found_is_printed_also_where_the_plot_cannot_be_written(tmp_path, capsys):
    class Known(Live):
        def reports(self):
            return [report()]

    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        execute(Known(plot=tmp_path / "file" / "errors.png"))
    assert report().title in capsys.readouterr().out


def test_plot_is_a_picture(tmp_path):
    plot_report(report(), tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("transformer_blocks.0.attn.to_out.0", "transformer_blocks_0/attn/to_out_0"),
        ("text_model.encoder.layers.1.mlp", "encoder/layers_1/mlp"),
        ("encoder.embed_tokens", "shared"),
    ],
)
def test_names_meet(theirs, ours):
    assert common_name(theirs) == common_name(ours)


def test_names_stay_whole_where_there_is_no_terminal():
    name = "encoder.block.23.layer.1.DenseReluDense.wi_0." * 3
    row = Row(tensor=name, shape=(1,), max_abs=1e-7, relative_l2=1e-7, cosine=1.0, bound=1e-5)
    output = io.StringIO()
    print_report(Report(title="a comparison", rows=(row,)), Console(file=output, width=80))
    assert name in output.getvalue() and "0.99999…" not in output.getvalue()


class _Twice(torch.nn.Module):
    """A module used twice, a tuple, a picture."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 1)
        self.act = torch.nn.SiLU()
        self.split = _Split()

    def forward(self, x):
        return self.split(self.act(self.act(self.conv(x))).flatten(2))


class _Split(torch.nn.Module):
    def forward(self, x):
        return x[:, :, :4], x[:, :, 4:]


def test_hooks_record_calls_in_order_and_channels_last():
    model = _Twice()
    with recorded(model) as layers:
        model(torch.randn(2, 3, 2, 6))
    model(torch.randn(2, 3, 2, 6))
    assert [(x.name, x.call) for x in layers] == [("conv", 0), ("act", 0), ("act", 1), ("split", 0)]
    assert layers[0].outputs[0].shape == (2, 2, 6, 5)
    assert [x.shape for x in layers[3].outputs] == [(2, 5, 4), (2, 5, 8)]


def test_pairs_join_and_reorder_streams():
    text, image = np.zeros((1, 2, 4)), np.ones((1, 3, 4))
    joint = np.concatenate([text, image], axis=1)
    reference = [
        Layer("blocks.0", 0, (text, image)),
        Layer("single.0", 0, (text, image)),
        Layer("dropout", 0, (text,)),
        Layer("heads", 0, (image.reshape(1, 3, 2, 2),)),
    ]
    ours = captured(
        {
            "blocks_0": {"__call__": (((image, text), None),)},
            "single_0": {"__call__": (joint,)},
            "heads": {"__call__": (image,)},
            "__call__": (joint,),
        }
    )
    pairs = pair_layers(reference, ours)
    assert [p.name for p in pairs] == ["blocks.0 [0]", "blocks.0 [1]", "single.0", "heads"]
    for pair in pairs:
        np.testing.assert_array_equal(pair.ours, pair.expected)
