"""Objectives, the update, the loop, and the recipe of the embedded model from end to end."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_checkpoints import random_tree

from fluxjax.checkpoint.pipeline_folder import save_params
from fluxjax.config import TINY, ConfigError
from fluxjax.families import FLUX, Conditioning
from fluxjax.families.noise_path import FLOW
from fluxjax.models.autoencoder import Posterior
from fluxjax.models.flux import FluxTransformer
from fluxjax.train import objectives
from fluxjax.train.embedded import examples, tiny, transformer
from fluxjax.train.flow_matching import Rows, finetune_loss
from fluxjax.train.loop import Run, RunSettings, run_folder
from fluxjax.train.objectives import Objective
from fluxjax.train.optimizers import muon_dimensions, muon_optimizer
from fluxjax.train.step import TrainState, init_state, make_step

SMALL = replace(
    TINY,
    transformer=replace(
        TINY.transformer,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=8,
    ),
)


def test_autoencoder_loss_is_zero_only_for_a_perfect_copy_at_the_prior():
    image = jnp.ones((1, 2, 2, 3))
    prior = Posterior(jnp.zeros((1, 1, 1, 4)), jnp.zeros((1, 1, 1, 4)))
    assert float(objectives.autoencoder_loss(image, image, prior)) == 0.0
    assert float(objectives.autoencoder_loss(image + 0.5, image, prior)) == pytest.approx(1.0)
    # KL of N(2, 1) against N(0, 1) is 2 per latent.
    moved = prior._replace(mean=prior.mean + 2)
    loss = objectives.autoencoder_loss(image, image, moved, kl_weight=0.1)
    assert float(loss) == pytest.approx(0.2)


def test_times_have_the_shifted_logit_normal_density():
    t = objectives.sample_times(jax.random.key(0), 20_000, 1.15)
    # The median of sigmoid(N(0, 1)) is 1/2, which the shift moves to e^mu / (e^mu + 1).
    assert float(jnp.median(t)) == pytest.approx(math.e**1.15 / (math.e**1.15 + 1), abs=0.01)
    assert float(t.min()) > 0 and float(t.max()) < 1
    np.testing.assert_allclose(objectives.shift_times(jnp.array([0.25]), 0.0), [0.25], rtol=1e-6)


def test_path_from_data_to_noise_and_its_velocity():
    data, noise = jnp.full((2, 3), 2.0), jnp.full((2, 3), -1.0)
    path = FLOW.state(jnp.array([0.0, 1.0])).of(data, noise)
    np.testing.assert_array_equal(path, jnp.stack([data[0], noise[1]]))
    target = FLOW.target(jnp.array([0.0, 1.0])).of(data, noise)
    assert float(objectives.squared_error(noise - data, target)) == 0.0
    half = objectives.squared_error(jnp.full((1,), 3.0, jnp.bfloat16), jnp.array([3.001]))
    assert half.dtype == jnp.float32 and float(half) > 0


def test_guidance_extrapolates_from_the_unconditional():
    guided = objectives.guided_velocity(
        jnp.array([[2.0], [2.0]]), jnp.array([[1.0], [1.0]]), jnp.array([1.0, 3.0])
    )
    np.testing.assert_array_equal(guided, [[2.0], [4.0]])


def _quadratic(params, key, target):
    return jnp.square(params["w"] - target).sum()


def test_update_that_is_not_finite_is_skipped_and_counted():
    step = make_step(_quadratic, optax.sgd(0.1), seed=0, ema_decay=0.5)
    state = init_state({"w": jnp.ones(2)}, optax.sgd(0.1))
    state, metrics = step(state, jnp.nan)
    assert int(metrics["skipped"]) == 1 and int(state.step) == 1
    np.testing.assert_array_equal(state.params["w"], jnp.ones(2))
    state, metrics = step(state, 0.0)
    np.testing.assert_allclose(state.params["w"], 0.8 * jnp.ones(2), rtol=1e-6)
    assert int(metrics["skipped"]) == 1


def test_muon_takes_hidden_kernels_alone():
    params = {
        "x_embedder": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
        "blocks": {"to_q": {"kernel": jnp.ones((3, 8, 6))}, "norm": {"scale": jnp.ones(8)}},
        "decoder": {"conv_in": {"kernel": jnp.ones((3, 3, 2, 8))}},
        "resnet": {"conv1": {"kernel": jnp.ones((3, 3, 8, 8))}},
    }
    chosen = muon_dimensions(params)
    assert chosen["x_embedder"] == {"kernel": None, "bias": None}
    assert chosen["decoder"]["conv_in"]["kernel"] is None
    assert chosen["blocks"]["to_q"]["kernel"].output_axis == 2  # the leading axis is layers
    assert chosen["resnet"]["conv1"]["kernel"].reduction_axis == (0, 1, 2)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)
    optimizer = muon_optimizer(1.0)
    update, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradient, params)
    # Orthogonalised: all singular values of a hidden kernel's update are about equal.
    values = np.linalg.svd(update["blocks"]["to_q"]["kernel"][0], compute_uv=False)
    assert float(values.max() / values.min()) < 2.5


def _loop(folder: Path, steps: int) -> TrainState:
    def loss(params, key):
        return jnp.square(params["w"] - jax.random.normal(key, (3,))).sum()

    optimizer = optax.adam(0.1)
    step = make_step(loss, optimizer, seed=1, ema_decay=0.9)
    state = init_state({"w": jnp.zeros(3)}, optimizer)
    settings = RunSettings(steps=steps, folder=folder, log_every=5)
    return Run(settings, lambda s, i: step(s)).to_end(state)


def test_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path):
    straight = _loop(tmp_path / "a", 20)
    _loop(tmp_path / "b", 10)
    resumed = _loop(tmp_path / "b", 20)
    for one, other in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = map(json.loads, (tmp_path / "b" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows] == [5, 10, 15, 20]


def _conditioner() -> transformer.Conditioner:
    """Stands in for the frozen networks, whose own tests lie elsewhere."""

    def encode_image(images):
        n, h, w, _ = images.shape
        return images.reshape(n, h // 16, 16, w // 16, 16, 3).mean((2, 4)).reshape(n, -1, 3) @ (
            np.ones((3, 64), np.float32)
        )

    def encode_text(texts):
        rows = np.array([[len(t), t.count("red")] for t in texts], np.float32)
        return Conditioning(
            np.tile(rows[:, None, :1], (1, 4, 16)), None, np.tile(rows[:, 1:], (1, 8))
        )

    return examples.Conditioner(encode_image, encode_text)


@pytest.mark.slow
def test_pool_is_the_same_after_a_resume():
    stage = transformer.TransformerStage(batch=4, pool=128, fresh=32, buckets=((32, 48),))
    taken = transformer.rows_of(stage.batch, 32, 48)
    pool = examples.Pool(0, stage, _conditioner(), 0, taken)
    straight = [pool.batch(step) for step in range(6)][-1]
    resumed = examples.Pool(0, stage, _conditioner(), 5, taken).batch(5)
    for one, other in zip(*map(jax.tree.leaves, (straight, resumed)), strict=True):
        assert sorted(one.sum((-1,)).ravel().tolist()) == sorted(other.sum((-1,)).ravel().tolist())
    # A bucket of smaller pictures has more of them, for about as many tokens.
    assert straight.latents.shape == (8, 6, 64)


@pytest.fixture(scope="module")
def network():
    model = FluxTransformer(SMALL.transformer, scan_layers=False)
    params = jax.tree.map(lambda x: 0.2 * x, random_tree(SMALL.transformer, np.float32))
    rng = np.random.default_rng(1)
    latents, text, pooled = (
        rng.standard_normal(shape, np.float32) for shape in ((4, 4, 64), (4, 3, 16), (4, 8))
    )
    rows = Rows(latents, Conditioning(text, None, pooled), np.arange(4))
    empty = Conditioning(jnp.zeros((1, 3, 16)), None, jnp.zeros((1, 8)))
    ids = transformer.image_ids(4, 4)
    return model, params, rows, empty, ids


@pytest.mark.slow
def test_flow_matching_depends_on_the_caption_unless_it_is_dropped(network):
    model, params, rows, empty, ids = network
    heard = rows.conditioning
    other = rows._replace(conditioning=heard._replace(sequence=heard.sequence + 1.0))
    key = jax.random.key(3)

    def losses(dropout):
        loss = jax.jit(finetune_loss(FLUX, model, Objective(caption_dropout=dropout)))
        mu = jnp.float32(0.5)
        return [float(loss(params, key, each, {}, empty, ids, mu)) for each in (rows, other)]

    heard, dropped = losses(0.0), losses(1.0)
    assert heard[0] != heard[1] and dropped[0] == dropped[1]


@pytest.mark.slow
def test_noisy_latents_of_the_reference_are_led_to_the_picture(network):
    """A network that knows the picture has no loss, from wherever it is led."""
    model, params, rows, empty, ids = network
    mu, reference = jnp.float32(0.5), np.ones_like(rows.latents)
    seen = []

    def know(module, variables, x, text, pooled, t, *args, **kwargs):
        seen.append((x[:, :4], t))
        known = (x[:, :4] - rows.latents) / t[:, None, None]
        return jnp.concatenate([known, jnp.zeros_like(known)], 1)

    def loss(share, scale):
        led = jax.tree.map(jnp.asarray, rows._replace(reference=scale * reference))
        given = params, jax.random.key(3), led, {}, empty, ids, mu
        return float(finetune_loss(FLUX, model, Objective(from_reference=share), know)(*given))

    assert max(loss(1.0, 1), loss(1.0, 3), loss(0.0, 1), loss(0.0, 3)) < 1e-9
    (one, t), (three, _), (own, _), (same, _) = seen
    assert float(t.min()) < 0.5 < float(t.max())
    share = np.minimum(t, 1 - t)[:, None, None]
    np.testing.assert_allclose(three - one, np.broadcast_to(2 * share, one.shape), atol=1e-5)
    np.testing.assert_allclose(one - own, share * (reference - rows.latents), atol=1e-5)
    np.testing.assert_array_equal(own, same)


@pytest.mark.slow
def test_teacher_is_its_own_student_at_guidance_one(network):
    model, params, rows, empty, ids = network
    mu = jnp.float32(0.5)
    values = []
    for scales in ((1.0, 1.0), (3.0, 3.0)):
        loss = jax.jit(transformer.guidance_distillation_loss(model, scales))
        values.append(float(loss(params, jax.random.key(3), rows, params, empty, ids, mu)))
    assert values[0] < 1e-9 < 1e-3 < values[1]


def test_recipe_names_what_it_does_not_know(tmp_path):
    for text, words in (
        ("[transformer]\nstep = 3", "unknown key 'step'"),
        ("[transformer]\nsteps = 'many'", "steps must be int"),
        ("[transformer", "is not TOML"),
    ):
        (tmp_path / "r.toml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            tiny.read_recipe(tmp_path / "r.toml")
    with pytest.raises(ConfigError, match="no recipe"):
        tiny.read_recipe(tmp_path / "none.toml")


@pytest.mark.slow
def test_the_recipe_of_the_embedded_model_runs_to_its_end(tmp_path, monkeypatch):
    from fluxjax.hub import tiny_folder
    from fluxjax.sample.loading import load_pipeline

    recipe = tiny.read_recipe(Path(__file__).parents[1] / "train" / "tiny.toml")
    first = replace(
        recipe.transformer, steps=2, decay_steps=1, batch=4, pool=64, buckets=((48, 32),)
    )
    few = replace(
        recipe,
        folder=tmp_path,
        autoencoder=replace(
            recipe.autoencoder,
            steps=3,
            small_steps=1,
            small_size=32,
            size=32,
            batch=2,
            small_batch=2,
            decoder_steps=2,
        ),
        paraphrase=replace(recipe.paraphrase, steps=1, batch=4, held_out_captions=8),
        transformer=first,
        refine=first,  # the same program: compiled once
        distill=replace(
            recipe.distill,
            products="float32",
            steps=2,
            decay_steps=1,
            batch=4,
            pool=64,
            buckets=((48, 32),),
        ),
        prompts=replace(recipe.prompts, steps=1, batch=2, buckets=((48, 32),)),
        clip_states=replace(recipe.clip_states, steps=1, batch=4, held_out_captions=8),
        unlearnt=replace(
            recipe.unlearnt, steps=1, batch=2, buckets=((48, 32),), new_buckets=((48, 32),)
        ),
    )
    # Compiling takes minutes: few blocks, two levels, and text encoders that are there already.
    small = replace(
        TINY,
        transformer=replace(TINY.transformer, num_layers=1, num_single_layers=1),
        vae=replace(TINY.vae, block_out_channels=(8, 16)),
        text_encoder=replace(TINY.text_encoder, num_hidden_layers=1),
        text_encoder_2=replace(TINY.text_encoder_2, num_layers=1),
    )
    monkeypatch.setattr(tiny, "TINY", small)
    monkeypatch.setattr(tiny, "_CAPTIONS", 512)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_folder() / name, tmp_path / "pipeline" / name)
    for name in ("text_encoder", "text_encoder_2"):
        params = jax.tree.map(lambda x: 0.1 * x, random_tree(small.networks[name], np.float32))
        save_params(tmp_path / "pipeline", name, params, small.networks[name], None)
    (tmp_path / "text_report.json").write_text("{}")
    folder = few.train()
    pipe = load_pipeline(str(folder))
    (image,) = pipe("a red circle", seed=1, width=48, height=32, steps=2)
    assert image.size == (48, 32)
    world = json.loads((folder / "world.json").read_text())
    assert world["sizes"]["least"] == 32 and {"grey", "next", "underneath"} < set(world["words"])
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    assert few.train() == folder  # nothing is left to do
    unchanged = {p: t for p, t in before.items() if p.parent.name != "transformer"}
    assert all(p.stat().st_mtime_ns == t for p, t in unchanged.items())


def test_a_refused_run_leaves_no_folder_that_it_made(tmp_path):
    with pytest.raises(ConfigError), run_folder(tmp_path / "runs" / "one"):
        raise ConfigError("refused")
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError), run_folder(tmp_path / "runs" / "one"):
        raise ConfigError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
