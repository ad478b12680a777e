"""`python -m fluxjax.diff golden`: recorded outputs of the original PyTorch code."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxjax.config import ConfigError
from fluxjax.diff.commands import Golden, execute
from fluxjax.diff.golden import check_golden

BFL = ("autoencoder", "flux_dev", "flux_schnell", "flux_kontext", "flux_fill")


@pytest.mark.parametrize("name", BFL)
def test_recorded_networks(shared, name):
    report, outputs = check_golden(shared / "goldens" / f"bfl_{name}.safetensors")
    assert report.passed, report.first_failure
    recorded = load_file(shared / "goldens" / f"bfl_{name}.safetensors")
    expected = {key for key in recorded if key.startswith("outputs.")}
    assert outputs.keys() == expected and expected <= {row.tensor for row in report.rows}
    bounds = {row.tensor: row.bound for row in report.rows}
    assert bounds.get("outputs.forward", 1e-5) == 1e-5
    assert bounds["outputs.latents"] == (1e-5 if name == "autoencoder" else 1e-4)


def test_recorded_schedules(shared):
    report, _ = check_golden(shared / "goldens" / "bfl_schedules.json")
    assert report.passed and len(report.rows) == 50


def _rewritten(source, target, change):
    """A copy of a recording after `change(tensors)`."""
    from safetensors import safe_open

    with safe_open(source, "np") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, target, metadata)
    return target


def test_wrong_weights_fail_and_outputs_are_saved(shared, tmp_path, capsys):
    def swap(tensors):
        name = "weights.final_layer.adaLN_modulation.1.weight"
        tensors[name] = np.roll(tensors[name], len(tensors[name]) // 2, axis=0)

    source = shared / "goldens" / "bfl_flux_schnell.safetensors"
    wrong = _rewritten(source, tmp_path / "wrong.safetensors", swap)
    save = tmp_path / "ours.safetensors"
    assert execute(Golden(files=(source,), save=save, json=True)) == 0
    (parsed,) = json.loads(capsys.readouterr().out)
    assert parsed["passed"] and parsed["rows"][0]["bound"] == 1e-5
    ours, recorded = load_file(save), load_file(source)
    assert ours.keys() == {name for name in recorded if name.startswith("outputs.")}
    np.testing.assert_allclose(ours["outputs.latents"], recorded["outputs.latents"], atol=1e-4)
    assert execute(Golden(files=(wrong,))) == 1
    assert "FAIL" in capsys.readouterr().out


def test_other_families_are_refused(tmp_path):
    tensors, path = {"outputs.x": np.zeros(2, np.float32)}, tmp_path / "other.safetensors"
    save_file(tensors, path, {"config": '{"source": "somebody/else"}'})
    with pytest.raises(ConfigError, match=r"somebody/else.*does not support"):
        check_golden(path)


def test_missing_tensors_are_named(shared, tmp_path):
    source = shared / "goldens" / "bfl_flux_schnell.safetensors"
    for lost in ("inputs.vec", "weights.img_in.bias"):
        broken = _rewritten(source, tmp_path / "broken.safetensors", lambda t, k=lost: t.pop(k))
        match = "inputs.vec" if lost == "inputs.vec" else "x_embedder.bias"
        with pytest.raises(ValueError, match=match):
            check_golden(broken)


def test_no_recording(tmp_path):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="is no recording"):
        check_golden(tmp_path / "plain.safetensors")
    (tmp_path / "plain.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no recording"):
        check_golden(tmp_path / "plain.json")
    with pytest.raises(ValueError, match="one FILE"):
        execute(Golden(files=(tmp_path / "a", tmp_path / "b"), save=tmp_path / "c"))


# Each tiling once; the others of these files take as many programs again.
CLIPS = {
    "hunyuan_vae": ("latents_tiled", "video_tiled"),
    "opensora_vae": ("latents_tiled", "video_tiled", "video_spatially_tiled", "image_latents"),
    "opensora_dc_ae": ("latents_tiled",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_recorded_autoencoders_of_clips(shared, tmp_path, name):
    def fewer(tensors):
        for left_out in CLIPS[name]:
            del tensors[f"outputs.{left_out}"]

    path = _rewritten(shared / f"goldens/{name}.safetensors", tmp_path / "a.safetensors", fewer)
    report, outputs = check_golden(path)
    assert report.passed, report.first_failure
    assert len(report.rows) == len(outputs) >= 4
    assert all(row.bound == 1e-5 for row in report.rows)
