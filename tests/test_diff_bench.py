"""`python -m fluxjax.diff bench`: turns, medians, and that both sides do the same work."""

import json

import jax
import pytest
import torch
from rich.console import Console

from fluxjax.diff.benchmarks import bench
from fluxjax.diff.benchmarks.bench import Measure, medians, print_measures
from fluxjax.diff.benchmarks.clips import clips
from fluxjax.diff.benchmarks.diffusion_networks import sampling_steps, training_steps, unet
from fluxjax.diff.benchmarks.tools import tools
from fluxjax.diff.benchmarks.wide_transformer import quantised_transformer, wide_transformer
from fluxjax.diff.commands import Bench, execute
from fluxjax.hub import tiny_folder


def test_sides_take_turns():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = medians(sides, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert seconds.keys() == set("abc") and all(value >= 0 for value in seconds.values())


def test_ratio_above_one_is_faster(capsys):
    measure = Measure(what="work", ours=2.0, theirs=3.0, beside="other", wanted="1.3")
    assert measure.ratio == 1.5 and Measure(what="alone", ours=1.0).ratio is None
    print_measures([measure], Console(width=120))
    out = capsys.readouterr().out
    assert "1.50" in out and "2 s" in out and "other" in out


@pytest.mark.slow
def test_both_transformers_compute_the_same():
    (measure,) = wide_transformer(1, heads=1)
    assert "width 128" in measure.what
    apart = float(measure.what.split("apart by ")[1].rstrip(")"))
    assert 0 < apart < 1e-5


@pytest.mark.slow
def test_both_networks_of_clips_compute_the_same():
    for measure, width in zip(clips(1, 1, (32, 32, 32, 32)), (128, 32), strict=True):
        assert f"of width {width}," in measure.what
        apart = float(measure.what.split("apart by ")[1].rstrip(")"))
        assert 0 < apart < 1e-5


@pytest.mark.slow
def test_both_diffusion_networks_compute_the_same():
    small = unet(1, 8, (32, 64))
    (measure,) = sampling_steps(1, (small,))
    apart = float(measure.what.split("apart by ")[1].rstrip(")"))
    assert 0 < apart < 1e-5
    (measure,) = training_steps(1, ((small, True),))
    assert measure.what.endswith("LoRA of rank 16") and measure.ours > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")  # diffusers' own
def test_both_draw_the_same_with_a_tool():
    for measure in tools(tiny_folder(), 1, ("ControlNet", "IP-Adapter")):
        share = float(measure.what.split("(")[1].split("%")[0])
        assert share >= 99.9, measure.what


@pytest.mark.slow
def test_both_quantised_transformers_compute_about_the_same():
    measures = {m.what.split()[0]: m for m in quantised_transformer(1, heads=1)}
    assert measures.keys() == {"int8_dynamic", "int8", "bfloat16", "float32"}
    for name, measure in measures.items():
        apart = float(measure.what.split("apart by ")[1].rstrip(")"))
        assert (0 < apart < 1e-5) == (name == "float32") and apart < 0.2, measure.what


def test_json_and_refusals(monkeypatch, capsys, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "attention", lambda rounds: [Measure(what=str(rounds), ours=1.0)])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert execute(Bench(only=("attention",), rounds=7, threads=threads, json=True)) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["what"] == "7" and row["ratio"] is None
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            execute(Bench(only=("gpu",)))
    with pytest.raises(ValueError, match="at least 1"):
        execute(Bench(rounds=0))
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        execute(Bench(folder=str(tmp_path / "nothing"), only=("attention",)))
