"""Training of diffusion models: the loss beside diffusers' schedulers, and whole runs."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from drawn_files import encoded
from PIL import Image
from random_checkpoints import random_tree

from fluxjax.checkpoint.pipeline_folder import (
    read_config,
    save_params,
    tokenizer_of,
    write_config,
)
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.config import (
    PRESETS,
    TINY,
    TINY_PIXART,
    TINY_SD,
    AutoencoderConfig,
    CLIPTextConfig,
    ConfigError,
    LoraConfig,
    PixArtAlphaPipelineConfig,
    PixArtConfig,
    SD3Config,
    SD3PipelineConfig,
    StableDiffusionConfig,
    StableDiffusionXLConfig,
    T5Config,
)
from fluxjax.config.sampler import SamplerConfig
from fluxjax.config.unet import UNetConfig
from fluxjax.families import SD3, STABLE_DIFFUSION, Conditioning, family_of
from fluxjax.families.noise_path import DiffusionPath
from fluxjax.hub import tiny_folder
from fluxjax.models.unet import UNet
from fluxjax.networks import network_of
from fluxjax.train import command, finetune
from fluxjax.train.data.dataset import open_dataset
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.embedded import diffusion
from fluxjax.train.encoders import folder_encoders
from fluxjax.train.export import export_run
from fluxjax.train.flow_matching import Rows, draw_noise, path_loss
from fluxjax.train.job import train
from fluxjax.train.learned_variance import variational_bound
from fluxjax.train.objectives import learnt_times
from fluxjax.train.recipe import FinetuneRecipe, read_recipe
from fluxjax.train.settings import Objective, ValidationSettings
from fluxjax.train.task import learnt
from fluxjax.train.trained_networks import apart

RECIPES = Path(__file__).parents[1] / "train"
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
TIMES = np.array([0, 1, 250, 700, 999])


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [Objective(), Objective(min_snr=5.0), Objective(debiased=True)]
)
@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],
)
def test_the_loss_is_that_of_diffusers_training_examples(prediction, zero_snr, objective):
    """Of a network that returns half of what it is given, at given noise and timesteps."""
    rng = np.random.default_rng(0)
    latents, noise = (rng.standard_normal((5, 3, 2, 4), np.float32) for _ in range(2))
    scheduler = SamplerConfig(
        sampler="PNDMScheduler",  # which knows nothing of the terminal SNR
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        **NOISE,
    )
    family = replace(STABLE_DIFFUSION, forward=lambda model, variables, x, t, *_, apply: 0.5 * x)
    rows = Rows(jnp.asarray(latents), Conditioning(jnp.zeros((5, 1, 1)), None, None), jnp.arange(5))
    path = DiffusionPath.of(scheduler)
    t = learnt_times(objective, path, jnp.asarray((TIMES + 0.5) / 1000, jnp.float32), 0.0)
    np.testing.assert_array_equal(t, TIMES)
    given = family, path, UNet(_UNET), objective, {}, rows, jnp.asarray(noise), t, None
    ours = path_loss(*given, nn.Module.apply)

    theirs = DDPMScheduler(
        prediction_type=prediction, rescale_betas_zero_snr=zero_snr, clip_sample=False, **NOISE
    )
    clean, drawn = torch.tensor(latents), torch.tensor(noise)
    times: Any = torch.tensor(TIMES)
    noisy = theirs.add_noise(clean, drawn, times)
    target = drawn if prediction == "epsilon" else theirs.get_velocity(clean, drawn, times)
    error = ((0.5 * noisy - target) ** 2).mean((1, 2, 3))
    snr = compute_snr(theirs, times)
    if objective.min_snr:
        counted = torch.minimum(snr, torch.full_like(snr, objective.min_snr))
        error = error * counted / (snr if prediction == "epsilon" else snr + 1)
    if objective.debiased:  # as kohya's scripts, but for the lower bound
        snr = snr.clamp(1e-3, 1e3)
        error = error / (snr.sqrt() if prediction == "epsilon" else snr + 1)
    # Measured: 1.1e-7.
    np.testing.assert_allclose(float(ours), float(error.mean()), rtol=1e-6)


def test_the_noise_offset_moves_each_channel_as_a_whole():
    """As diffusers' training examples: offset times one normal number for each channel of a row."""
    keys = jax.random.split(jax.random.key(0), 256)

    def drawn(offset: float) -> np.ndarray:
        draw = partial(draw_noise, objective=Objective(noise_offset=offset), shape=(3, 2, 4))
        return np.asarray(jax.vmap(draw)(keys))

    added = drawn(0.1) - drawn(0.0)
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-6)
    each = added[:, 0, 0]
    assert each.std() == pytest.approx(0.1, rel=0.1) and abs(each.mean()) < 0.02
    assert np.abs(np.corrcoef(each.T) - np.eye(4)).max() < 0.25


@pytest.mark.slow
def test_the_learned_variance_costs_what_the_bound_says():
    """Beside diffusers' step and its learned variance, and PyTorch's divergence of two normals."""
    rng = np.random.default_rng(1)
    latents, drawn, said, values = (rng.standard_normal((5, 2, 3, 4), np.float32) for _ in range(4))
    betas = NOISE | {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    path = replace(DiffusionPath.of(SamplerConfig(**betas)), learns_variance=True)
    times = np.array([0, 1, 250, 700, 999])
    t = jnp.asarray(times, jnp.float32)
    x = np.array(path.state(t).of(jnp.asarray(latents), jnp.asarray(drawn)))
    given = tuple(map(jnp.asarray, (said, values, latents, x)))
    ours = variational_bound(path, given[0], given[1], given[2], given[3], t)

    # A network that says the same by v or by the picture has the same steps.
    signal, level = (part.reshape(-1, 1, 1, 1) for part in path.state(t))
    picture = (given[3] - level * given[0]) / signal
    for kind, other in (("v_prediction", signal * given[0] - level * picture), ("sample", picture)):
        told = replace(path, scheduler=replace(path.scheduler, prediction_type=kind))
        again = variational_bound(told, jnp.asarray(other), given[1], given[2], given[3], t)
        np.testing.assert_allclose(again, ours, rtol=1e-3, err_msg=kind)

    theirs = DDPMScheduler(variance_type="learned_range", clip_sample=False, **betas)
    theirs.set_timesteps(1000)
    a = theirs.alphas_cumprod.double()
    for row, i in enumerate(times[1:], 1):
        noisy, clean, noise, value = (
            torch.tensor(one[row]).double() for one in (x, latents, said, values)
        )
        before, beta = a[i - 1], 1 - a[i] / a[i - 1]

        def mean(picture, noisy=noisy, before=before, beta=beta, i=i):
            return picture * beta * before.sqrt() / (1 - a[i]) + noisy * (1 - before) * (
                a[i] / before
            ).sqrt() / (1 - a[i])

        least = theirs._get_variance(i, variance_type="fixed_small")
        true = torch.distributions.Normal(mean(clean), least.sqrt())
        guess = (noisy - (1 - a[i]).sqrt() * noise) / a[i].sqrt()
        spread = torch.exp(0.5 * theirs._get_variance(i, predicted_variance=value))
        step = torch.distributions.Normal(mean(guess), spread)
        bits = torch.distributions.kl_divergence(true, step).mean() / np.log(2)
        # Measured: 1e-4.
        np.testing.assert_allclose(float(ours[row]), float(bits), rtol=5e-4)


def test_noise_that_says_nothing_is_refused():
    with pytest.raises(ConfigError, match="zero SNR needs v_prediction"):
        DiffusionPath.of(SamplerConfig(prediction_type="epsilon", rescale_betas_zero_snr=True))
    with pytest.raises(ConfigError, match="samples a flow"):
        DiffusionPath.of(SamplerConfig(sampler="FlowMatchEulerDiscreteScheduler"))


_CLIP = CLIPTextConfig(
    vocab_size=TINY.text_encoder.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    projection_dim=16,
    num_hidden_layers=2,
    num_attention_heads=1,
    bos_token_id=TINY.text_encoder.bos_token_id,
    eos_token_id=TINY.text_encoder.eos_token_id,
)
_WITH_PROJECTION = replace(_CLIP, with_projection=True)
_UNET = UNetConfig(
    sample_size=16,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(1, 1),
    cross_attention_dim=16,
    norm_num_groups=4,
)
SMALL = StableDiffusionConfig(
    unet=_UNET,
    vae=AutoencoderConfig(
        latent_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.18215,
        shift_factor=0.0,
    ),
    text_encoder=_CLIP,
    steps=2,
    width=32,
    height=32,
)
SMALL_XL = StableDiffusionXLConfig(
    unet=replace(
        _UNET,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    ),
    vae=SMALL.vae,
    text_encoder=_CLIP,
    text_encoder_2=_WITH_PROJECTION,
    steps=2,
    width=32,
    height=32,
)


SMALL_SD3 = SD3PipelineConfig(
    transformer=SD3Config(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=28,
        pos_embed_max_size=24,
    ),
    vae=replace(SMALL.vae, scaling_factor=1.5305, shift_factor=0.0609),
    text_encoder=_WITH_PROJECTION,
    text_encoder_2=replace(_WITH_PROJECTION, hidden_size=20, projection_dim=12),
    text_encoder_3=T5Config(
        vocab_size=TINY.text_encoder_2.vocab_size,
        d_model=40,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=1,
    ),
    max_sequence_length=16,
    steps=2,
    width=32,
    height=32,
)


SMALL_PIXART = PixArtAlphaPipelineConfig(
    transformer=PixArtConfig(
        sample_size=16,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        caption_channels=40,
    ),
    vae=SMALL.vae,
    text_encoder=SMALL_SD3.text_encoder_3 or T5Config(),
    max_sequence_length=16,
    steps=2,
    width=32,
    height=32,
)


def _write(folder: Path, config) -> Path:
    for seed, (name, part) in enumerate(config.networks.items()):
        params = jax.tree.map(lambda leaf: 0.2 * leaf, random_tree(part, np.float32, seed))
        save_params(folder, name, params, part, None)
    write_config(folder, config)
    for name in config.text_encoders:
        target = folder / tokenizer_of(name)
        own = "tokenizer" if config.networks[name] in _CLIPS else "tokenizer_2"
        shutil.copytree(tiny_folder() / own, target)
    return folder


_CLIPS = (_CLIP, _WITH_PROJECTION, SMALL_SD3.text_encoder_2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return _write(tmp_path_factory.mktemp("model"), SMALL)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """All but one of the model's size; that one is scaled and cut."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(4):
        size = (48, 80, 3) if number == 3 else (32, 32, 3)
        picture = Image.fromarray(rng.integers(0, 256, size, np.uint8))
        (folder / f"{number}.png").write_bytes(encoded(picture))
        (folder / f"{number}.txt").write_text(f"{number} red circles")
    return folder


def _small(name: str, model: Path, pictures: Path, folder: Path) -> FinetuneRecipe:
    recipe = read_recipe(RECIPES / f"{name}.toml")
    return replace(
        recipe,
        model=str(model),
        folder=folder,
        steps=2,
        batch=8,
        accumulate=1,
        log_every=1,
        save_minutes=0.0,
        save_dtype="float32",
        data=DataSettings(
            source=str(pictures),
            resolution=32,
            bucket_step=32,
            max_aspect=1.0,
            cache=str(folder.parent / "cache"),
        ),
        validation=ValidationSettings(
            every=2, prompts=("a red circle",), seeds=(0,), steps=1, batches=1
        ),
    )


def _with_clip(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """Which learns too."""
    return replace(
        recipe,
        lora=replace(recipe.lora, text_encoders=("clip",), text_encoder_rank=2),
        optimizer=replace(recipe.optimizer, learning_rate=1e-2, warmup=0),
        objective=replace(recipe.objective, caption_dropout=0.3),
        validation=replace(recipe.validation, width=32, height=32, guidance=3.0),
    )


def assert_as_validated(pipe, run: Path) -> None:
    """What validation drew last is what the pipeline draws of what was learnt."""
    size: dict[str, Any] = {"seed": 0, "steps": 1, "width": 32, "height": 32, "rounding": "none"}
    (drawn,) = pipe("a red circle", guidance=3.0, **size)
    with Image.open(run / "validation/0000002.png") as sheet:
        shown = np.asarray(sheet, int)[4:36, 4:36]
    apart = np.abs(shown - np.asarray(drawn, int))
    assert (apart <= 1).mean() > 0.999 and np.asarray(drawn).std() > 1


@pytest.mark.slow
def test_a_lora_of_a_unet_is_trained_and_draws(model, pictures, tmp_path, monkeypatch):
    from fluxjax.sample.loading import load_pipeline

    recipe = _small("lora_sd15", model, pictures, tmp_path / "run")
    with pytest.raises(ConfigError, match="no layer of the unet has rows that are whole blocks of"):
        finetune.prepare(replace(recipe, quantise="q4_k"))
    recipe = _with_clip(recipe)
    job, heard = finetune.prepare(recipe), {}
    denoise = job.validation.pipeline.denoise

    def denoised(*arguments, **options):
        heard.update(options)
        return denoise(*arguments, **options)

    monkeypatch.setattr(job.validation.pipeline, "denoise", denoised)
    file = train(recipe, job)
    names = {name.rsplit(".lora_", 1)[0] for name in read_safetensors(file)[0]}
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    assert {f"{block}.attn2.to_k", f"{block}.attn1.to_out.0"} <= names and len(names) == 32 + 12
    pipe = load_pipeline(model, loras=[(file, 1.0)], dtype="float32")
    assert_as_validated(pipe, recipe.folder)
    # What it is guided away from is what the encoder says now.
    empty, before = (one.encode_prompt([""]).sequence for one in (pipe, load_pipeline(model)))
    np.testing.assert_allclose(heard["negative"].sequence, empty, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(empty) - np.asarray(before)).max() > 1e-2
    drawn = [
        np.asarray(load_pipeline(model, loras=loras)("a star", steps=1)[0], int)
        for loras in ((), ((file, 50.0),))
    ]
    assert np.abs(drawn[0] - drawn[1]).max() > 0


@pytest.mark.slow
def test_all_of_a_unet_learns_another_prediction_and_goes_on_bit_for_bit(model, pictures, tmp_path):
    recipe = replace(
        _small("full_sd", model, pictures, tmp_path / "straight"),
        validation=ValidationSettings(every=0),
        mesh="fsdp=2",
    )
    job = finetune.prepare(recipe)
    folder = train(recipe, job)
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] and scheduler["timestep_spacing"] == "trailing"
    assert read_config(folder).own_sampler == "DDIMScheduler"
    same = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
    assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in same)

    class Killed(Exception):
        pass

    def killed(state, *rest):
        if int(state.step) == 1:
            raise Killed
        return job.step(state, *rest)

    again = replace(recipe, folder=tmp_path / "again")
    with pytest.raises(Killed):
        train(again, finetune.prepare(again)._replace(step=killed))
    other = train(again, finetune.prepare(again)._replace(step=job.step))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (other / weights).read_bytes()
    assert (folder / weights).read_bytes() != (model / weights).read_bytes()


@pytest.mark.slow
def test_a_lora_of_xl_is_told_sizes(pictures, tmp_path):
    folder = _write(tmp_path / "xl", SMALL_XL)
    recipe = _small("lora_sdxl", folder, pictures, tmp_path / "run")
    data = open_dataset(recipe.data, folder_encoders(folder), batch=8, seed=0)
    sizes = data(0).conditioning.sizes
    assert sizes is not None
    # Height and width, top and left, and those of the target: 48 rows and 80 columns are scaled to
    # 32 x 53, of which the middle is cut out.
    rows = {tuple(map(int, row)) for row in sizes}
    assert rows == {(32, 32, 0, 0, 32, 32), (48, 80, 0, 11, 32, 32)}
    train(recipe, finetune.prepare(recipe))
    assert (tmp_path / "run/validation/0000002.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_lora_of_xl_and_of_both_its_text_encoders(pictures, tmp_path):
    """Which its files hold, in PEFT's names as diffusers reads them and in kohya's; the pictures of
    validation are what a pipeline with the file draws."""
    import diffusers

    from fluxjax.sample.loading import load_pipeline

    folder = _write(tmp_path / "xl", SMALL_XL)
    recipe = _small("lora_sdxl", folder, pictures, tmp_path / "run")
    with pytest.raises(ConfigError, match="StableDiffusionXLPipeline has no t5"):
        lora = replace(recipe.lora, text_encoders=("t5",))
        finetune.prepare(replace(recipe, lora=lora))
    recipe = _with_clip(recipe)
    file = train(recipe, finetune.prepare(recipe))
    tensors = {name: leaf.read() for name, leaf in read_safetensors(file)[0].items()}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        mine = {name: leaf for name, leaf in tensors.items() if name.startswith(f"{part}.")}
        changed = [np.abs(leaf).max() > 1e-4 for name, leaf in mine.items() if "lora_B" in name]
        # Of the last layer nothing is heard but the second encoder's pooled state.
        assert len(changed) >= 12 and any(changed) and (part == "text_encoder" or all(changed))
    pipe = load_pipeline(folder, loras=[(file, 1.0)], dtype="float32")
    assert_as_validated(pipe, recipe.folder)
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.load_lora_weights(file.parent, weight_name=file.name)
    theirs.set_progress_bar_config(disable=True)
    size = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    wanted: Any = theirs("a star", generator=torch.Generator().manual_seed(0), **size)
    (drawn,) = pipe("a star", seed=0, steps=2, guidance=3.0, width=32, height=32)
    apart = np.abs(np.asarray(drawn, int) - np.asarray(wanted.images[0], int))
    assert (apart <= 1).mean() > 0.999
    (plain,) = load_pipeline(folder)("a star", seed=0, steps=2, guidance=3.0, width=32, height=32)
    assert np.abs(np.asarray(plain, int) - np.asarray(drawn, int)).max() > 2


def test_text_encoders_that_never_learn_or_are_not_there_are_refused():
    recipe = FinetuneRecipe(lora=LoraConfig(text_encoders=("clip",)))
    for name, words in (
        ("hunyuan-720", "those of HunyuanVideoPipeline are not trained"),
        ("pixart-sigma", "PixArtSigmaPipeline has no clip"),
    ):
        with pytest.raises(ConfigError, match=f"lora.text_encoders: {words}"):
            learnt(recipe, PRESETS[name])
    for name in ("dev", "sd15", "sdxl", "sdxl-refiner", "sd35-large", "opensora-256"):
        learnt(recipe, PRESETS[name])
    whole = FinetuneRecipe(method="full", text_encoders=("t5",))
    with pytest.raises(ConfigError, match="text_encoders: StableDiffusionXLPipeline has no t5"):
        learnt(whole, PRESETS["sdxl"])
    for changes, words in (
        ({"text_encoders": ("clip",)}, "learn whole with method full; a LoRA's are lora.text_enc"),
        ({"method": "full", "lora": recipe.lora}, "with method full it is text_encoders, which"),
        ({"method": "full", "text_encoders": ("t5", "t5")}, "names one of them twice: t5, t5"),
    ):
        with pytest.raises(ConfigError, match=words):
            FinetuneRecipe(**changes)


_T5_ALONE, _CLIPS_ALONE = ("text_encoder_3",), ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    "config, learning",
    [
        pytest.param(SMALL, ("text_encoder",), marks=pytest.mark.slow),
        pytest.param(SMALL_XL, _CLIPS_ALONE, marks=pytest.mark.slow),
        pytest.param(SMALL_SD3, _CLIPS_ALONE, marks=pytest.mark.slow),
        (SMALL_SD3, _T5_ALONE),
        pytest.param(SMALL_SD3, (*_CLIPS_ALONE, *_T5_ALONE), marks=pytest.mark.slow),
        pytest.param(SMALL_PIXART, ("text_encoder",), marks=pytest.mark.slow),
    ],
)
def test_text_encoders_that_learn_are_heard_as_all_are(config, learning):
    """What is heard of a caption whose rest was encoded before is what all encoders together say
    once those that learn have learnt; how large a picture is stays told."""
    family = family_of(config.class_name)
    names = config.text_encoders
    modules = {
        name: network_of(config.networks[name]).build(config.networks[name]) for name in names
    }
    before, after = (
        {
            name: jax.tree.map(
                lambda leaf: 0.2 * jnp.asarray(leaf),
                random_tree(config.networks[name], np.float32, seed + (name in learning)),
            )
            for seed, name in enumerate(names)
        }
        for learning in ((), learning)
    )
    ids, told = family.text_shapes(
        config, 2, 16 if config.vae == SMALL_SD3.vae else 77, jnp.float32
    )
    rng = np.random.default_rng(0)
    ids = jax.tree.map(lambda one: jnp.asarray(rng.integers(0, 2, one.shape), jnp.int32), ids)
    every = tuple(modules.values())
    heard, wanted = (
        family.encode(every, tuple(params[name] for name in names), ids)
        for params in (before, after)
    )
    sizes = None if told.sizes is None else jnp.ones(told.sizes.shape)
    mine = {name: modules[name] for name in learning}
    assert family.encode_anew is not None
    params = {name: after[name] for name in learning}
    found = family.encode_anew(mine, params, ids, heard._replace(sizes=sizes))
    chex.assert_trees_all_close(found, wanted._replace(sizes=sizes), rtol=1e-6, atol=1e-6)
    assert np.abs(np.asarray(heard.sequence) - np.asarray(wanted.sequence)).max() > 1e-3


@pytest.mark.slow
def test_a_lora_of_sd3_is_trained_and_draws(pictures, tmp_path):
    folder = _write(tmp_path / "sd3", SMALL_SD3)
    recipe = _small("lora_sd3", folder, pictures, tmp_path / "run")
    file = train(recipe, finetune.prepare(recipe))
    names = {name.rsplit(".lora_", 1)[0] for name in read_safetensors(file)[0]}
    assert "transformer.transformer_blocks.0.attn.to_q" in names
    assert (tmp_path / "run/validation/0000002.png").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_all_of_sd3_learns_but_its_table_of_positions(pictures, tmp_path):
    """Which PyTorch keeps as a buffer. On a mesh, in parts, each encoder dropped by itself;
    diffusers draws with what is left, and so does what is exported of the run."""
    import diffusers

    from fluxjax.sample.loading import load_pipeline

    source = _write(tmp_path / "sd3", SMALL_SD3)
    listed = json.loads((source / "model_index.json").read_text())
    listed["feature_extractor"] = ["transformers", "SiglipImageProcessor"]  # not there, as of a hub
    (source / "model_index.json").write_text(json.dumps(listed))
    recipe = _small("lora_sd3", source, pictures, tmp_path / "run")
    recipe = replace(
        recipe,
        method="full",
        lora=LoraConfig(),
        optimizer=replace(recipe.optimizer, learning_rate=1e-3),
        validation=ValidationSettings(every=0),
        mesh="fsdp=2,tensor=2",
        accumulate=2,
        ema_decay=0.0,
    )
    folder = train(recipe, finetune.prepare(recipe))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    old, new = (read_safetensors(root / weights)[0] for root in (source, folder))
    stayed = {name for name in old if old[name].read().tobytes() == new[name].read().tobytes()}
    # What the last block's text asks with learns nothing: what it hears is dropped.
    assert stayed == {"pos_embed.pos_embed", "transformer_blocks.1.attn.add_q_proj.bias"}
    assert export_run(recipe.folder, out=tmp_path / "again").is_dir()
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()
    asked: dict[str, Any] = {"width": 32, "height": 32}
    (drawn,) = load_pipeline(folder)("a star", steps=2, guidance=4.0, seed=0, **asked)
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    asked |= {"num_inference_steps": 2, "guidance_scale": 4.0, "max_sequence_length": 16}
    wanted: Any = theirs("a star", generator=torch.Generator().manual_seed(0), **asked)
    apart = np.abs(np.asarray(drawn, int) - np.asarray(wanted.images[0], int))
    assert (apart <= 1).mean() > 0.999 and np.asarray(drawn).std() > 1


def test_modules_do_not_mean_what_never_learns():
    params = {"pos_embed": {"pos_embed": np.zeros(1), "proj": {"kernel": np.zeros(2)}}}
    table = {"pos_embed": {"pos_embed": params["pos_embed"]["pos_embed"]}}
    for modules in ((), ("pos_embed",)):
        trained, rest = apart(params, modules, network_of(SMALL_SD3.transformer).unlearnt)
        assert rest == table and trained == {"pos_embed": {"proj": params["pos_embed"]["proj"]}}
    assert apart(params, ()) == (params, {})


def test_a_sampler_that_is_given_for_another_clamps_nothing():
    """DDIM does unless its file says otherwise, and PNDM's file need not."""
    recipe = FinetuneRecipe(
        method="full", objective=Objective(zero_snr=True, prediction="v_prediction")
    )
    for config in (SMALL, SMALL_XL):
        silent = replace(config, scheduler=SamplerConfig(sampler="PNDMScheduler", **NOISE))
        scheduler: Any = learnt(recipe, silent)[0].scheduler
        assert scheduler.sampler == "DDIMScheduler" and scheduler.complete().clip_sample is False


@pytest.mark.slow
def test_pixart_learns_to_listen_and_all_else_stays_as_it_is(pictures, tmp_path):
    source = _write(tmp_path / "pixart", SMALL_PIXART)
    recipe = _small("pixart_cross_attention", source, pictures, tmp_path / "run")
    recipe = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=1e-3), ema_decay=0.0)
    job = finetune.prepare(recipe)
    folder = train(recipe, job)
    before, after = (
        {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.*")}
        for root in (source, folder)
    )
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert {name for name in before if before[name] != after[name]} == {weights}
    old, new = (read_safetensors(root / weights)[0] for root in (source, folder))
    moved = {name for name in old if old[name].read().tobytes() != new[name].read().tobytes()}
    meant = {name for name in old if re.search(r"caption_projection\.|\.attn2\.", name)}
    assert moved == meant and len(meant) == 4 + 2 * 8
    # A batch is told the sizes of its pictures, and how long its captions are.
    rows = job.data(0).conditioning
    assert rows.mask is not None and rows.sizes is not None
    np.testing.assert_array_equal(rows.sizes, [[32, 32, 1]] * 8)
    assert set(rows.mask.sum(1)) < set(range(3, 16))
    assert export_run(recipe.folder, out=tmp_path / "again").is_dir()
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()


def test_an_encoder_that_is_dropped_leaves_zeros_and_the_others_as_they_were():
    length, width = 77 + 16, 40
    heard = Conditioning(np.ones((4, length, width), np.float32), None, np.ones((4, 28)))
    assert SD3.silenced is not None
    found = SD3.silenced(SMALL_SD3, heard, heard, jnp.eye(4, 3, dtype=bool))
    sequence, vector = np.asarray(found.sequence), np.asarray(found.vector)
    left = [[sequence[row, 0, 0], sequence[row, 76, 35], sequence[row, 77, 0]] for row in range(4)]
    np.testing.assert_array_equal(left, 1 - np.eye(4, 3))
    zeros = [(row == 0).sum() for row in sequence]
    assert zeros == [77 * 16, 77 * 20, 16 * 40, 0]
    np.testing.assert_array_equal(vector.sum(1), [28 - 16, 28 - 12, 28, 28])


@pytest.mark.slow
def test_what_an_objective_does_not_have_is_refused(model, pictures, tmp_path):
    recipe = _small("full_sd", model, pictures, tmp_path)
    for changes, words in (
        ({"objective": Objective(weight="cosmap")}, "weight is of flows"),
        ({"method": "lora"}, "use method full"),
        ({"modules": ("attn3",)}, r"no module of the model is meant by modules = \['attn3'\]"),
        ({"model": "tiny", "objective": Objective(min_snr=5.0)}, "min_snr is of diffusion models"),
        ({"model": "tiny", "objective": Objective(debiased=True)}, "debiased is of diffusion"),
        ({"model": "tiny", "objective": Objective(zero_snr=True)}, "tiny is a flow"),
        ({"model": "tiny", "objective": Objective(from_reference=0.5)}, "needs data.references"),
    ):
        with pytest.raises(ConfigError, match=words):
            finetune.prepare(replace(recipe, **changes))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["sd", "pixart"])
def test_an_embedded_diffusion_model_is_trained_and_drawn_with_by_diffusers_too(
    kind, tmp_path, monkeypatch
):
    """A smaller one, for two steps twice; as of its newest checkpoint, and at the end."""
    import diffusers

    from fluxjax.sample.loading import load_pipeline

    unet = replace(TINY_SD.unet, block_out_channels=(8, 16), transformer_layers_per_block=(1, 1))
    small = {
        "sd": replace(TINY_SD, unet=unet),
        "pixart": replace(TINY_PIXART, transformer=replace(TINY_PIXART.transformer, num_layers=1)),
    }[kind]
    recipe = read_recipe(RECIPES / f"tiny_{kind}.toml")
    assert isinstance(recipe, diffusion.DiffusionRecipe)
    monkeypatch.setattr(type(recipe), "preset", small)
    options = {"steps": 2, "decay_steps": 1, "batch": 4, "pool": 64, "buckets": ((64, 64),)}
    stage = replace(recipe.refine, **options)  # the same program twice: compiled once
    part = small.denoiser
    recipe = replace(recipe, folder=tmp_path / "run", refine=stage, **{part: stage})
    folder = recipe.train()
    command.export([str(recipe.folder), "--out", str(tmp_path / "exported")])
    weights = f"{part}/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "exported" / weights).read_bytes() == (folder / weights).read_bytes()
    command.export([str(recipe.folder), "--out", str(tmp_path / "linked"), "--link"])
    linked = {path.name: path.resolve() for path in (tmp_path / "linked").iterdir()}
    assert linked["vae"] == tiny_folder() / "vae" and linked[part].parent == tmp_path / "linked"
    assert read_config(tmp_path / "linked") == read_config(folder)
    size: dict[str, Any] = {"width": 64, "height": 64}
    ours = load_pipeline(folder)
    drawn = ours("a red circle", steps=2, size_bins=False if kind == "pixart" else None, **size)[0]
    more: dict[str, Any] = {"use_resolution_binning": False, "max_sequence_length": 32}
    theirs = getattr(diffusers, small.class_name).from_pretrained(
        folder, dtype=torch.float32, **({"safety_checker": None} if kind == "sd" else {})
    )
    theirs.set_progress_bar_config(disable=True)
    wanted: Any = theirs(
        "a red circle",
        num_inference_steps=2,
        guidance_scale=ours.defaults.guidance,
        generator=torch.Generator().manual_seed(0),
        **size,
        **(more if kind == "pixart" else {}),
    )
    apart = np.abs(np.asarray(drawn, int) - np.asarray(wanted.images[0], int))
    assert (apart <= 1).mean() > 0.999 and np.asarray(drawn).std() > 1
