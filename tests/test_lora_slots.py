"""Adapters that each call, and each picture, chooses: one program, and the pictures of `loras`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hunyuan_video_folders import hunyuan_video  # noqa: F401
from open_sora_folders import open_sora  # noqa: F401

import fluxjax
from fluxjax.checkpoint.lora.writer import write_lora
from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import TINY, ConfigError, LoraConfig, PipelineConfig
from fluxjax.config.lora import TextEncoder
from fluxjax.models.dense import Dense
from fluxjax.models.lora import init_lora, stack_passes
from fluxjax.sample.executables import Executables

MESH = "fsdp=2,tensor=2,sequence=2"
SIZE = {"width": 64, "height": 48, "steps": 2, "max_sequence_length": 16}
CODES = {"quantise": "transformer=int8"}  # over which an adapter stays beside the weights


def lora_file(
    path: Path,
    seed: int,
    targets: tuple[str, ...],
    rank: int,
    model: PipelineConfig = TINY,
    texts: tuple[TextEncoder, ...] = ("clip", "t5"),
) -> Path:
    """Of the transformer and text encoders."""
    config = LoraConfig(rank=rank, targets=targets, text_encoders=texts)
    rng, trees = np.random.default_rng(seed), {}
    for component, own in config.components_of(model).items():
        template = abstract_params(model.networks[component])
        tree = init_lora(jax.random.key(seed), template, own)
        trees[component] = jax.tree.map(
            lambda leaf: leaf if leaf.any() else 0.3 * rng.standard_normal(leaf.shape, np.float32),
            tree,
        )
    write_lora(path, trees, model=model.networks)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("slots")
    one = lora_file(folder / "one.safetensors", 1, ("attn.to_[qk]", "norm1.linear", "proj_mlp"), 3)
    return one, lora_file(folder / "two.safetensors", 2, ("ff.net.2", "attn.to_q", "proj_out"), 2)


def test_rows_of_a_batch_have_adapters_of_their_own() -> None:
    """Rows of a picture lie together; passes are stacked in the batch."""
    dense, rng = Dense(7), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2 * 2 * 3, 5)), jnp.float32)  # passes, pictures, steps
    params = dense.init(jax.random.key(0), x)["params"]
    a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 4), (4, 7)))
    scale = jnp.asarray([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, -2.0, 0.0]])
    adapted = {"params": params, "lora": {"a": a, "b": b, "scale": scale}}
    got = dense.apply(stack_passes(adapted, 2), x)
    plain = dense.apply({"params": params}, x).reshape(2, 2, 3, 7)
    for i, factors in enumerate(scale):
        expected = plain[:, i] + (x.reshape(2, 2, 3, 5)[:, i] @ a * factors[None, None]) @ b
        np.testing.assert_allclose(got.reshape(2, 2, 3, 7)[:, i], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, texts", [("open_sora", ("clip", "t5")), ("hunyuan_video", ("clip",))]
)
def test_clips_have_adapters_of_their_calls(family, texts, request, tmp_path) -> None:
    """As those that a pipeline is opened with; a Llama has none."""
    folder: Path = request.getfixturevalue(family)
    config, targets = read_config(folder), ("attn.to_q", "ff.net.2", "proj_mlp")
    file = lora_file(tmp_path / "lora.safetensors", 1, targets, 2, config, texts)
    asked: dict[str, Any] = {"frames": 5, "width": 32, "height": 32, "steps": 2, "seed": 1}

    def draw(pipe: Any, **lora: Any) -> np.ndarray:
        return np.asarray(pipe("a storm", **asked, **lora)[0].frames, int)

    pipe = fluxjax.load_pipeline(folder, lora_slots=3)
    none, chosen = draw(pipe), draw(pipe, lora=[(file, 0.7)])
    expected = draw(fluxjax.load_pipeline(folder, loras=[(file, 0.7)]))
    assert np.abs(chosen - expected).max() <= 1 < np.abs(chosen - none).max()


@pytest.mark.slow
def test_calls_choose_adapters_without_compiling(files, monkeypatch, tmp_path) -> None:
    one, two = files
    compiled, plain = [], Executables.compile
    monkeypatch.setattr(
        Executables,
        "compile",
        lambda self, program: compiled.append(program.name) or plain(self, program),
    )
    pipe = fluxjax.load_pipeline("tiny", lora_slots=6, scan_layers=True, **CODES)

    def draw(pipe, **lora):
        prompts, seeds = ["a red circle", "two blue squares"], [3, 4]
        return np.asarray(
            [
                np.asarray(p, int)
                for p in pipe(
                    prompts, seed=seeds, true_cfg=2.0, negative_prompt="a star", **SIZE, **lora
                )
            ]
        )

    none = draw(pipe)
    first = compiled.count("denoise"), len(compiled)
    assert first[0] == 1
    chosen = {
        "one": draw(pipe, lora=[(one, 0.7)]),
        "two": draw(pipe, lora=[f"{two}:-0.5"]),
        "both": draw(pipe, lora=[(one, 0.7), (two, -0.5)]),
        "mixed": draw(pipe, lora=[[(one, 0.7)], [(two, -0.5)]]),
        "again": draw(pipe, lora=[]),
    }
    assert (compiled.count("denoise"), len(compiled)) == first, "another adapter was compiled for"
    np.testing.assert_array_equal(chosen["again"], none)
    np.testing.assert_array_equal(chosen["mixed"][0], chosen["one"][0])
    np.testing.assert_array_equal(chosen["mixed"][1], chosen["two"][1])
    assert all(np.abs(chosen[name] - none).mean() > 1 for name in ("one", "two", "both"))
    expected = draw(fluxjax.load_pipeline("tiny", loras=[(one, 0.7), (two, -0.5)], **CODES))
    assert np.abs(chosen["both"] - expected).max() <= 1
    spread = fluxjax.load_pipeline("tiny", lora_slots=6, scan_layers=True, mesh=MESH, **CODES)
    mixed = draw(spread, lora=[[(one, 0.7)], [(two, -0.5)]])
    assert np.abs(mixed - chosen["mixed"]).max() <= 1
    before = len(compiled)
    assert np.abs(draw(spread) - none).max() <= 1
    assert len(compiled) == before, "another adapter was compiled for on a mesh"
    picture = pipe("a star", seed=1, lora=[(one, 0.7)], **SIZE)[0]
    assert picture.info["fluxjax made"].sources.lora == (f"{one}:0.7",)


def test_what_does_not_fit_the_slots_is_refused(files, tmp_path, shared) -> None:
    one, two = files
    pipe = fluxjax.load_pipeline("tiny", lora_slots=4)
    with pytest.raises(ConfigError, match=r"rank 5 together .* lora_slots=5"):
        pipe("a star", lora=[one, two])
    with pytest.raises(ConfigError, match="lora has 3 lists for 1 prompts"):
        pipe("a star", lora=[[one], [], []])
    with pytest.raises(ConfigError, match="more than add low-rank products"):
        pipe("a star", lora=[shared / "goldens" / "lora" / "lokr_kohya.safetensors"])
    endless = [(one, float("nan"))]
    for call in (
        lambda: pipe("a star", lora=endless),
        lambda: fluxjax.load_pipeline(loras=endless),
    ):
        with pytest.raises(ConfigError, match=r"scale must be a number within 1e\+30, got nan"):
            call()
    for given in (f"{one}:0.7", (one, 0.7), [(one, 0.7)], [[f"{one}:0.7"]]):
        assert pipe.slots is not None and pipe.slots.each(given, 1, 1) == [{str(one): 0.7}]
    with pytest.raises(ConfigError, match="load the pipeline with lora_slots=RANK"):
        fluxjax.load_pipeline("tiny")("a star", lora=[one])
    for wrong in ({"lora_slots": -1}, {"lora_slots": 4, "loras": [one]}):
        with pytest.raises(ConfigError, match="lora_slots"):
            fluxjax.load_pipeline("tiny", **wrong)
