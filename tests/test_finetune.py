"""Fine-tuning from end to end on a small model: what is trained, what is not, what comes out."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fluxjax.checkpoint.lora_file import read_lora
from fluxjax.checkpoint.pipeline_folder import read_config, save_params, write_config
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import DEV, SCHNELL, ConfigError
from fluxjax.models.flops import flux_flops
from fluxjax.models.lora import LoraConfig
from fluxjax.sample.loading import load_pipeline, tiny_folder
from fluxjax.train import command, finetune, progress
from fluxjax.train.curve import draw_curve, read_metrics
from fluxjax.train.data import DataSettings
from fluxjax.train.encoders import folder_encoders
from fluxjax.train.objectives import Objective
from fluxjax.train.optimizers import OptimizerSettings
from fluxjax.train.recipe import FinetuneRecipe
from fluxjax.train.validation import ValidationSettings

RECIPES = Path(__file__).parents[1] / "train"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The embedded model's frozen networks around a transformer of one block of each kind."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny_folder(), folder, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("transformer"))  # fmt: skip
    config = read_config(tiny_folder())
    small = replace(config.transformer, num_layers=1, num_single_layers=1, num_attention_heads=2)
    write_config(folder, replace(config, transformer=small))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32),
        abstract_params(small),
    )
    save_params(folder, "transformer", params, small, jnp.float32)
    return folder


@pytest.fixture(scope="module")
def recipe(model, tmp_path_factory) -> FinetuneRecipe:
    return FinetuneRecipe(
        model=str(model), folder=tmp_path_factory.mktemp("lora"), steps=4, batch=8, log_every=2,
        lora=LoraConfig(rank=4, alpha=2.0),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        objective=Objective(caption_dropout=0.3),
        data=DataSettings(
            scenes=8, resolution=48, bucket_step=16, scene_sizes=((32, 32), (48, 32)),
            cache=str(tmp_path_factory.mktemp("cache")),
        ),
        validation=ValidationSettings(
            every=2, prompts=("a red circle", "a blue star"), seeds=(0, 7, 8), width=32, height=48,
            steps=2, batches=2,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def lora_run(recipe):
    """(job, bytes of every array that is not trained: before and after, the file, the state)."""
    encoders = folder_encoders(Path(recipe.model))._replace(release=lambda: None)
    job = finetune.prepare(recipe, encoders)
    trained = {id(leaf) for leaf in jax.tree.leaves(job.state)}
    others = [array for array in jax.live_arrays() if id(array) not in trained]
    before = [np.asarray(array).tobytes() for array in others]
    path = finetune.train(recipe, job)
    return job, others, before, path


@pytest.mark.slow
def test_frozen_networks_are_the_same_bytes_after_training(lora_run):
    job, others, before, _ = lora_run
    after = [np.asarray(array).tobytes() for array in others]
    assert before == after
    # Among them are all of the text encoders and the autoencoder, stored in bfloat16.
    sizes = sum(array.size for array in others if array.dtype == jnp.bfloat16)
    wanted = sum(
        math.prod(leaf.shape)
        for part in ("text_encoder", "text_encoder_2", "vae")
        for leaf in jax.tree.leaves(abstract_params(getattr(job.config, part)))
    )
    assert sizes >= wanted
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(job.frozen["params"]))
    moments = sum(leaf.size for leaf in jax.tree.leaves(job.state.opt_state))
    assert job.state.ema is None and moments < 0.5 * count  # of the LoRA alone


@pytest.mark.slow
def test_the_lora_file_is_what_was_trained_and_changes_the_picture(lora_run, recipe):
    job, _, _, path = lora_run
    tree, metadata = read_lora(path, job.frozen["params"])
    assert 'task = "finetune"' in metadata["recipe"]
    rebuilt = tree["transformer_blocks_0"]["attn"]["to_q"]
    assert rebuilt["scale"] == 0.5 and np.abs(rebuilt["b"]).max() > 1e-4
    size = {"width": 32, "height": 32, "steps": 2, "seed": 3, "max_sequence_length": 32}
    plain = load_pipeline(recipe.model)("a star", **size)[0]
    adapted = load_pipeline(recipe.model, loras=[path])("a star", **size)[0]
    assert np.abs(np.asarray(plain, int) - np.asarray(adapted, int)).max() > 2


def test_what_a_run_reports(lora_run, recipe):
    rows = read_metrics(recipe.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    assert {"loss", "validation_loss", "gradient_norm", "learning_rate", "skipped"} <= set(rows[0])
    assert rows[1]["images_per_second"] > 0 and 0 <= rows[1]["data_share"] <= 1
    assert rows[0]["validation_loss"] != rows[1]["validation_loss"]
    with Image.open(recipe.folder / "validation" / "0000004.png") as grid:
        assert grid.size == (3 * 34 - 2, 2 * 50 - 2)
        pixels = np.asarray(grid)
    assert np.asarray(pixels[:48, :32]).std() > 1
    assert (pixels[:48, :32] != pixels[:48, 34:66]).any()  # another seed
    assert (pixels[:48, :32] != pixels[50:, :32]).any()  # another prompt
    with Image.open(recipe.folder / "curve.png") as curve:
        assert curve.size[0] > 500


def test_a_second_start_has_nothing_left_to_do(lora_run, recipe):
    before = lora_run[3].read_bytes()
    again = finetune.prepare(replace(recipe, validation=ValidationSettings(every=0)))
    finetune.train(recipe, again)
    assert lora_run[3].read_bytes() == before
    other = replace(recipe, seed=5)
    with pytest.raises(ConfigError, match="differs in recipe"):
        finetune.train(other, finetune.prepare(other))


@pytest.mark.slow
def test_full_training_writes_a_whole_pipeline(recipe, tmp_path):
    full = replace(
        recipe, method="full", folder=tmp_path, steps=2, batch=16, accumulate=2, remat="dots",
        mesh="fsdp=2,tensor=2", save_dtype="float32", dtype="bfloat16",
        validation=replace(recipe.validation, every=2, prompts=()),
    )  # fmt: skip
    folder = finetune.finetune(full)
    assert folder == tmp_path / "pipeline"
    source = Path(recipe.model)
    changed = [
        path.relative_to(source).as_posix()
        for path in sorted(source.rglob("*"))
        if path.is_file() and path.read_bytes() != (folder / path.relative_to(source)).read_bytes()
    ]
    assert changed == ["transformer/diffusion_pytorch_model.safetensors"]
    old, new = (read_safetensors(f / changed[0])[0] for f in (source, folder))
    assert old.keys() == new.keys()
    moved = [np.abs(old[name].read() - new[name].read()).max() for name in old]
    assert np.median(moved) > 1e-6  # the average of the weights, which moves slowly
    load_pipeline(folder)("a star", width=32, height=32, steps=2)


def _updated(recipe: FinetuneRecipe, folder: Path, **changes):
    """Trained leaves after two steps, without validation."""
    quiet = replace(
        recipe, folder=folder, steps=2, validation=ValidationSettings(every=0), **changes
    )
    job = finetune.prepare(quiet)
    path = finetune.train(quiet, job)
    return read_safetensors(path)[0]


@pytest.mark.slow
def test_accumulation_and_mesh_do_not_change_the_update(recipe, tmp_path):
    recipe = replace(recipe, batch=16)
    whole = _updated(recipe, tmp_path / "a")
    parts = _updated(recipe, tmp_path / "b", accumulate=2)
    split = _updated(recipe, tmp_path / "c", mesh="fsdp=2,tensor=2", accumulate=4, remat="full")
    for other in (parts, split):
        for name in whole:
            # Adam divides by the gradient's size: tiny gradients' rounding is amplified.
            np.testing.assert_allclose(whole[name].read(), other[name].read(), atol=2e-4)


def test_mistakes_of_a_run_are_one_sentence(recipe, tmp_path):
    for changes, words in (
        ({"batch": 4}, "batch 4 must be a multiple of 8"),
        ({"mesh": "fsdp=3"}, "does not fit 8 devices"),
        ({"model": str(tmp_path / "none")}, "there is no model folder"),
        ({"lora": LoraConfig(targets=("to_x",))}, "'to_x'"),
    ):
        with pytest.raises((ConfigError, OSError), match=words):
            finetune.prepare(replace(recipe, **changes))


def test_guidance_that_trains_badly_is_warned_of(recipe, lora_run):
    warned = replace(recipe, objective=Objective(guidance=3.5))
    job = lora_run[0]
    assert any("guidance 3.5" in note for note in finetune._notes(warned, job.config, job.data))
    assert not finetune._notes(recipe, job.config, job.data)
    schnell = replace(job.config, transformer=SCHNELL.transformer)
    assert not finetune._notes(warned, schnell, job.data)


def test_flops_are_the_published_count():
    assert flux_flops(DEV.transformer, 4096, 512) == pytest.approx(74.385e12, rel=1e-5)
    assert flux_flops(DEV.transformer, 1024, 512) == pytest.approx(21.503e12, rel=1e-4)


def test_progress_measures_training_alone(capsys):
    with progress.Progress(100, 4) as shown:
        first = {"step": 10, "loss": 1.0}
        shown(first)
        assert "images_per_second" not in first  # its time was compilation
        shown.waited, shown.paused = 0.0, -100.0  # as if 100 seconds of training more
        row = {"step": 20, "loss": 0.5}
        shown(row)
    assert row["images_per_second"] == pytest.approx(0.4, rel=0.05)
    assert row["minutes_left"] == pytest.approx(80 * 10 / 60, rel=0.05)
    said = capsys.readouterr().err
    assert "step 20/100  loss 0.5  0.4 images/s  13 min left" in said
    assert progress.describe({"minutes_left": 130.0, "mfu": 0.455}) == "MFU 45.5%  2 h 10 min left"


def test_curve_passes_over_what_a_crash_left(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 1, "loss": 1.0}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2}]
    path = draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    with Image.open(path) as curve:
        assert len(curve.getcolors(2**24)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_runs_on_a_small_model(path, recipe, tmp_path, capsys):
    if path.stem in ("tiny", "many_hosts"):
        pytest.skip("the embedded model's recipe has its own test, many hosts run full_8_chips'")
    tiny = path.stem.startswith("tiny")
    validation = "--validation.every 1 --validation.steps 1 --validation.batches 1"
    options = (
        f"--model {recipe.model} --folder {tmp_path} --steps 1 --batch 16 --log-every 1 "
        "--data.source scenes --data.resolution 48 --data.bucket-step 16 --data.scenes 8 "
        f"--data.scene-sizes 32 32 48 32 --data.cache {recipe.data.cache} --validation.prompts star"
        f" --validation.seeds 0 {validation if tiny else '--validation.every 0'}"
    ).split()
    if tiny:
        command.precompute([str(path), *options])
        assert "8 pictures" in capsys.readouterr().out
    command.train([str(path), *options])
    assert Path(capsys.readouterr().out.splitlines()[-1]).exists()
    assert (tmp_path / "validation" / "0000001.png").is_file() == tiny
