"""Fine-tuning from end to end on a small model: what is trained, what is not, what comes out."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from drawn_files import encoded
from PIL import Image
from random_checkpoints import random_tree

from fluxjax.checkpoint.engine import from_tree
from fluxjax.checkpoint.lora.merge import adaptable, merge_files
from fluxjax.checkpoint.lora.reader import read_adapters
from fluxjax.checkpoint.lora.writer import write_adapters
from fluxjax.checkpoint.pipeline_folder import (
    load_params,
    read_config,
    save_params,
    write_config,
)
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.training_state import StateStore, read_state
from fluxjax.config import (
    CONTROL_MODES,
    DEV,
    SCHNELL,
    TINY,
    AutoencoderConfig,
    CLIPTextConfig,
    ConfigError,
    FluxConfig,
    FluxPipelineConfig,
    LoraConfig,
    T5Config,
)
from fluxjax.convert.convert import plan, run
from fluxjax.convert.difference import extract_adapter
from fluxjax.families import FLUX, Conditioning, Task
from fluxjax.families.noise_path import FLOW
from fluxjax.hub import tiny_folder
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.latents import image_ids, unpack
from fluxjax.networks.flux import flops as flux_flops
from fluxjax.parallel.mesh import make_mesh
from fluxjax.sample.loading import load_pipeline
from fluxjax.train import command, finetune, progress
from fluxjax.train.curve import draw_curve, smoothed
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.encoders import folder_encoders
from fluxjax.train.export import export, export_run
from fluxjax.train.flow_matching import Rows, fixed_loss
from fluxjax.train.job import train
from fluxjax.train.learnt_controlnet import initial_controlnet, learnt_controlnet
from fluxjax.train.metrics import read_metrics
from fluxjax.train.objectives import density_times
from fluxjax.train.recipe import FinetuneRecipe, deciding_values
from fluxjax.train.settings import (
    ControlNetSettings,
    Objective,
    OptimizerSettings,
    ValidationSettings,
)

RECIPES = Path(__file__).parents[1] / "train"


# Tokenizers of the embedded model around small networks with random weights.
SMALL = FluxPipelineConfig(
    transformer=FluxConfig(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    ),
    vae=AutoencoderConfig(
        latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
    ),
    text_encoder=CLIPTextConfig(
        vocab_size=TINY.text_encoder.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=TINY.text_encoder.bos_token_id,
        eos_token_id=TINY.text_encoder.eos_token_id,
    ),
    text_encoder_2=T5Config(
        vocab_size=TINY.text_encoder_2.vocab_size,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
    ),
    max_sequence_length=16,
    steps=2,
    width=32,
    height=32,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for seed, (name, part) in enumerate(SMALL.networks.items()):
        params = jax.tree.map(lambda leaf: 0.2 * leaf, random_tree(part, np.float32, seed))
        save_params(folder, name, params, part, None)
    write_config(folder, SMALL)  # as published: save_params names the stored type
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_folder() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    for number, pixels in enumerate(noise):
        (folder / f"{number}.png").write_bytes(encoded(Image.fromarray(pixels)))
        (folder / f"{number}.txt").write_text(f"{number} red circles")
    return folder


@pytest.fixture(scope="module")
def recipe(model, pictures, tmp_path_factory) -> FinetuneRecipe:
    return FinetuneRecipe(
        model=str(model),
        folder=tmp_path_factory.mktemp("lora"),
        steps=4,
        batch=8,
        log_every=2,
        lora=LoraConfig(rank=4, alpha=2.0, text_encoders=("clip", "t5"), text_encoder_rank=2),
        optimizer=OptimizerSettings(learning_rate=1e-2, text_encoder_learning_rate=2e-2),
        objective=Objective(caption_dropout=0.3),
        data=DataSettings(
            source=str(pictures),
            resolution=32,
            bucket_step=16,
            cache=str(tmp_path_factory.mktemp("cache")),
        ),
        validation=ValidationSettings(
            every=2,
            prompts=("a red circle", "a blue star"),
            seeds=(0, 7, 8),
            width=24,
            height=32,
            steps=1,
            batches=2,
        ),
    )


def quiet(recipe: FinetuneRecipe, **changes) -> FinetuneRecipe:
    return replace(recipe, validation=ValidationSettings(every=0), **changes)


@pytest.fixture(scope="module")
def lora_run(recipe):
    """(job, every array that is not trained, its bytes before training, the LoRA file)."""
    encoders = folder_encoders(Path(recipe.model))._replace(release=lambda: None)
    job = finetune.prepare(recipe, encoders)
    trained = {id(leaf) for leaf in jax.tree.leaves(job.state)}
    others = [array for array in jax.live_arrays() if id(array) not in trained]
    before = [np.asarray(array).tobytes() for array in others]
    path = train(recipe, job)
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
    bases = job.frozen["params"]
    assert set(bases) == {"transformer", "text_encoder", "text_encoder_2"}
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(bases))
    moments = sum(leaf.size for leaf in jax.tree.leaves(job.state.opt_state))
    assert job.state.ema is None and moments < 0.5 * count  # of the LoRA alone


@pytest.mark.slow
def test_the_lora_file_is_what_was_trained_and_changes_the_picture(lora_run, recipe):
    job, _, _, path = lora_run
    changes, metadata = read_adapters(path, job.frozen["params"])
    assert 'task = "finetune"' in metadata["recipe"]
    rebuilt = changes["transformer"]["transformer_blocks.0.attn.to_q.weight"].low_rank
    assert rebuilt is not None and rebuilt.scale == 1 and np.abs(rebuilt.b).max() > 5e-5
    with Image.open(recipe.folder / "validation" / "0000004.png") as grid:
        drawn = np.asarray(grid, int)[4:36, 4:28]
    size = {"width": 24, "height": 32, "steps": 1, "seed": 0, "rounding": "none"}
    plain = load_pipeline(recipe.model)("a red circle", **size)[0]
    adapted = load_pipeline(recipe.model, loras=[path])("a red circle", **size)[0]
    assert np.abs(np.asarray(adapted, int) - drawn).max() <= 1
    assert np.abs(np.asarray(plain, int) - drawn).max() > 2


@pytest.mark.slow
def test_every_naming_holds_what_text_encoders_learnt(lora_run, recipe, tmp_path):
    job, _, _, path = lora_run
    bases, expected = job.frozen["params"], read_adapters(path, job.frozen["params"]).changes
    assert [len(expected[name]) for name in ("text_encoder", "text_encoder_2")] == [6, 7]
    _, trained = read_state(recipe.folder / "checkpoints", "params")
    for naming in ("kohya", "comfy"):
        named, out = replace(recipe, lora_naming=naming), tmp_path / f"{naming}.safetensors"
        found = read_adapters(
            export(named, job.config, trained, job.frozen, out=out), bases
        ).changes
        for component in ("text_encoder", "text_encoder_2"):
            for name, change in expected[component].items():
                one, other = change.low_rank, found[component][name].low_rank
                assert one is not None and other is not None and np.abs(one.b).max() > 1e-3
                assert one.scale == other.scale
                np.testing.assert_array_equal(one.a, other.a)
                np.testing.assert_array_equal(one.b, other.b)


@pytest.mark.slow
def test_what_a_run_reports(lora_run, recipe):
    rows = read_metrics(recipe.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    assert {"loss", "validation_loss", "gradient_norm", "learning_rate", "skipped"} <= set(rows[0])
    assert rows[1]["images_per_second"] > 0 and 0 <= rows[1]["data_share"] <= 1
    assert rows[0]["validation_loss"] != rows[1]["validation_loss"]
    with Image.open(recipe.folder / "validation" / "0000004.png") as grid:
        assert grid.size == (3 * 28 + 4, 2 * 36 + 4)
        pixels = np.asarray(grid)
    first = pixels[4:36, 4:28]
    assert first.std() > 1
    assert (first != pixels[4:36, 32:56]).any()  # another seed
    assert (first != pixels[40:72, 4:28]).any()  # another prompt
    with Image.open(recipe.folder / "curve.png") as curve:
        assert curve.size[0] > 500


@pytest.mark.slow
def test_a_second_start_has_nothing_left_to_do(lora_run, recipe):
    job, _, _, path = lora_run
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"differs in seed \(0 and 5\)"):
        train(replace(recipe, seed=5), job)
    train(recipe, job)
    assert path.read_bytes() == before


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_job_that_is_killed_goes_on_bit_for_bit(lora_run, recipe, tmp_path):
    """Of 4 steps the last 2 by another start; what is compiled is the straight run's."""
    compiled, seen = lora_run[0].step, []
    halves = quiet(recipe, folder=tmp_path, save_minutes=0.0)

    def advance(state, *rest):
        if len(seen) == 2 and int(state.step) == 2 and not (tmp_path / "again").exists():
            raise Killed
        seen.append(int(state.step))
        return compiled(state, *rest)

    with pytest.raises(Killed):
        train(halves, finetune.prepare(halves)._replace(step=advance))
    (tmp_path / "again").touch()
    train(halves, finetune.prepare(halves)._replace(step=advance))
    assert seen == [0, 1, 2, 3]
    for one, other in zip(*map(_saved_state, (recipe.folder, tmp_path)), strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
    metrics = [read_metrics(folder / "metrics.jsonl") for folder in (recipe.folder, tmp_path)]
    straight, resumed = ([(row["step"], row["loss"]) for row in rows] for rows in metrics)
    assert straight == resumed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "quantise", "validated"), [("lokr", "int8", 4), ("dora", "nf4", 0)]
)
def test_over_codes_a_killed_job_goes_on_bit_for_bit(kind, quantise, validated, recipe, tmp_path):
    """The base of a LoKr stays in its codes, to the byte; validation draws with them. So does that
    of a DoRA, whose magnitudes begin as the norms of the codes' values."""
    straight = replace(
        recipe,
        folder=tmp_path / "straight",
        quantise=quantise,
        lora=LoraConfig(kind=kind, rank=2),
        save_minutes=0.0,
        validation=replace(recipe.validation, every=validated),
    )
    job = finetune.prepare(straight)
    kernel = job.frozen["params"]["transformer"]["transformer_blocks_0"]["ff"]["net_2"]["kernel"]
    before = [np.asarray(part) for part in kernel.parts.values()]
    assert kernel.kind == quantise
    train(straight, job)
    for part, then in zip(kernel.parts.values(), before, strict=True):
        np.testing.assert_array_equal(part, then)
    resumed = quiet(straight, folder=tmp_path / "resumed")

    def killed(state, *rest):
        if int(state.step) == 2:
            raise Killed
        return job.step(state, *rest)

    with pytest.raises(Killed):
        train(resumed, finetune.prepare(resumed)._replace(step=killed))
    train(resumed, finetune.prepare(resumed)._replace(step=job.step))
    one, other = map(_saved_state, (straight.folder, resumed.folder))
    assert [leaf.tobytes() for leaf in one] == [leaf.tobytes() for leaf in other]


def _saved_state(folder: Path) -> list[np.ndarray]:
    with StateStore(folder / "checkpoints") as store:
        found = store.restore()
    assert found is not None and found[0] == 4
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found[1])]


@pytest.mark.slow
def test_accumulation_and_mesh_do_not_change_the_update(recipe, tmp_path):
    """Of a DoRA, which has what a LoRA has, over the transformer and CLIP."""
    lora = LoraConfig(kind="dora", rank=4, alpha=2.0, text_encoders=("clip",))
    # With eps far above any gradient AdamW's update is the gradient: nothing amplifies rounding.
    plain = OptimizerSettings(
        learning_rate=1e3, eps=1e3, b1=0.0, b2=0.0, weight_decay=0.0, clip=0.0, warmup=0
    )
    whole, split = (
        _updated(
            quiet(recipe, folder=tmp_path / name, steps=2, optimizer=plain, lora=lora, **changes)
        )
        for name, changes in (
            ("whole", {}),
            ("split", {"mesh": "fsdp=2,tensor=2", "accumulate": 2, "remat": "full"}),
        )
    )
    for name in whole:
        one, other = whole[name].read(), split[name].read()
        # Measured: 1.8e-7, and 2.4e-7 of magnitudes, which are above 1.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert max(np.abs(array.read()).max() for array in whole.values()) > 0.1


@pytest.mark.slow
def test_products_may_round_their_operands(recipe, tmp_path):
    """By as much as bfloat16 does, and only then."""
    lora = LoraConfig(rank=4)
    plain, same, rounded = (
        _first_gradient(quiet(recipe, folder=tmp_path / str(n), steps=1, lora=lora, **changes))
        for n, changes in enumerate(({}, {"products": "float32"}, {"products": "bfloat16"}))
    )
    assert plain == same
    assert 1e-4 < abs(rounded / plain - 1) < 1e-2, "measured: 1.3e-3"
    assert replace(recipe, products="bfloat16", dtype="bfloat16").precision is None
    assert "products" not in deciding_values(recipe), "runs older than the key go on"
    assert "products" in deciding_values(replace(recipe, products="bfloat16"))


def _first_gradient(recipe: FinetuneRecipe) -> float:
    finetune.finetune(replace(recipe, log_every=1))
    return read_metrics(recipe.folder / "metrics.jsonl")[0]["gradient_norm"]


def _updated(recipe: FinetuneRecipe):
    return read_safetensors(finetune.finetune(recipe))[0]


@pytest.mark.slow
def test_other_base_weights_do_not_go_on(lora_run, recipe, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "model")
    assert finetune.base_hash(other) == finetune.base_hash(model) == lora_run[0].base
    weights = other / "transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = finetune.base_hash(other)
    job, before = lora_run[0]._replace(base=changed), (recipe.folder / "recipe.toml").read_bytes()
    with pytest.raises(
        ConfigError, match=rf"differs in base weights \({lora_run[0].base} and {changed}"
    ):
        train(recipe, job)
    with pytest.raises(
        ConfigError, match=r"optimizer.learning_rate \(0.01 and 0.5\), seed \(0 and 9"
    ):
        settings = replace(recipe.optimizer, learning_rate=0.5)
        train(replace(recipe, optimizer=settings, seed=9), lora_run[0])
    assert (recipe.folder / "recipe.toml").read_bytes() == before, "that of a refused run"


def test_weights_beside_their_folders_are_told_apart(tmp_path):
    """As `convert --to bfl` leaves them: the folders have the configurations."""
    run(plan(tiny_folder(), tmp_path / "model", "bfl"))

    def hashes() -> tuple[str, str, str]:
        encoders = folder_encoders(tmp_path / "model")
        base = finetune.base_hash(tmp_path / "model")
        return base, encoders.text_hash, encoders.image_hash

    files = {"flux1-dev": 0, "t5xxl": 1, "clip_l": 1, "ae": 2}
    for name, place in files.items():
        before, weights = hashes(), tmp_path / "model" / f"{name}.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert [a != b for a, b in zip(before, hashes(), strict=True)] == [
            i == place for i in range(3)
        ], name


@pytest.mark.slow
def test_a_lora_is_made_from_any_checkpoint(lora_run, recipe, model, tmp_path):
    path = lora_run[3]
    made = export_run(recipe.folder)
    assert made == recipe.folder / "lora_0000004.safetensors"
    assert made.read_bytes() == path.read_bytes()
    assert export_run(recipe.folder, step=4, out=tmp_path / "a/x.safetensors").is_file()
    moved = shutil.move(shutil.copytree(model, tmp_path / "there"), tmp_path / "model")
    export_run(recipe.folder, model=str(moved), out=tmp_path / "y.safetensors")
    exported, trained = (read_safetensors(file)[0] for file in (tmp_path / "y.safetensors", path))
    assert exported.keys() == trained.keys()
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor.read(), trained[name].read())
    with pytest.raises(ValueError, match=r"no checkpoint of step 3 under .*: there are"):
        export_run(recipe.folder, step=3)
    with pytest.raises(ConfigError, match="there is no recipe"):
        export_run(tmp_path)
    made.unlink()


def test_mistakes_of_a_run_are_one_sentence(recipe, tmp_path):
    for changes, words in (
        ({"batch": 4}, "batch 4 must be a multiple of 8"),
        ({"mesh": "fsdp=3"}, "does not fit 8 devices"),
        ({"model": str(tmp_path / "none")}, "there is no model folder"),
        ({"lora": LoraConfig(targets=("to_x",))}, "'to_x'"),
        ({"data": replace(recipe.data, bucket_step=3)}, "bucket_step must be a multiple of 4"),
        ({"validation": replace(recipe.validation, width=23)}, "width must be a multiple of 4"),
    ):
        with pytest.raises((ConfigError, OSError), match=words):
            finetune.prepare(replace(recipe, **changes))


@pytest.mark.slow
def test_guidance_that_trains_badly_is_warned_of(recipe, lora_run):
    warned = replace(recipe, objective=Objective(guidance=3.5))
    job = lora_run[0]
    assert any(
        "guidance 3.5" in note for note in finetune._notes(warned, Task(), job.config, job.data)
    )
    assert not finetune._notes(recipe, Task(), job.config, job.data)
    schnell = replace(job.config, transformer=SCHNELL.transformer)
    assert not finetune._notes(warned, Task(), schnell, job.data)


def test_flops_are_the_published_count():
    assert flux_flops(DEV.transformer, 4096, 512) == pytest.approx(74.385e12, rel=1e-5)
    assert flux_flops(DEV.transformer, 1024, 512) == pytest.approx(21.503e12, rel=1e-4)


def test_progress_measures_training_alone(capsys):
    with progress.Progress(100) as shown:
        first = {"step": 10, "loss": 1.0}
        shown(first)
        assert "images_per_second" not in first  # its time was compilation
        # As if 100 seconds of training more.
        shown.images, shown.waited, shown.paused = 40, 0.0, -100.0
        row = {"step": 20, "loss": 0.5}
        shown(row)
    assert row["images_per_second"] == pytest.approx(0.4, rel=0.05)
    assert row["minutes_left"] == pytest.approx(80 * 10 / 60, rel=0.05)
    said = capsys.readouterr().err
    assert "step 20/100  loss 0.5  0.4 images/s  13 min left" in said
    assert progress.describe({"minutes_left": 130.0, "mfu": 0.455}) == "MFU 45.5%  2 h 10 min left"


def test_filling_measures_each_count_by_itself(capsys):
    with progress.Filling(seconds=0.0) as report:
        report("captions encoded", 1, 1)
        report._begun -= 10.0  # as if the next had taken 10 seconds
        for done in (1, 2):
            report("pictures encoded", done, 2)
    lines = capsys.readouterr().err.splitlines()
    counts, rates = zip(*(line.split("  ") for line in lines[1:]), strict=True)
    assert counts == ("pictures encoded: 1 of 2", "pictures encoded: 2 of 2")
    numbers = [float(rate.removesuffix(" pictures/s")) for rate in rates]
    assert numbers == pytest.approx([0.1, 0.2], rel=0.2)  # a busy machine takes longer


def test_a_curve_is_drawn_in_silence_without_a_home(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    program = (
        "from pathlib import Path; from fluxjax.train.curve import draw_curve\n"
        "draw_curve(Path('metrics.jsonl'), Path('curve.png'))"
    )
    nowhere = {**os.environ, "HOME": "/proc/nowhere", "XDG_CONFIG_HOME": "", "MPLCONFIGDIR": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=nowhere, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "curve.png").is_file()


def test_curve_passes_over_what_a_crash_left(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 1, "loss": 1.0}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2}]
    path = draw_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    with Image.open(path) as curve:
        assert len(curve.getcolors(2**24)) > 10


def test_the_smoothed_line_lies_among_its_data():
    falling = [10.0, 3.0] + [1.0 + 0.01 * (-1) ** n for n in range(58)]
    line = smoothed(falling)
    assert line[0] == falling[0] and line[-1] == falling[-1]
    for i, value in enumerate(line):
        near = falling[max(0, i - 4) : i + 5]
        assert min(near) <= value <= max(near)
    assert max(line[8:]) < 1.1
    assert smoothed([]) == [] and smoothed([2.0]) == [2.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "lora_dev",
        "lora_dev_nf4",
        *(f"tiny_{n}" for n in ("lora", "full", "edit", "edit_lora", "fill")),
    ],
)
def test_every_recipe_runs_on_a_small_model(name, recipe, tmp_path, capsys):
    more = "--validation.every 0"
    if source := {"tiny_fill": "scenes"}.get(name, "edits" if "edit" in name else ""):
        more += f" --data.source {source} --data.scenes 16 --data.resolution 48"
    if name in ("tiny_edit_lora", "tiny_fill"):
        more += " --lora-start="  # of another model
    where = _run_recipe(name, recipe, tmp_path, capsys, more)
    whole = name in ("tiny_full", "tiny_edit")
    assert where == tmp_path / ("pipeline" if whole else "lora.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_other_kinds_of_adapters_are_trained(kind, recipe, tmp_path, capsys):
    """Of the transformer and of CLIP."""
    more = f"--validation.every 0 --lora.kind {kind} --lora.rank 2 --lora.text-encoder-rank 2 "
    more += "--optimizer.learning-rate 0.05 --optimizer.text-encoder-learning-rate 0.05"
    path = _run_recipe("lora_dev_clip", recipe, tmp_path, capsys, more)
    parts = {name: SMALL.networks[name] for name in ("transformer", "text_encoder")}
    templates = {name: abstract_params(part) for name, part in parts.items()}
    changes = read_adapters(path, templates).changes
    assert {name: len(mine) for name, mine in changes.items()} == {
        "transformer": 15,
        "text_encoder": 6,
    }
    for component, part in parts.items():
        base = load_params(Path(recipe.model), component, part, stacked=False)
        before = {name: tensor.read() for name, tensor in from_tree(base).items()}
        for name, change in changes[component].items():
            assert np.abs(change.delta(before.__getitem__)).max() > 1e-4, name


@pytest.mark.slow
def test_a_lora_goes_on_from_a_file(lora_run, recipe, tmp_path):
    """Its products, with room for more ranks; what else it changes stays, and is in the result."""
    source = open_source(Path(recipe.model))
    templates = adaptable(source)
    found = read_adapters(lora_run[3], templates).changes
    products = {
        component: {name.removesuffix(".weight"): one.low_rank for name, one in changes.items()}
        for component, changes in found.items()
    }
    query = "text_model.encoder.layers.0.self_attn.q_proj"
    products["text_encoder"].pop(query)
    scale = np.random.default_rng(0).standard_normal
    whole = {
        "transformer": {
            "proj_out.bias": 0.1 * scale(16, np.float32),
            "transformer_blocks.0.attn.norm_q.weight": 0.1 * scale(16, np.float32),
        },
        "text_encoder": {f"{query}.weight": 0.1 * scale((32, 32), np.float32)},
    }
    start = tmp_path / "start.safetensors"
    write_adapters(start, products, {}, changes=whole)
    lora = replace(recipe.lora, rank=6, alpha=3.0, text_encoder_rank=3)
    again = quiet(recipe, folder=tmp_path / "run", steps=1, lora=lora, lora_start=str(start))

    def weights(file: Path) -> dict[str, np.ndarray]:
        merged = merge_files(source, [(file, 1.0)])[0]
        return {
            f"{name}.{tensor}": value.read().astype(np.float32)
            for name, network in merged.items()
            for tensor, value in network.tensors.items()
        }

    def furthest(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
        return {name: float(np.abs(one[name] - other[name]).max()) for name in one}

    job = finetune.prepare(again)
    out = export(
        again, job.config, job.state.params, job.frozen, out=tmp_path / "begun.safetensors"
    )
    begun, given = weights(out), weights(start)
    assert max(furthest(begun, given).values()) < 2e-7
    learnt = finetune.finetune(again)
    moved = furthest(weights(learnt), given)
    assert moved["transformer.transformer_blocks.0.attn.to_q.weight"] > 1e-4
    assert moved[f"text_encoder.{query}.weight"] > 1e-4, "which has both"
    assert moved["transformer.proj_out.bias"] < 1e-7
    assert moved["transformer.transformer_blocks.0.attn.norm_q.weight"] < 1e-7
    assert str(tmp_path) not in read_safetensors(learnt)[1]["recipe"]
    other = export_run(again.folder, out=tmp_path / "other.safetensors")
    assert other.read_bytes() == learnt.read_bytes()
    base = finetune.base_hash(Path(recipe.model), lora_start=str(start))
    assert base == job.base != lora_run[0].base
    refused = {
        "lora.rank must be at least that, got 2": replace(again, lora=replace(lora, rank=2)),
        "name it in lora.text_encoders": replace(again, lora=replace(lora, text_encoders=("t5",))),
        "in PEFT's names": replace(again, lora_naming="kohya"),
        "no low-rank product": replace(again, lora=replace(lora, targets=("proj_out",), rank=9)),
        "no LoRA": replace(again, lora_start=str(tmp_path / "none.safetensors")),
    }
    for words, wrong in refused.items():
        with pytest.raises((ConfigError, OSError), match=words):
            finetune.prepare(wrong)
    with pytest.raises(ConfigError, match=r"method full: python -m fluxjax\.convert"):
        replace(again, method="full", lora=LoraConfig())


def test_precompute_says_how_far_it_is(recipe, tmp_path, capsys):
    options = f"--model {recipe.model} --data.source {recipe.data.source} --data.resolution 32"
    cache = f"--data.bucket-step 16 --data.cache {tmp_path}"
    command.precompute([str(RECIPES / "tiny_lora.toml"), *options.split(), *cache.split()])
    said = capsys.readouterr()
    assert said.out == f"8 pictures in {recipe.data.source}: 8 of 32x32\n"
    counts = "pictures checked: 8 of 8", "captions encoded: 9 of 9", "pictures encoded: 8 of 8"
    for line, count in zip(said.err.splitlines(), counts, strict=True):
        assert re.fullmatch(rf"{count}  [\d.e+]+ {count.split()[0]}/s", line), line
    command.precompute([str(RECIPES / "tiny_lora.toml"), *options.split(), *cache.split()])
    assert not capsys.readouterr().err, "nothing was left to do"


def test_no_recipe_is_left_untried():
    tried = {"lora_dev", "lora_dev_nf4", "lora_kontext", "tiny_lora", "tiny_full", "full_8_chips"}
    tried |= {
        "tiny_edit",
        "tiny_edit_lora",
        "tiny_fill",
        "lora_fill",
        "lora_control",
        "lora_dev_clip",
        "controlnet",
    }
    # In test_diffusion_training.py.
    tried |= {"lora_sd15", "lora_sdxl", "lora_sd3", "full_sd", "pixart_cross_attention"}
    tried |= {"tiny_sd", "tiny_pixart"}
    # In test_clip_training.py.
    tried |= {"lora_open_sora", "full_open_sora", "lora_hunyuan_video"}
    tried |= {"lora_hunyuan_video_i2v"}
    # The recipes of embedded models have their own tests.
    own = {"tiny", "tiny_video", "many_hosts"}
    assert {path.stem for path in RECIPES.glob("*.toml")} == tried | own


@pytest.mark.slow
def test_two_hosts_train_all_weights_and_leave_one_pipeline(recipe, tmp_path):
    """many_hosts.toml on two processes of four devices: every weight lies across both."""
    more = (
        "--steps 3 --save-minutes 0 --log-every 2 --save-dtype float32 --dtype float32 "
        "--validation.every 3 --validation.width 24 --validation.height 32 --validation.steps 1 "
        "--validation.batches 1 --optimizer.warmup 0 --optimizer.learning-rate 0.01 "
        "--validation.prompts"
    )
    options = [*_options(recipe, tmp_path), *more.split(), "a red circle"]
    codes, said = _on_two_hosts(options)
    assert codes == [0, 0], said
    assert said[1][1] == "", "only process 0 speaks"
    # The time to save had come at every step; it is looked at with the metrics alone.
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3] and rows[1]["validation_loss"] > 0
    with StateStore(tmp_path / "checkpoints") as store:
        assert store.steps() == [2, 3]
        state = store.restore()[1]
    save_params(tmp_path / "average", "transformer", state["ema"], SMALL.transformer, None)
    files = [
        tmp_path / folder / "transformer/diffusion_pytorch_model.safetensors"
        for folder in ("average", "pipeline", recipe.model)
    ]
    average, written, start = (file.read_bytes() for file in files)
    assert written == average != start
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"
    with Image.open(tmp_path / "validation/0000003.png") as grid:
        assert grid.size == (4 * 28 + 4, 40)


def _on_two_hosts(options: list[str], folders: Sequence[Path | None] = (None, None)):
    """Exit codes and (stdout, stderr) of many_hosts.toml on two processes of four devices."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    program = [sys.executable, "-m", "fluxjax.train", str(RECIPES / "many_hosts.toml")]
    together = ["--coordinator", f":{port}", "--num-processes", "2"]
    root = str(RECIPES.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    runs = [
        subprocess.Popen(
            [*program, *together, "--process-id", str(i), *options],
            cwd=folder,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, folder in enumerate(folders)
    ]
    try:
        said = [run.communicate(timeout=400) for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [run.returncode for run in runs], said


@pytest.mark.slow
def test_other_base_weights_on_one_of_two_hosts_are_refused(recipe, model, tmp_path):
    """The same recipe, whose model is another in the folder of each host."""
    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        shutil.copytree(model, folder / "model")
    weights = folders[1] / "model/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    options = _options(replace(recipe, model="model"), tmp_path / "run")
    codes, said = _on_two_hosts([*options, "--steps", "1", "--validation.every", "0"], folders)
    assert codes == [2, 2], said
    for _, error in said:
        assert "not started alike, they differ in base weights (" in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_lora_of_an_edit_learns_within_the_mask(recipe, pictures, tmp_path, capsys):
    """lora_kontext.toml: references beside the pictures, and masks that leave nothing to learn."""
    black = tmp_path / "black"
    black.mkdir()
    for number in range(8):
        (black / f"{number}.png").write_bytes(encoded(Image.new("L", (32, 32))))
    more = (
        f"--data.references {pictures} --data.masks {black} --validation.every 1 "
        "--validation.batches 0 --validation.width 24 --validation.height 32 --validation.steps 1 "
        "--validation.seeds 3 --validation.prompts star star "
        f"--validation.references {pictures / '0.png'} {pictures / '1.png'}"
    )
    _run_recipe("lora_kontext", recipe, tmp_path / "run", capsys, more)
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert row["loss"] == row["gradient_norm"] == 0
    with Image.open(tmp_path / "run/validation/0000001.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (2 * 36 + 4, 32, 3)
    assert (pixels[4:36] != pixels[40:72]).any(), (
        "prompt and noise are the same, the references not"
    )
    with pytest.raises(
        ConfigError, match=r"another run, which differs in objective.unmasked_weight \(0.0 and 0.25"
    ):
        more = f"--objective.unmasked-weight 0.25 {more}"
        _run_recipe("lora_kontext", recipe, tmp_path / "run", capsys, more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_fill", "lora_control"])
def test_a_lora_of_a_tool_turns_a_model_into_it(recipe, pictures, tmp_path, capsys, name):
    fill = name == "lora_fill"
    shown = (
        {"images": "0.png 1.png", "masks": "2.png 3.png"} if fill else {"controls": "0.png 1.png"}
    )
    more = (
        "--lora.rank 4 --optimizer.learning-rate 0.01 --optimizer.warmup 0 --validation.every 1 "
        "--validation.batches 1 --validation.width 24 --validation.height 32 --validation.steps 1 "
        "--validation.seeds 3 --validation.prompts star star"
    )
    for option, files in shown.items():
        more += f" --validation.{option} " + " ".join(str(pictures / f) for f in files.split())
    path = _run_recipe(name, recipe, tmp_path, capsys, more)
    with Image.open(tmp_path / "validation/0000001.png") as grid:
        assert np.asarray(grid).shape == (2 * 36 + 4, 32, 3)
    pipe = load_pipeline(recipe.model, loras=[path])
    inputs = 16 + (16 + 16 if fill else 16)
    assert pipe.config.transformer.in_channels == inputs
    assert (pipe.config.guidance, pipe.config.steps) == (30.0, SMALL.steps), "as it was trained"
    templates = {"transformer": abstract_params(SMALL.transformer)}
    read = read_adapters(path, templates)
    layer = read.changes["transformer"]["x_embedder.weight"]
    assert layer.inputs == inputs
    learnt = layer.delta(lambda _: np.zeros(()))
    assert np.linalg.matrix_rank(learnt) > 4 and np.abs(learnt[:, 16:]).max() > 5e-3
    size = {"width": 32, "height": 32, "seed": 3, "max_sequence_length": 32}

    def drawn(*files: str) -> np.ndarray:
        given = dict(zip(("image", "mask") if fill else ("control",), files, strict=True))
        return np.asarray(pipe("star", **{k: pictures / v for k, v in given.items()}, **size)[0])

    more = f"--lora.rank 4 --optimizer.learning-rate 0 --validation.every 0 --lora-start {path}"
    again = _run_recipe(name, recipe, tmp_path / "again", capsys, more)
    read_again = read_adapters(again, templates)
    assert read_again.metadata["sampling_defaults"] == read.metadata["sampling_defaults"]
    kept = read_again.changes["transformer"]
    assert kept.keys() == read.changes["transformer"].keys()
    for layer, change in read.changes["transformer"].items():
        one, other = (c.delta(lambda _: np.zeros(())) for c in (change, kept[layer]))
        np.testing.assert_allclose(one, other, atol=1e-7)

    others = [("1.png", "2.png"), ("0.png", "3.png")] if fill else [("1.png",)]
    first = drawn("0.png", *(["2.png"] if fill else []))
    assert all((drawn(*files) != first).any() for files in others)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")  # diffusers' own
def test_a_controlnet_is_a_copy_that_learns(recipe, pictures, tmp_path, capsys):
    """It begins as diffusers' does, follows its picture after two steps, and goes on from there."""
    model, small = Path(recipe.model), "--controlnet.layers 1 --controlnet.single-layers 1 "
    theirs = FluxControlNetModel.from_transformer(
        FluxTransformer2DModel.from_pretrained(model / "transformer"),
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=SMALL.transformer.attention_head_dim,
        num_attention_heads=SMALL.transformer.num_attention_heads,
    )
    settings, mesh = ControlNetSettings(layers=1, single_layers=1), make_mesh("")
    config = learnt_controlnet(settings, SMALL.transformer)
    base = load_params(model, "transformer", SMALL.transformer, stacked=False, dtype=jnp.float32)
    begun = initial_controlnet(settings, config, base, mesh, stacked=False)
    save_params(tmp_path, "begun", begun, config, None)
    mine = FluxControlNetModel.from_pretrained(tmp_path / "begun").state_dict()
    expected = theirs.state_dict()
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in mine)
    more = small + (
        "--steps 2 --optimizer.name muon --optimizer.learning-rate 0.05 --optimizer.warmup 0 "
        "--validation.every 2 --validation.batches 1 --validation.width 24 --validation.height 32 "
        "--validation.steps 1 --validation.seeds 3 --validation.prompts star star "
        "--accumulate 2 --mesh fsdp=2 --save-dtype float32 "
        f"--validation.controls {pictures / '0.png'} {pictures / '1.png'}"
    )
    path = _run_recipe("controlnet", recipe, tmp_path / "run", capsys, more)
    assert path == tmp_path / "run/controlnet"
    again = export_run(tmp_path / "run", out=tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (path / name).read_bytes()
    moved = FluxControlNetModel.from_pretrained(path).state_dict()
    assert all(not torch.equal(moved[name], mine[name]) for name in mine if "blocks" in name)
    pipe = load_pipeline(recipe.model, controlnet=path)
    size = {"width": 32, "height": 32, "seed": 3, "max_sequence_length": 32}
    one, other = (
        np.asarray(pipe("star", control=pictures / name, **size)[0]) for name in ("0.png", "1.png")
    )
    assert (one != other).any()
    going_on = ControlNetSettings(start=str(path))
    assert learnt_controlnet(going_on, SMALL.transformer) == config
    params = initial_controlnet(going_on, config, base, mesh, stacked=False)
    save_params(tmp_path, "going_on", params, config, None)
    held = FluxControlNetModel.from_pretrained(tmp_path / "going_on").state_dict()
    assert all(torch.equal(held[name], moved[name]) for name in moved)
    with pytest.raises(ConfigError, match=r"follow control pictures: give data\.controls"):
        _run_recipe("controlnet", recipe, tmp_path / "none", capsys, "--data.controls=")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")
def test_of_a_union_one_mode_learns(recipe, tmp_path, capsys):
    """Of a new one, too: the token of the mode that the pictures are of moves, the others' stay."""
    base = load_params(
        Path(recipe.model), "transformer", SMALL.transformer, stacked=False, dtype=jnp.float32
    )
    new = ControlNetSettings(layers=1, single_layers=0, mode="tile")
    union, start = learnt_controlnet(new, SMALL.transformer), tmp_path / "union"
    params = initial_controlnet(new, union, base, make_mesh(""), stacked=False)
    tokens = params["controlnet_mode_embedder"]["embedding"]
    assert union.num_mode == len(tokens) == 10 and 0.8 < float(tokens.std()) < 1.2
    moved = jax.tree.map(lambda x: x + 0.1, params)  # lest what it adds is nothing
    save_params(tmp_path, "union", moved, union, None)
    more = (
        f"--controlnet.start {start} --controlnet.mode tile --steps 1 --accumulate 1 "
        "--mesh fsdp=2 --optimizer.name adamw "
        "--optimizer.weight-decay 0 --optimizer.learning-rate 0.01 --optimizer.warmup 0 "
        "--save-dtype float32 --validation.every 0"
    )
    path = _run_recipe("controlnet", recipe, tmp_path / "run", capsys, more)
    before, after = (
        FluxControlNetModel.from_pretrained(folder).state_dict() for folder in (start, path)
    )
    name = "controlnet_mode_embedder.weight"
    assert (before[name] != after[name]).any(dim=1).nonzero().tolist() == [[CONTROL_MODES["tile"]]]
    for settings, words in (
        (ControlNetSettings(start=str(start)), r"controlnet\.mode: a union ControlNet needs"),
        (ControlNetSettings(start=str(start), mode="10"), "has the modes 0 to 9"),
        (replace(new, mode="10"), "has the modes 0 to 9"),
    ):
        with pytest.raises(ConfigError, match=words):
            learnt_controlnet(settings, SMALL.transformer)
    with pytest.raises(ConfigError, match=r"controlnet\.mode must be canny, .* or a number, got"):
        ControlNetSettings(mode="edges")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "controlnet", "lora": LoraConfig(rank=4)}, "trained whole: leave out"),
        ({"controlnet": ControlNetSettings(mode="canny")}, "and this is method lora"),
    ],
)
def test_a_controlnet_is_no_lora(given, words):
    with pytest.raises(ConfigError, match=words):
        FinetuneRecipe(**given, data=DataSettings(controls="canny"))


@pytest.mark.slow
def test_all_of_a_model_learns_to_follow(recipe, tmp_path, capsys):
    more = "--method full --save-dtype float32 --remat none --validation.every 0"
    folder = _run_recipe("lora_control", recipe, tmp_path, capsys, more)
    config = read_config(folder)
    assert config.transformer.in_channels == 32 and config.guidance == 30
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == (
        "FluxControlPipeline"
    )
    place = "transformer/diffusion_pytorch_model.safetensors"
    weights = read_safetensors(folder / place)[0]["x_embedder.weight"].read()
    before = read_safetensors(Path(recipe.model) / place)[0]["x_embedder.weight"].read()
    np.testing.assert_allclose(weights[:, :16], before, atol=1e-3)
    assert 0 < np.abs(weights[:, 16:]).max() < 1e-3
    other = replace(recipe, model=str(folder))
    with pytest.raises(ConfigError, match="cannot learn from these data: this model draws from a"):
        _run_recipe("lora_fill", other, tmp_path / "other", capsys, "--validation.every 0")


@pytest.mark.slow
def test_references_follow_the_picture_and_masks_weigh_its_errors(model):
    config = SMALL.transformer
    network = FluxTransformer(config, scan_layers=False)
    params = load_params(model, "transformer", config, stacked=False, dtype=jnp.float32)
    keys = iter(jax.random.split(jax.random.key(0), 6))
    shapes = (2, 6, 16), (2, 3, 32), (2, 32)
    latents, text, pooled = (jax.random.normal(next(keys), shape) for shape in shapes)
    reference = jax.random.normal(next(keys), latents.shape)
    mask = jax.random.uniform(next(keys), (2, 6, 4))
    rows = Rows(latents, Conditioning(text, None, pooled), jnp.arange(2), reference, mask)
    ids, quantiles, mu = image_ids(4, 6), jnp.array([0.3, 0.8]), jnp.float32(0.5)
    objective = Objective(density="flux_shift", unmasked_weight=0.25, guidance=1.0)

    @jax.jit
    def loss_of(rows):
        given = FLUX, FLOW, network, objective, {"params": params}, rows
        return fixed_loss(*given, quantiles, jnp.int32(3), ids, mu)

    loss = loss_of(rows)

    key = jax.random.fold_in(jax.random.key(3), 2**31 - 1)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (6, 16)) for i in range(2)])
    t = density_times(objective, quantiles, mu)
    x = (1 - t)[:, None, None] * latents + t[:, None, None] * noise
    both = jnp.concatenate([ids, image_ids(4, 6, index=1)])
    drawn = jax.jit(network.apply)(
        {"params": params},
        jnp.concatenate([x, reference], 1),
        text,
        pooled,
        t,
        both,
        jnp.zeros((3, 3)),
        jnp.ones(2),
    )[:, :6]
    # As latents, where a mask is one plane over all channels.
    error = unpack(jnp.square(drawn - (noise - latents)), 4, 6)
    weights = 0.25 + 0.75 * unpack(mask, 4, 6)
    np.testing.assert_allclose(loss, (weights * error).mean(), rtol=1e-5)
    plain = loss_of(rows._replace(mask=None))
    np.testing.assert_allclose(plain, error.mean(), rtol=1e-5)


@pytest.mark.slow
def test_full_training_writes_a_whole_pipeline(recipe, tmp_path, capsys):
    more = "--save-dtype float32 --dtype bfloat16 --validation.every 1 --validation.batches 1"
    folder = _run_recipe("full_8_chips", recipe, tmp_path, capsys, more)
    assert folder == tmp_path / "pipeline"
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["validation_loss"] > 0
    source = Path(recipe.model)
    changed = _changed(source, folder)
    assert changed == ["transformer/diffusion_pytorch_model.safetensors"]
    old, new = (read_safetensors(f / changed[0])[0] for f in (source, folder))
    assert old.keys() == new.keys()
    moved = [np.abs(old[name].read() - new[name].read()).max() for name in old]
    assert np.median(moved) > 1e-6  # the average of the weights, which moves slowly


@pytest.mark.slow
def test_text_encoders_learn_whole_beside_the_transformer(recipe, tmp_path, capsys):
    """In the pipeline, in what validation hears, and in an adapter that is cut from it."""
    more = (
        "--save-dtype float32 --text-encoders clip t5 --ema-decay 0 --optimizer.warmup 0 "
        "--optimizer.learning-rate 1e-2 --validation.every 1 --validation.batches 1 "
        "--validation.steps 1 --validation.width 24 --validation.height 32 --validation.seeds 0 "
        "--validation.prompts circle"
    )
    folder = _run_recipe("full_8_chips", recipe, tmp_path / "run", capsys, more)
    source = Path(recipe.model)
    changed = {name for name in _changed(source, folder) if not name.endswith("config.json")}
    assert changed == {
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    }
    assert export_run(tmp_path / "run", out=tmp_path / "again") == tmp_path / "again"
    assert not _changed(folder, tmp_path / "again")
    adapter = tmp_path / "adapter.safetensors"
    extract_adapter(folder, source, adapter, rank=64)
    deaf = shutil.copytree(folder, tmp_path / "deaf")
    for part in ("text_encoder", "text_encoder_2"):
        shutil.copytree(source / part, deaf / part, dirs_exist_ok=True)
    size = {"width": 24, "height": 32, "steps": 1, "seed": 0, "rounding": "none"}
    whole, cut, other = (
        np.asarray(load_pipeline(model, loras=loras)("circle", **size)[0], int)
        for model, loras in ((folder, []), (source, [adapter]), (deaf, []))
    )
    with Image.open(tmp_path / "run/validation/0000001.png") as grid:
        drawn = np.asarray(grid, int)[4:36, 4:28]
    assert max(np.abs(whole - one).max() for one in (cut, drawn)) <= 1
    assert np.abs(whole - other).max() > 2


def _changed(source: Path, folder: Path) -> list[str]:
    """Files of `source` that are others in `folder`."""
    paths = (path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if (source / path).read_bytes() != (folder / path).read_bytes()
    ]


def _run_recipe(name: str, recipe: FinetuneRecipe, folder: Path, capsys, more: str) -> Path:
    """What `python -m fluxjax.train` prints last: one step of a recipe of train/, made small."""
    options = _options(recipe, folder) + f"--steps 1 --log-every 1 {more}".split()
    if "--validation.prompts" not in options:
        names = ("prompts", "references", "images", "masks", "controls")
        options += [f"--validation.{name}" for name in names]
    command.train([str(RECIPES / f"{name}.toml"), *options])
    return Path(capsys.readouterr().out.splitlines()[-1])


def _options(recipe: FinetuneRecipe, folder: Path) -> list[str]:
    """What makes any recipe small."""
    return (
        f"--model {recipe.model} --folder {folder} --batch 16 --data.source {recipe.data.source} "
        f"--data.resolution 32 --data.bucket-step 16 --data.cache {recipe.data.cache}"
    ).split()
