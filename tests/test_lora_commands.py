"""Every recorded adapter through the commands: merged by `convert`, drawn with by `sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_lora_dialects import COMPONENTS, DIALECTS, golden_file

import fluxjax
from fluxjax.checkpoint.engine import from_tree
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import ConfigError
from fluxjax.convert.__main__ import main as convert
from fluxjax.hub import tiny_folder
from fluxjax.models.names import flatten, unflatten
from fluxjax.sample.__main__ import main as sample
from fluxjax.sample.opened_model import OpenedModel
from fluxjax.sample.options import Options
from fluxjax.sample.picture_jobs import Job, picture_jobs
from fluxjax.sample.prompts_file import read_prompts
from fluxjax.sample.sources import Sources

Weights = dict[str, np.ndarray]
"""By component and name, as the recordings have them."""
pytestmark = pytest.mark.slow
OTHERS = [dialect for dialect in DIALECTS if dialect != "bfl_control"]
GROUPS = [("bfl_control",), *(tuple(OTHERS[start::3]) for start in range(3))]
"""Several at once, as each takes a conversion; the control adapter makes another model."""


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Path:
    return shared / "goldens" / "lora"


@pytest.fixture(scope="module")
def model(goldens: Path, tmp_path_factory) -> Path:
    """The embedded model with the recorded weights in their places."""
    folder = tmp_path_factory.mktemp("base") / "model"
    assert convert([str(tiny_folder()), str(folder), "--dtype", "float32"]) == 0
    recorded = read_safetensors(goldens / "base.safetensors")[0]
    for component in COMPONENTS:
        (file,) = (folder / component).glob("*.safetensors")
        tensors, metadata = read_safetensors(file)
        used = {name: recorded.get(_key(component, name), old) for name, old in tensors.items()}
        arrays = {name: of_array(one.read().astype(np.float32)) for name, one in used.items()}
        write_safetensors(file, arrays, metadata)
    return folder


@pytest.fixture(scope="module")
def before(model: Path) -> Weights:
    return _weights(model)


@pytest.fixture(scope="module")
def expected(goldens: Path) -> Weights:
    tensors = read_safetensors(goldens / "expected.safetensors")[0]
    return {name: tensor.read() for name, tensor in tensors.items()}


def _key(component: str, name: str) -> str:
    return name if component == "transformer" else f"{component}/{name}"


def _weights(folder: Path) -> Weights:
    networks = open_source(folder)
    return {
        _key(component, name): tensor.read()
        for component in COMPONENTS
        for name, tensor in networks[component].tensors.items()
    }


@pytest.mark.parametrize("dialects", GROUPS, ids=lambda dialects: f"{dialects[0]}-{len(dialects)}")
def test_all_of_the_files_are_used(goldens, model, before, expected, dialects, tmp_path) -> None:
    """`convert` adds what was recorded of each, and nothing else; what `sample` loads is the same,
    in the weights or beside them, and so is the picture that it draws."""
    files = [golden_file(goldens, dialect) for dialect in dialects]
    options = [f"--lora={file}" for file in files]
    assert convert([str(model), str(tmp_path / "out"), "--dtype", "float32", *options]) == 0
    after, probe, touched = _weights(tmp_path / "out"), expected["probe"], set()
    for key, new in after.items():
        names = [
            f"{dialect}|{key}{end}" for dialect in dialects for end in ("", "|probe", "|value")
        ]
        names = [name for name in names if name in expected]
        touched.update(names)
        if names and names[0].endswith("|value"):
            np.testing.assert_array_equal(new, expected[names[0]], err_msg=key)
            continue
        old = before[key]
        if not names:
            np.testing.assert_array_equal(new, old, err_msg=key)
            continue
        if new.shape != old.shape:
            old = np.pad(old, ((0, 0), (0, new.shape[1] - old.shape[1])))
        wanted = [_probed(name, expected[name], probe) for name in names]
        got = _probed(key, new.astype(np.float64) - old, probe)
        relative = 1e-4 if "oft_kohya" in dialects else 1e-5
        bound = relative * max(np.abs(one).max() for one in wanted)
        np.testing.assert_allclose(got, sum(wanted), rtol=0, atol=bound, err_msg=key)
    assert touched == {key for key in expected if key.split("|")[0] in dialects}
    pipe = fluxjax.load_pipeline(model, loras=files, scan_layers=False)
    loaded = {
        _key(component, name): tensor.read()
        for component in COMPONENTS
        for name, tensor in from_tree(_with_products(pipe.params(component))).items()
    }
    assert loaded.keys() == after.keys()
    for key, new in after.items():
        np.testing.assert_allclose(loaded[key], new, rtol=0, atol=5e-6, err_msg=key)
    control = tmp_path / "control.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(control)
    given = ["--control", str(control)] if "bfl_control" in dialects else []
    merged = _drawn(tmp_path / "merged.png", tmp_path / "out", *given)
    beside = _drawn(tmp_path / "beside.png", model, *options, *given)
    assert np.abs(merged - beside).max() <= 1
    if not given:
        assert np.abs(merged - _drawn(tmp_path / "plain.png", model)).max() > 20


def test_a_line_is_what_its_own_adapters_make_of_it(goldens, tmp_path) -> None:
    """Of a file of prompts: one with a control LoRA draws from a control picture, with the guidance
    of that, the others from text; what a later line lacks is said before the first picture."""
    file = str(golden_file(goldens, "bfl_control"))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "control.png")
    controlled = {"prompt": "a star", "lora": file, "control": "control.png"}
    lines = tmp_path / "lines.jsonl"
    options = Options(prompts=lines, model=str(tiny_folder()), seed=1, record=False)

    def jobs(*lines_: dict[str, Any]) -> list[Job]:
        lines.write_text("\n".join(map(json.dumps, lines_)))
        opened = OpenedModel(options, Sources(model=options.model), None)
        return picture_jobs(options, {}, read_prompts(lines), (), opened.pipeline)

    found = jobs({"prompt": "a"}, controlled, {"prompt": "b"}, {**controlled, "guidance": 2})
    assert [job.settings.guidance for job in found] == [3.5, 30.0, 3.5, 2.0]
    assert [bool(job.lora) for job in found] == [False, True, False, True]
    with pytest.raises(ConfigError, match=r"lines.jsonl, line 2: this model draws from a control"):
        jobs({"prompt": "a"}, {"prompt": "b", "lora": file})


def _drawn(out: Path, model: Path, *options: str) -> np.ndarray:
    settings = "a red circle --width 64 --height 64 --steps 2 --max-sequence-length 16 --seed 1"
    assert sample([*settings.split(), f"--model={model}", f"--out={out}", *options]) == 0
    return np.asarray(Image.open(out), int)


def _probed(name: str, delta: np.ndarray, probe: np.ndarray) -> np.ndarray:
    return delta if name.endswith("|probe") or delta.ndim != 2 else delta @ probe[: delta.shape[1]]


def _with_products(variables):
    """Parameters with the adapters that lie beside them."""
    params, lora = flatten(variables.get("params", variables)), flatten(variables.get("lora", {}))
    for module in {path[:-1] for path in lora}:
        a, b, scale = (np.asarray(lora[*module, leaf]) for leaf in ("a", "b", "scale"))
        params[*module, "kernel"] = np.asarray(params[*module, "kernel"]) + a @ b * scale
    return unflatten(params)
