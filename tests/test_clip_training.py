"""Training on clips of one's own: what is read, conditions, whole runs of Open-Sora's and
HunyuanVideo's recipes."""

import shutil
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hunyuan_video_folders import hunyuan_video, save_hunyuan_video  # noqa: F401
from open_sora_folders import SMALL, open_sora  # noqa: F401
from PIL import Image
from safetensors.torch import load_file

from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.training_state import read_state
from fluxjax.config import ConfigError, HunyuanVideoImageToVideoPipelineConfig
from fluxjax.families import OPEN_SORA, Conditioning, family_of
from fluxjax.models.lora import variables
from fluxjax.parallel.apply import apply_on
from fluxjax.sample.clip_files import read_clip, usual_suffix, write_clip
from fluxjax.train import finetune
from fluxjax.train.data.clips import Length, Piece, measure_clip, pieces, read_piece, speed
from fluxjax.train.data.dataset import Dataset, open_dataset
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.encoders import Encoders
from fluxjax.train.flow_matching import assemble, path_loss, predict
from fluxjax.train.job import Placement, train
from fluxjax.train.metrics import read_metrics
from fluxjax.train.recipe import FinetuneRecipe, read_recipe
from fluxjax.train.settings import ConditionKinds, Objective, OptimizerSettings, ValidationSettings
from fluxjax.train.task import conditions_of, learnt

av = pytest.importorskip("av")
RECIPES = Path(__file__).parents[1] / "train"


def moving(frames: int, size: tuple[int, int] = (48, 32), seed: int = 0) -> np.ndarray:
    """Of large spots, so that few bits keep them; every frame is lighter than the one before."""
    rng = np.random.default_rng(seed)
    spots = rng.integers(0, 100, (size[1] // 16, size[0] // 16, 3))
    wide = np.kron(spots, np.ones((16, 16, 1), int))
    return np.stack([wide + 4 * i for i in range(frames)]).astype(np.uint8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Four of 5 frames, one of 9 at twice the speed, two stills; a damaged one, one too short."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        write_clip(folder / f"{number}.mp4", [moving(6, seed=number)], fps=12, frames=6)
    write_clip(folder / "fast.mp4", [moving(17, seed=9)], fps=24, frames=17)
    write_clip(folder / "short.mp4", [moving(4)], fps=12, frames=4)
    for still in folder.glob("*.png"):
        still.unlink()
    whole = (folder / "0.mp4").read_bytes()
    (folder / "damaged.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    for seed, name in enumerate("ab"):
        Image.fromarray(moving(1, seed=seed)[0]).save(folder / f"{name}.png")
    for file in [*folder.iterdir()]:
        file.with_suffix(".txt").write_text(f"spots of {file.stem}")
    return folder


def settings_of(clips: Path, cache: Path, **changes: Any) -> DataSettings:
    own: dict[str, Any] = {"frames": (1, 5, 9), "fps": 12, "motion": 2, "max_bad_share": 0.5}
    return DataSettings(
        source=str(clips),
        resolution=48,
        bucket_step=16,
        cache=str(cache),
        **own | changes,
    )


ENCODERS = Encoders(
    lambda clips: np.moveaxis(clips if clips.ndim == 5 else clips[:, None], -1, 1)[
        :, :, ::4, ::8, ::8
    ],
    lambda texts: Conditioning(np.array([[[len(text)]] for text in texts], np.float32), None, None),
    "image",
    "text",
    lambda masks: None,
    lambda texts: None,
    lambda latents: np.moveaxis(latents, 1, -1),
    prompt_of=OPEN_SORA.prompt_of,
    latents_of=SMALL.latent_frames,
    frames_of=SMALL.frames_of,
    unit=16,
    scale=8,
)


def opened(settings: DataSettings, **changes: Any) -> Dataset:
    options: dict[str, Any] = {"batch": 2, "seed": 3, "channels": ("given",)} | changes
    return open_dataset(settings, ENCODERS, **options)


def test_pieces_have_the_longest_length_at_the_speed_that_is_learnt():
    assert (
        speed(30.0, 24) == (2, 15) and speed(23.976, 24) == (1, 24) and speed(60.0, 24) == (3, 20)
    )
    settings = DataSettings(frames=(33, 65), fps=24, pieces=40)
    found = [*pieces("abc", Length((8, 8), 100, 30.0), settings)]
    assert {(one.count, one.stride) for one in found} == {(33, 2)}
    starts = [one.start for one in found]
    assert (
        min(starts) < 6
        and 29 < max(starts) <= 35
        and found == [*pieces("abc", Length((8, 8), 100, 30.0), settings)]
    )
    with pytest.raises(ValueError, match=r"it has 16 frames at 15 a second, and the .* has 33"):
        next(pieces("abc", Length((8, 8), 32, 30.0), settings))


def test_a_piece_has_its_own_frames(clips, tmp_path):
    content = (clips / "fast.mp4").read_bytes()
    assert measure_clip(content, 1.0) == Length((48, 32), 17, 24.0)
    found = read_piece(content, Piece(2, 5, 3), 32, 32, 1.0)
    expected = moving(17, seed=9)[2:15:3, :, 8:40] / 127.5 - 1
    assert found.shape == (5, 32, 32, 3) and np.abs(found - expected).mean() < 0.04
    tail = read_piece(content, Piece(2, 5, 3).part(4, 1), 32, 32, 1.0)
    np.testing.assert_array_equal(tail, found[4:])
    with av.open(str(tmp_path / "old.avi"), "w") as container:  # begins as a WebP does
        stream = container.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj444p"
        for pixels in moving(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert measure_clip((tmp_path / "old.avi").read_bytes(), 1.0) == Length((48, 32), 3, 24.0)
    write_clip(tmp_path / "animated.webp", [moving(17, seed=9)], fps=24, frames=17)
    content = (tmp_path / "animated.webp").read_bytes()
    assert measure_clip(content, 1.0).frames == 17
    assert measure_clip(content, 1.0).fps == pytest.approx(24, rel=2e-3)  # whole milliseconds
    found = read_piece(content, Piece(2, 5, 3), 32, 32, 1.0)
    assert np.abs(found - expected).mean() < 0.04
    with pytest.raises(ValueError, match="cannot be decoded"):
        measure_clip(content[: len(content) // 2], 1.0)
    with pytest.raises(ValueError, match=r"more than 0\.001 megapixels a frame"):
        measure_clip(content, 0.001)


@pytest.mark.slow
def test_clips_are_sorted_by_length_and_bad_ones_named(clips, tmp_path):
    data = opened(settings_of(clips, tmp_path))
    assert data.sizes == {(48, 32, 5): 4, (48, 32): 2, (48, 32, 9): 1}
    assert dict(data.quarantined).keys() == {"damaged.mp4", "short.mp4"}
    assert dict(data.quarantined)["damaged.mp4"].startswith("it cannot be decoded (")
    without = opened(settings_of(clips, tmp_path, frames=(5, 9)))
    reasons = dict(without.quarantined)
    assert reasons["a.png"] == "it is a still picture, and frames has no 1"
    assert reasons["short.mp4"] == (
        "it has 4 frames at 12 a second, and the shortest that is learnt has 5"
    )
    assert data.fingerprint != without.fingerprint
    with pytest.raises(ValueError, match=r"2 of 9 clips of .* damaged\.mp4: it cannot be decoded"):
        opened(settings_of(clips, tmp_path, max_bad_share=0.1))


@pytest.mark.slow
def test_all_come_equally_often_in_batches_of_their_own(clips, tmp_path):
    data = opened(settings_of(clips, tmp_path, batches=(4, 2, 1)), batch=4)
    seen: Counter[str] = Counter()
    rows, indices = [], []
    for step in range(4 * 2 + 2 + 4):  # a cycle: 4 * 4 / 2 of 5 frames, 2 of stills, 4 of 9 frames
        batch = data(step)
        rows.append((batch.frames, len(batch.index)))
        indices += batch.index.tolist()
        seen.update(str(text) for text in batch.conditioning.sequence[:, 0, 0])
    assert Counter(rows) == {(5, 2): 8, (1, 4): 2, (9, 1): 4}
    assert len(set(indices)) == len(indices) == 28
    first, second = (opened(data._settings, batch=4, process_index=i) for i in (0, 0))
    np.testing.assert_array_equal(first(3).latents, second(3).latents)
    halves = [
        opened(
            settings_of(clips, tmp_path, batches=(4, 2, 2)),
            batch=4,
            process_index=i,
            process_count=2,
        )(1)
        for i in (0, 1)
    ]
    whole = opened(settings_of(clips, tmp_path, batches=(4, 2, 2)), batch=4)(1)
    for name in ("latents", "channels", "index"):
        both = np.concatenate([getattr(half, name) for half in halves])
        np.testing.assert_array_equal(both, getattr(whole, name))


@pytest.mark.slow
def test_given_frames_are_encoded_by_themselves_and_drawn_by_index(clips, tmp_path):
    asked = []

    def encode(pictures):
        asked.append(pictures.shape[1] if pictures.ndim == 5 else 0)
        return ENCODERS.encode_image(pictures)

    kinds = ConditionKinds(t2v=1.0, i2v_head=1.0, i2v_loop=1.0, i2v_tail=1.0)
    options: dict[str, Any] = {"batch": 2, "seed": 3, "channels": ("given",), "kinds": kinds}
    settings = settings_of(clips, tmp_path)
    data = open_dataset(settings, ENCODERS._replace(encode_image=encode), **options)
    data.fill()
    # Of each of 5 clips the whole, its first and its last frame; two stills.
    assert Counter(asked) == {5: 4, 9: 1, 1: 10, 0: 2}
    asked.clear()
    found = set()
    for step in range(24):
        batch = data(step)
        assert batch.channels is not None
        mask, given = batch.channels[..., 0], batch.channels[..., 1:]
        assert mask.shape == batch.latents.shape[:-1]
        for row in range(2):
            kind = tuple(mask[row, :, 0, 0])
            found.add(kind)
            for frame, is_given in enumerate(kind):
                wanted = batch.latents[row, frame] if is_given else 0
                if frame == 0 or not is_given:  # these encoders see first frames in any clip
                    np.testing.assert_array_equal(given[row, frame], wanted + 0 * given[row, frame])
                else:
                    assert given[row, frame].std() > 0
    assert {(0, 0), (1, 0), (0, 1), (1, 1), (0,)} <= found
    assert not asked, "all is kept"
    options["kinds"] = ConditionKinds(
        t2v=0.0, i2v_head=0.0, i2v_loop=0.0, i2v_tail=0.0, v2v_head=1.0
    )
    with pytest.raises(ConfigError, match="clip of 2 latent frames is too short for v2v_head"):
        open_dataset(settings, ENCODERS, **options)


def test_prompts_say_how_fast_a_clip_is(clips, tmp_path):
    said = []

    def encode_text(texts):
        said.extend(texts)
        return ENCODERS.encode_text(texts)

    options: dict[str, Any] = {"batch": 2, "seed": 3}
    slow = settings_of(clips, tmp_path, frames=(1, 9), fps=24, max_bad_share=0.7)
    open_dataset(slow, ENCODERS._replace(encode_text=encode_text), **options).fill()
    assert "spots of fast. 24 FPS. 2 motion score." in said and "" in said


@pytest.mark.slow
def test_an_encoder_that_is_dropped_says_what_the_empty_prompt_says():
    heard, empty = (
        Conditioning(np.full((n, 3, 4), v), None, np.full((n, 5), v))
        for n, v in ((4, 1.0), (1, 7.0))
    )
    dropped = jnp.array([[False, False], [True, False], [False, True], [True, True]])
    assert OPEN_SORA.silenced is not None
    found = OPEN_SORA.silenced(SMALL, heard, empty, dropped)
    np.testing.assert_array_equal(np.asarray(found.vector)[:, 0], [1, 7, 1, 7])
    np.testing.assert_array_equal(np.asarray(found.sequence)[:, 0, 0], [1, 1, 7, 7])


def test_what_is_no_data_of_clips_is_one_sentence(clips, tmp_path, monkeypatch):
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"frames": (5, 5)}, "frames names a length twice: 5, 5"),
        ({"frames": (0,)}, "frames must be from 1 to"),
        ({"frames": (5,), "batches": (1, 2)}, "in an update: got 2 for 1"),
        ({"frames": (5,), "references": "before"}, "clips have no references"),
        ({"motion": 9}, "motion must be from 1 to 7, or 0, got 9"),
    )
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            DataSettings(**changes)
    with pytest.raises(ConfigError, match=r"data\.batches are at most batch 2, got 4"):
        FinetuneRecipe(batch=2, data=DataSettings(frames=(5,), batches=(4,)))
    only = tmp_path / "only"
    only.mkdir()
    (only / "1.mp4").write_bytes((clips / "1.mp4").read_bytes())
    (only / "1.txt").write_text("spots")
    with pytest.raises(
        ConfigError, match=r"holds no pictures; it holds clips: say with data\.frames"
    ):
        opened(settings_of(only, tmp_path, frames=()))
    animated = tmp_path / "animated"
    animated.mkdir()
    write_clip(animated / "1.webp", [moving(6)], fps=12, frames=6)
    Image.fromarray(moving(1)[0]).save(animated / "still.webp", lossless=True)
    for name in ("1", "still"):
        (animated / f"{name}.txt").write_text("spots")
    for still in animated.glob("*.png"):
        still.unlink()
    kept = opened(settings_of(animated, tmp_path, frames=()))
    assert dict(kept.quarantined) == {"1.webp": "it has 6 frames, and only still pictures are used"}
    monkeypatch.setitem(sys.modules, "av", None)
    # Animated pictures are clips too, which Pillow reads.
    data = opened(settings_of(animated, tmp_path, frames=(1, 5)))
    assert data.sizes == {(48, 32, 5): 1, (48, 32): 1}
    with pytest.raises(
        ConfigError, match=r"only: videos need PyAV: pip install 'fluxjax\[video\]'"
    ):
        opened(settings_of(only, tmp_path))


def test_what_a_model_that_begins_with_a_picture_learns_from():
    config = HunyuanVideoImageToVideoPipelineConfig()
    clip = DataSettings(frames=(5,))
    assert learnt(FinetuneRecipe(data=clip), config)[1].pictures == {"reference"}
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"data": DataSettings()}, r"name lengths above 1 in data\.frames"),
        ({"data": DataSettings(frames=(1, 5))}, r"in data\.frames, and leave out 1"),
        ({"validation": ValidationSettings(prompts=("a",))}, r"in validation\.references"),
    )
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            learnt(replace(FinetuneRecipe(data=clip), **changes), config)
    other = Objective(kinds=ConditionKinds(t2v=2.0))
    with pytest.raises(ConfigError, match=r"objective\.kinds is of Open-Sora; tiny is given the"):
        conditions_of(FinetuneRecipe(data=clip, objective=other), config)


def small(name: str, model: Path, clips: Path, folder: Path, **changes: Any) -> FinetuneRecipe:
    """A recipe of train/ for the small model."""
    recipe = read_recipe(RECIPES / f"{name}.toml")
    validation = ValidationSettings(
        every=2, prompts=("a red ball",), seeds=(0, 7), steps=2, batches=1, frames=5
    )
    data = settings_of(clips, folder.parent / "cache", frames=(1, 5), batches=(8, 8))
    own: dict[str, Any] = {"steps": 4, "batch": 8, "log_every": 1, "mesh": "", "dtype": "float32"}
    own |= {"save_dtype": "float32", "data": data, "validation": validation}
    return replace(recipe, model=str(model), folder=folder, **own | changes)


def test_what_validation_cannot_draw_is_refused_before_data_are_read(
    open_sora,  # noqa: F811
    tmp_path,
):
    file = str(tmp_path / "first.png")
    Image.new("RGB", (48, 32)).save(file)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"references": (file,), "frames": 1}, r"first frames of clips: give validation\.frames"),
        ({"images": (file,), "masks": (file,)}, r"validation: this .* given an image and a mask"),
    )
    for given, message in wrong:
        validation = ValidationSettings(prompts=("a ball",), **given)
        recipe = small("lora_open_sora", open_sora, tmp_path / "none", tmp_path / "run")
        with pytest.raises(ConfigError, match=message):
            finetune.prepare(replace(recipe, validation=validation))
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def run(open_sora, clips, tmp_path_factory):  # noqa: F811
    """(recipe, job, the LoRA's file)."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    recipe = small("lora_open_sora", open_sora, clips, folder)
    job = finetune.prepare(recipe)
    return recipe, job, train(recipe, job)


@pytest.mark.slow
def test_a_lora_is_learnt_from_clips_and_stills(run):
    recipe, job, path = run
    assert [note.split(":")[0] for note in job.notes] == [
        "left out damaged.mp4",
        "left out short.mp4",
    ]
    names = {name.rsplit(".lora_", 1)[0] for name in read_safetensors(path)[0]}
    assert "transformer.transformer_blocks.0.attn.to_q" in names
    rows = read_metrics(recipe.folder / "metrics.jsonl")
    assert {job.data(step).frames for step in range(4)} == {1, 5}
    assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
    moved = jax.tree.map(lambda x: float(jnp.abs(x).max()), job_state(recipe))
    assert min(jax.tree.leaves(moved)) > 0
    with Image.open(recipe.folder / "validation/0000004.png") as sheet:
        assert sheet.size == (2 * 52 + 4, 36 + 4)
    for seed in (0, 7):
        clip = read_clip(recipe.folder / f"validation/0000004-1-seed{seed}{usual_suffix()}")
        assert clip.frames.shape == (5, 32, 48, 3) and clip.fps == 24
        assert (recipe.folder / f"validation/0000004-1-seed{seed}-last.png").is_file()


def job_state(recipe: FinetuneRecipe):
    """What was learnt, as its last checkpoint has it."""
    return read_state(recipe.folder / "checkpoints", "params")[1]


@pytest.fixture(scope="module")
def hunyuan(hunyuan_video, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("hunyuan") / "model"
    return with_shorter_words(shutil.copytree(hunyuan_video, folder))


def with_shorter_words(folder: Path) -> Path:
    """So that the template without a prompt is as long as Llama's."""
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace(r"\\w+", r"\\w{1,12}"))
    return folder


@pytest.fixture(scope="module")
def hunyuan_run(hunyuan, clips, tmp_path_factory):
    """As `run`, on a mesh that splits tokens, some of which are text that pads."""
    folder = tmp_path_factory.mktemp("hunyuan_video") / "lora"
    validation = ValidationSettings(
        every=2, prompts=("light",), seeds=(0,), steps=2, batches=1, frames=5, width=48, height=32
    )
    recipe = small(
        "lora_hunyuan_video",
        hunyuan,
        clips,
        folder,
        steps=2,
        batch=4,
        mesh="sequence=2",
        data=settings_of(clips, folder.parent / "cache", frames=(5,), motion=4),
        validation=validation,
        optimizer=OptimizerSettings(learning_rate=0.05, warmup=0),
    )
    job = finetune.prepare(recipe)
    return recipe, job, train(recipe, job)


@pytest.mark.slow
def test_what_hunyuan_video_learns_is_heard_by_diffusers(hunyuan_run, hunyuan):
    recipe, job, path = hunyuan_run
    assert "left out damaged.mp4: it cannot be decoded" in job.notes[2]
    assert (recipe.folder / f"validation/0000002-1-seed0{usual_suffix()}").is_file()
    family, leaves = family_of(job.config.class_name), job.frozen
    rows, ids, mu = Placement(job.mesh, job.config)(job.data(0))
    assert np.exp(mu) == pytest.approx(7.0), "times are shifted as in sampling"
    mask = np.asarray(rows.conditioning.mask)
    assert len({*mask.sum(axis=1)}) > 1 and not mask.all(axis=1).any(), "all texts are padded"
    way, t = family.path(job.config), jnp.array([0.1, 0.4, 0.7, 0.95])
    latents = np.asarray(rows.latents)
    noise = np.random.default_rng(0).standard_normal(latents.shape, np.float32)
    x = np.asarray(way.state(t).of(latents, noise))
    np.testing.assert_allclose(way.target(t).of(latents, noise), noise - latents, atol=1e-6)
    drawn = jax.jit(
        partial(predict, family, job.model, apply=partial(apply_on, job.mesh, sequence="auto")),
        static_argnames="guidance",
    )
    params = assemble("transformer", job.model, job_state(recipe), leaves)["transformer"]
    found = drawn(variables(params), x, rows, way.told(t), ids, guidance=1.0)

    theirs = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(hunyuan / "transformer")
    heard = [torch.tensor(np.asarray(one, np.float32)) for one in rows.conditioning[:3]]

    def expected() -> np.ndarray:
        with torch.no_grad():
            (velocity,) = theirs(
                torch.tensor(np.moveaxis(x, -1, 1)),
                torch.tensor(1000 * np.asarray(t)),
                *heard,
                guidance=torch.full((4,), 1000.0),
                return_dict=False,
            )
        return np.moveaxis(velocity.numpy(), 1, -1)

    before = expected()
    theirs.load_lora_adapter(load_file(path), prefix="transformer")
    after = expected()
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_allclose(found, after, atol=1e-4)


@pytest.fixture(scope="module", params=["token_replace", "latent_concat"])
def first_frame_run(request, shared, clips, tmp_path_factory):
    """As `run`, of a model that begins with a first frame."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_hunyuan_video(folder / "model", shared / "tokenizers", request.param)
    with_shorter_words(model)
    Image.new("RGB", (60, 30), (90, 30, 60)).save(folder / "first.png")
    validation = ValidationSettings(
        every=2 if request.param == "latent_concat" else 0,
        prompts=("light",),
        references=(str(folder / "first.png"),),
        seeds=(0,),
        steps=2,
        batches=1,
        frames=9,
        width=48,
        height=32,
    )
    recipe = small(
        "lora_hunyuan_video_i2v",
        model,
        clips,
        folder / "lora",
        steps=2,
        batch=4,
        mesh="sequence=2",
        data=settings_of(clips, folder / "cache", frames=(5,)),
        validation=validation,
        optimizer=OptimizerSettings(learning_rate=0.05, warmup=0),
    )
    job = finetune.prepare(recipe)
    return recipe, job, train(recipe, job), model, request.param


@pytest.mark.slow
def test_a_model_that_begins_with_a_picture_learns_from_first_frames(first_frame_run):
    """What it learns is drawn by diffusers; of the error a frame that is replaced is none."""
    recipe, job, path, model, kind = first_frame_run
    if kind == "latent_concat":  # the first four frames are those of the place of what is given
        shown = read_clip(recipe.folder / f"validation/0000002-1-seed0{usual_suffix()}")
        assert shown.frames.shape == (5, 32, 48, 3)
    rows, ids, _ = Placement(job.mesh, job.config)(job.data(0))
    given = np.moveaxis(np.asarray(rows.channels), -1, 1)
    assert (given[:, 0] == [[[[1]], [[0]]]]).all() and not given[:, 1:, 1:].any()
    heard = np.asarray(rows.conditioning.sequence)
    assert len({one.tobytes() for one in heard[:, :100]}) == 4, "each hears its own picture"
    quantile, noise = 0.5, np.random.default_rng(0).standard_normal(rows.latents.shape, np.float32)
    t = np.full(4, quantile, np.float32)
    latents = np.asarray(rows.latents)
    params = assemble("transformer", job.model, job_state(recipe), job.frozen)["transformer"]
    family = family_of(job.config.class_name)
    of = family, family.path(job.config), job.model, recipe.objective
    apply = partial(apply_on, job.mesh)
    found = jax.jit(lambda *given: path_loss(*of, *given, ids, apply))(
        variables(params), rows, noise, t
    )

    pipe = diffusers.HunyuanVideoImageToVideoPipeline.from_pretrained(model)
    pipe.load_lora_weights(path)
    x = np.moveaxis(0.5 * latents + 0.5 * noise, -1, 1)
    if kind == "token_replace":
        x[:, :, :1] = given[:, 1:, :1]
    else:
        x = np.concatenate([x, given[:, 1:], given[:, :1]], axis=1)
    guidance = torch.full((4,), 1000.0) if kind == "token_replace" else None
    with torch.no_grad():
        (velocity,) = pipe.transformer(
            torch.tensor(x),
            torch.full((4,), 1000 * quantile),
            *(torch.tensor(np.asarray(one, np.float32)) for one in rows.conditioning[:3]),
            guidance=guidance,
            return_dict=False,
        )
    error = np.square(velocity.numpy() - np.moveaxis(noise - latents, -1, 1))
    expected = error[:, :, 1:].mean() if kind == "token_replace" else error.mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "hunyuan_run"])
def test_a_killed_run_goes_on_bit_for_bit(name, request, tmp_path):
    straight, job, path = request.getfixturevalue(name)
    recipe = replace(
        straight, folder=tmp_path / "run", save_minutes=0.0, validation=ValidationSettings(every=0)
    )
    seen: list[int] = []
    stop = recipe.steps // 2

    def advance(state, *rest):
        if int(state.step) == len(seen) == stop and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        seen.append(int(state.step))
        return job.step(state, *rest)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, finetune.prepare(recipe)._replace(step=advance))
    (tmp_path / "again").touch()
    again = train(recipe, finetune.prepare(recipe)._replace(step=advance))
    assert seen == [*range(recipe.steps)]
    for one, other in zip(*map(jax.tree.leaves, map(job_state, (straight, recipe))), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    losses = [
        [(row["step"], row["loss"]) for row in read_metrics(one.folder / "metrics.jsonl")]
        for one in (straight, recipe)
    ]
    assert losses[0] == losses[1]
    found, expected = (read_safetensors(file)[0] for file in (again, path))
    assert all((found[name].read() == expected[name].read()).all() for name in expected)


@pytest.mark.slow
def test_all_of_it_is_learnt_on_a_mesh_that_splits_tokens(run, open_sora, clips, tmp_path):  # noqa: F811
    """A LoRA begins as nothing: the first loss is that of one device."""
    straight, _, _ = run
    recipe = small(
        "full_open_sora",
        open_sora,
        clips,
        tmp_path / "full",
        steps=1,
        mesh="fsdp=2,sequence=2,data=2",
        validation=ValidationSettings(every=0),
    )
    recipe = replace(recipe, data=replace(recipe.data, cache=straight.data.cache))
    folder = train(recipe, finetune.prepare(recipe))
    first, other = (
        read_metrics(one.folder / "metrics.jsonl")[0]["loss"] for one in (straight, recipe)
    )
    assert first == pytest.approx(other, rel=1e-5)
    file = "transformer/diffusion_pytorch_model.safetensors"
    old, new = (read_safetensors(one / file)[0] for one in (open_sora, folder))
    assert old.keys() == new.keys()
    assert (folder / "vae").is_dir() and (folder / "tokenizer_2").is_dir()
    moved = [np.abs(old[name].read() - new[name].read()).max() for name in old]
    assert np.median(moved) > 1e-7
