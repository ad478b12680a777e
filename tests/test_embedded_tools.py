"""The embedded model with a tool that it has learnt: chosen, opened, repeated; and how such a tool
is taken out of a whole checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from random_checkpoints import read_arrays
from scipy import ndimage

import fluxjax
from fluxjax import hub
from fluxjax.checkpoint.lora.merge import merge_files
from fluxjax.checkpoint.pipeline_folder import read_config, sampling_defaults, write_json
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import TINY, ConfigError
from fluxjax.convert.__main__ import main as convert
from fluxjax.convert.difference import low_rank_factors
from fluxjax.sample.__main__ import main as sample
from fluxjax.sample.embedded_tools import TOOLS, require_tool, with_tool
from fluxjax.sample.given_options import check, given_settings
from fluxjax.sample.options import Options
from fluxjax.sample.picture_formats import read_record
from fluxjax.sample.pictures import to_bytes
from fluxjax.sample.sources import Sources
from fluxjax.train.embedded.colours import COLOURS
from fluxjax.train.embedded.evaluate import reconstruct_pictures
from fluxjax.train.embedded.evaluate_settings import EvaluateSettings
from fluxjax.train.embedded.evaluate_tools import evaluate_tool
from fluxjax.train.embedded.reader import read

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
CLASSES = {"tiny-canny": "FluxControlPipeline", "tiny-fill": "FluxFillPipeline"}
RANK = 4


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Ship tools of these names, for the choice alone: their files are empty."""

    def ship(*names: str) -> None:
        folder = tmp_path / "assets"
        folder.mkdir()
        (folder / "tiny").symlink_to(hub.tiny_folder())
        for name in names:
            (folder / f"{name}.safetensors").touch()
        monkeypatch.setattr(hub, "_ASSETS", folder)

    return ship


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "tiny"),
        ({"image": "a.png", "strength": 0.5}, "tiny"),
        ({"reference": "a.png"}, "tiny-edit"),
        ({"reference": "a.png", "mask": "b.png"}, "tiny-edit"),
        ({"image": "a.png", "mask": "b.png"}, "tiny-fill"),
        ({"image": "a.png", "expand": (0, 0, 32, 0)}, "tiny-fill"),
        ({"image": "a.png", "mask": "b.png", "strength": 0.7}, "tiny"),
        ({"image": "a.png", "mask": "b.png", "soft_mask": True}, "tiny"),
        ({"image": "a.png", "mask": "b.png", "strength": 0.7, "noise_mask": True}, "tiny-fill"),
        ({"control": "a.png"}, "tiny-canny"),
        ({"control": "a.png", "image": "b.png", "mask": "c.png"}, "tiny-canny"),
    ],
)
def test_what_is_given_decides_about_the_tool(shipped, given, wanted):
    shipped(*TOOLS.values())
    said: list[str] = []
    assert with_tool(Sources(), [given], said.append).model == wanted
    assert len(said) == (wanted != "tiny") and all(f"--model {wanted} " in text for text in said)
    for own in (
        Sources(model="/models/dev"),
        Sources(model="tiny-canny"),
        Sources(lora=("/a.safetensors:1",)),
        Sources(controlnet=("/union:1",)),
    ):
        assert with_tool(own, [given], pytest.fail) == own
    assert with_tool(Sources(), [given, given], said.append).model == wanted
    if "control" in given:
        with pytest.raises(ConfigError, match=r"some have a control .* --model tiny-canny draws"):
            with_tool(Sources(), [given, {}], pytest.fail)
    elif wanted != "tiny":
        assert with_tool(Sources(), [given, {}], pytest.fail).model == "tiny"


def test_a_tool_that_is_not_shipped_is_not_known(shipped, monkeypatch):
    shipped("tiny-edit")
    given = {"control": "a.png"}
    assert with_tool(Sources(), [given], pytest.fail) == Sources()
    with pytest.raises(FileNotFoundError, match=r"there is no model folder .*tiny-canny"):
        check(Options(prompt=("a",), model="tiny-canny"))
    with pytest.raises(FileNotFoundError, match="did you mean tiny-edit"):
        check(Options(prompt=("a",), model="tiny-edti"))
    check(Options(prompt=("a",), model="tiny-edit"))
    require_tool(Sources(), {"control"})
    with pytest.raises(ConfigError, match=r'load_pipeline\("tiny-edit"\) draws with a reference'):
        require_tool(Sources(), {"reference"})
    require_tool(Sources(lora=("/a.safetensors:1",)), {"reference"})


def test_tools_are_measured_by_what_has_learnt_them(shipped):
    shipped("tiny-edit", "tiny-fill")
    assert EvaluateSettings(task="edit").opened == "tiny-edit"
    assert EvaluateSettings(task="fill", model="tiny").opened == "tiny-fill"
    assert EvaluateSettings(task="text").opened == "tiny"
    assert EvaluateSettings(task="canny").opened == "tiny"
    assert EvaluateSettings(task="edit", model="out").opened == "out"
    assert EvaluateSettings(task="edit", lora=("a.safetensors",)).opened == "tiny"


@pytest.mark.parametrize("name", [n for n in TOOLS.values() if hub.embedded_adapter(n)])
def test_shipped_tools_open(name):
    config = fluxjax.load_pipeline(name).config
    assert config.class_name == CLASSES.get(name, "FluxPipeline")
    assert config.noise_mask == (name == "tiny-fill")
    assert (config.steps, config.guidance, config.width) == (TINY.steps, TINY.guidance, TINY.width)


@pytest.mark.parametrize(
    ("words", "wanted"), [((), None), (("--noise-mask",), True), (("--no-noise-mask",), False)]
)
def test_a_noise_mask_is_the_models_own_unless_given(words, wanted):
    assert given_settings(tyro.cli(Options, args=["a", *words]))["noise_mask"] is wanted


@pytest.mark.slow
def test_the_filled_hole_leaves_the_rest_as_the_autoencoder_has_it(tmp_path, monkeypatch):
    """By default, in `train evaluate` too; and what is told otherwise repeats otherwise."""
    monkeypatch.chdir(tmp_path)
    pipe = fluxjax.load_pipeline("tiny-fill")
    asked = EvaluateSettings(task="fill", prompts=4, batch=1)
    found = evaluate_tool(pipe, "fill", asked)
    counts = found.counts()["model"]
    assert counts["kept"] == 4 and counts["asked for"] >= 3
    shown = {name: to_bytes(values[:1])[0] for name, values in found.cases.pictures.items()}
    for name, picture in shown.items():
        Image.fromarray(picture).save(f"{name}.png")
    (rebuilt,) = to_bytes(reconstruct_pictures(pipe, found.cases.pictures["image"][:1], batch=1))
    hole = shown["mask"][..., 0] > 127
    far = np.logical_not(ndimage.binary_dilation(hole, iterations=16))
    apart = {}
    for noise_mask in (None, False):
        chosen = {"image": "image.png", "mask": "mask.png", "noise_mask": noise_mask}
        (picture,) = pipe(found.cases.prompts[0], seed=3, **chosen)
        path = fluxjax.save_picture(picture, "drawn.png")
        assert read_record(path)["settings"]["noise_mask"] is (noise_mask is None)
        drawn = np.asarray(picture, int)
        apart[noise_mask] = np.abs(drawn - rebuilt)[far].mean()
        assert np.abs(drawn - rebuilt)[hole].mean() > 10
        assert sample(["--like", str(path), "--out", "again.png"]) == 0
        again = np.asarray(Image.open("again.png"), int)
        np.testing.assert_array_equal(again, drawn)
        Path("again.png").unlink()
    assert apart[None] < 0.7 * apart[False]


@pytest.mark.slow
def test_a_reference_is_edited_as_it_is_told(tmp_path, monkeypatch, capsys):
    """Held-out edits, and one that a newcomer asks for: the reference picks what has learnt it."""
    monkeypatch.chdir(tmp_path)
    asked = EvaluateSettings(task="edit", prompts=24)
    counts = evaluate_tool(fluxjax.load_pipeline("tiny-edit"), "edit", asked).counts()["model"]
    assert counts["asked for"] >= 19 and counts["both"] >= 14, "22, 19 measured"
    assert sample(["a red circle", "--seed", "3", "--out", "before.png"]) == 0
    words = ["make it blue", "--reference", "before.png", "--seed", "1", "--out", "after.png"]
    assert sample(words) == 0
    assert "--model tiny-edit draws this" in capsys.readouterr().err
    before, after = (
        read(np.asarray(Image.open(f"{name}.png"), np.float32) / 127.5 - 1).objects
        for name in ("before", "after")
    )
    assert [list(COLOURS)[one.colour] for one in (*before, *after)] == ["red", "blue"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The embedded model as if it had learnt to follow edges: every matrix changed by a product of
    RANK, all else and the wider first layer altogether."""
    folder = tmp_path_factory.mktemp("tuned") / "canny"
    shutil.copytree(hub.tiny_folder(), folder)
    arrays, rng = read_arrays(folder / WEIGHTS), np.random.default_rng(0)
    for name, old in arrays.items():
        new = np.asarray(old, np.float32)
        if name == "x_embedder.weight":
            new = np.concatenate([new, 0.1 * rng.standard_normal(new.shape, np.float32)], axis=1)
        if new.ndim > 1 and name != "x_embedder.weight":
            out, columns = new.shape
            factors = rng.standard_normal((out, RANK)), rng.standard_normal((RANK, columns))
            arrays[name] = new + (0.01 * factors[0] @ factors[1]).astype(np.float32)
        else:
            arrays[name] = new + 0.01 * rng.standard_normal(new.shape, np.float32)
    write_safetensors(folder / WEIGHTS, {name: of_array(a) for name, a in arrays.items()})
    config = json.loads((folder / "transformer" / "config.json").read_text())
    write_json(folder / "transformer" / "config.json", {**config, "in_channels": 128})
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", {**index, "_class_name": "FluxControlPipeline"})
    return folder


@pytest.fixture(scope="module")
def adapter(tuned, tmp_path_factory):
    file = tmp_path_factory.mktemp("adapter") / "tiny-canny.safetensors"
    asked = ["--difference-from", str(hub.tiny_folder()), "--rank", str(RANK)]
    assert convert([str(tuned), str(file), *asked]) == 0
    return file


@pytest.mark.slow
def test_base_and_extracted_adapter_are_the_tuned_model(tuned, adapter, tmp_path, capsys):
    merged, defaults = merge_files(open_source(hub.tiny_folder()), [(adapter, 1.0)])
    expected = open_source(tuned)["transformer"]
    assert merged["transformer"].config == expected.config
    assert defaults == sampling_defaults(read_config(tuned))
    for name, tensor in expected.tensors.items():
        got, want = merged["transformer"].tensors[name].read(), tensor.read()
        # The base's own 16 bits round what is merged.
        np.testing.assert_allclose(got.astype("f"), want.astype("f"), atol=2e-3, err_msg=name)
    names = set(read_arrays(adapter))
    assert "transformer.x_embedder.diff" in names and "transformer.x_embedder.diff_b" in names
    assert "transformer.single_transformer_blocks.0.attn.norm_q.diff" in names
    assert "transformer.transformer_blocks.1.attn.to_q.lora_A.weight" in names

    for arguments, words in (
        ([str(tuned), "--difference-from", str(tuned)], "have no network that differs"),
        ([str(adapter), "--difference-from", str(tuned)], "tensors of a LoRA"),
        ([str(tuned), "--difference-from", str(tuned), "--to", "kohya"], "leave out --to"),
        ([str(tuned), "--difference-from", str(tuned), "--rank", "0"], "rank must be at least 1"),
        ([str(tuned), "--rank", "8"], "--rank is of the LoRA that --difference-from writes"),
    ):
        source, *rest = arguments
        with pytest.raises(ValueError, match=words):
            convert([source, str(tmp_path / "x.safetensors"), *rest])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_adapter_of_fill_makes_a_fill_folder(tmp_path):
    change = np.full((TINY.transformer.inner_dim, 384), 0.01, np.float32)
    file = tmp_path / "fill.safetensors"
    write_safetensors(file, {"transformer.x_embedder.diff": of_array(change)})
    assert convert([str(hub.tiny_folder()), str(tmp_path / "out"), "--lora", str(file)]) == 0
    config = read_config(tmp_path / "out")
    assert config.class_name == "FluxFillPipeline" and config.transformer.in_channels == 384
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxFillPipeline"


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 30), (96, 200, 5)])
def test_low_rank_factors_are_the_nearest_of_their_rank(rows, columns, rank):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((rows, 30)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, 30)))
    matrix = ((u * 0.7 ** np.arange(30)) @ v.T).astype(np.float32)
    b, a = low_rank_factors(matrix, rank)
    assert b.shape == (rows, rank) and a.shape == (rank, columns)
    left = np.linalg.norm(matrix - b @ a)
    best = np.sqrt(np.square(0.7 ** np.arange(rank, 30)).sum())
    assert left <= 1.001 * best + 1e-5


@pytest.mark.slow
def test_a_control_picks_its_tool_and_the_picture_repeats(tmp_path, adapter, monkeypatch, capsys):
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "tiny").symlink_to(hub.tiny_folder())
    shutil.copy(adapter, assets)
    monkeypatch.setattr(hub, "_ASSETS", assets)
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    edges = np.zeros((96, 96, 3), np.uint8)
    edges[20:60, 30] = edges[20:60, 60] = 255
    Image.fromarray(edges).save("edges.png")
    words = ["a", "red", "square", "--steps", "2", "--seed", "4"]
    assert sample([*words, "--control", "edges.png", "--out", "one.png"]) == 0
    assert "--model tiny-canny draws this" in capsys.readouterr().err
    record = read_record(Path("one.png"))
    assert record["model"] == "tiny-canny" and not record.get("lora")
    assert record["settings"]["guidance"] == TINY.guidance and "model adapter" in record["sha256"]

    with pytest.raises(ConfigError, match="draws from text alone"):
        pipe = fluxjax.load_pipeline("tiny")
        monkeypatch.setattr(hub, "_ASSETS", tmp_path)  # nothing is shipped beside it
        pipe("a red square", control="edges.png")
    monkeypatch.setattr(hub, "_ASSETS", assets)
    with pytest.raises(ConfigError, match=r'load_pipeline\("tiny-canny"\) draws with a control'):
        pipe("a red square", control="edges.png")
    for wrong in ({"lora_slots": 4}, {"text_encoders": assets / "tiny"}):
        with pytest.raises(ConfigError):
            fluxjax.load_pipeline("tiny-canny", **wrong)

    assert sample(["--like", "one.png", "--out", "two.png"]) == 0
    one, two = (np.asarray(Image.open(name)) for name in ("one.png", "two.png"))
    np.testing.assert_array_equal(one, two)
    arrays = {k: of_array(np.asarray(v) * 2) for k, v in read_arrays(adapter).items()}
    write_safetensors(assets / "tiny-canny.safetensors", arrays)
    with pytest.raises(ConfigError, match=r"not what one.png was made with any more.*adapter"):
        sample(["--like", "one.png", "--out", "three.png"])
