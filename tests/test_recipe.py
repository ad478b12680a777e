"""Recipes: what is refused and how, overrides, and what they decide about."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from fluxjax.config import TINY, ConfigError
from fluxjax.parallel.hosts import differences
from fluxjax.train import command
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.embedded.diffusion import TinyPixArtRecipe, TinySDRecipe
from fluxjax.train.embedded.tiny import TinyRecipe
from fluxjax.train.embedded.tiny_video import TinyVideoRecipe
from fluxjax.train.recipe import (
    FinetuneRecipe,
    deciding_values,
    read_recipe,
    recipe_toml,
    without_places,
)
from fluxjax.train.settings import ValidationSettings

RECIPES = sorted((Path(__file__).parents[1] / "train").glob("*.toml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz = 3", r"unknown key 'stepz'; did you mean 'steps'\?"),
        ("[optimizer]\nlearning_rat = 3", r"\[optimizer\]: .* did you mean 'learning_rate'\?"),
        ("zzz = 3", "unknown key 'zzz'; known are model, folder"),
        ("steps = 'many'", "steps must be int, got 'many'"),
        ("steps = true", "steps must be int, got True"),
        ("steps = 2.5", "steps must be int"),
        ("[optimizer]\nname = 'adamv'", "must be one of adamw, .* did you mean 'adamw'"),
        ("[validation]\nseeds = 3", "seeds must be a list of int, got 3"),
        ("[lora]\ntargets = [1]", "targets must be a list of a string"),
        ("lora = 3", "lora must be a table"),
        (
            "task = 'finetun'",
            "task must be one of finetune, embedded, embedded-sd, embedded-pixart, embedded-video, "
            "got 'finetun'",
        ),
        ("[lora]\nrank = 0", r"\[lora\]: the LoRA's rank must be from 1 to 65536, got 0"),
        ("[lora]\nrank = 10000000000", "got 10000000000"),
        ("steps = 0", "steps must be at least 1"),
        ("batch = 6\naccumulate = 4", "batch 6 cannot be computed in accumulate 4"),
        ("[objective]\ncaption_dropout = 1.5", "caption_dropout must be in"),
        ("[optimizer]\nb2 = 1.0", "b2 must be in"),
        ("steps = ", "is not TOML"),
        (
            "optimizer.learning_rate = nan",
            "optimizer.learning_rate must be a finite number, got nan",
        ),
        ("save_minutes = inf", "save_minutes must be a finite number, got inf"),
        ("[objective]\nmean = -inf", "objective.mean must be a finite number"),
        (f"ema_decay = 1{'0' * 400}", "ema_decay must be a finite number, got inf"),
        (f"steps = 1{'0' * 9999}", "is not TOML: Exceeds the limit"),
        (
            f"steps = 0x1{'0' * 9999}",
            "steps must be a number of 64 bits, got a number of",
        ),
        (f"model = {'[' * 5000}", "nested too deeply"),
        (f"[{'a.' * 99_999}b]", "nested too deeply"),
        (f"x = {{{'a . ' * 99_999}b = 1}}", "nested too deeply"),
        ("a = 1" + " " * 2**20, "it has more than 1 MiB"),
        ("quantise = 'int3'", "quantise must be one of int8, fp8, nf4"),
        ("method = 'full'\nquantise = 'nf4'", "quantise nf4 is for the frozen base of a LoRA"),
        ("model = ''", "model is empty: give a folder, a hub's name, or tiny"),
        ("[data]\nsource = ''", "source is empty"),
        ("patience = 0", "patience must be at least 1, got 0"),
        ("keep = 0", "keep must be at least 1"),
        ("seed = 5000000000", "seed must be from 0 to 4294967295, got 5000000000"),
        ("seed = -1", "seed must be from 0"),
        ("hang_minutes = 0", "hang_minutes must be above 0 and at most a year"),
        ("hang_minutes = 1e300", "hang_minutes must be above 0 and at most a year"),
        ("save_minutes = -1", "save_minutes must not be negative"),
        ("export_every = -1", "export_every must not be negative"),
        ("steps = 100_000_000\nbatch = 64", "more than the 2147483644 pictures"),
        ("[data]\nbucket_step = 0", "bucket_step must be above 0"),
        ("[data]\nresolution = 1_000_000", "resolution must be above 0 and at most 32768"),
    ],
)
def test_mistakes_are_named(tmp_path, text, words):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_recipe(tmp_path / "recipe.toml")


def test_values_become_the_types_of_their_fields(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        "folder = 'x'\nema_decay = 0\n[optimizer]\nlearning_rate = 1\n"
        "[data]\nscene_sizes = [[32, 48]]\n[validation]\nseeds = [4, 5]"
    )
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert recipe.folder == Path("x") and recipe.validation.seeds == (4, 5)
    assert isinstance(recipe.optimizer.learning_rate, float) and recipe.ema_decay == 0.0
    assert recipe.data.scene_sizes == ((32, 48),)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read_back_as_they_are_printed(path, tmp_path):
    recipe = read_recipe(path)
    embedded = {
        "tiny": TinyRecipe,
        "tiny_sd": TinySDRecipe,
        "tiny_pixart": TinyPixArtRecipe,
        "tiny_video": TinyVideoRecipe,
    }
    assert isinstance(recipe, embedded.get(path.stem, FinetuneRecipe))
    (tmp_path / "again.toml").write_text(recipe_toml(recipe))
    assert read_recipe(tmp_path / "again.toml") == recipe


def test_every_text_is_read_back_as_it_was(tmp_path):
    """Every character of the first planes, in a prompt by itself and in a random neighbourhood."""
    drawn = random.Random(0)
    characters = [chr(n) for n in range(0x3100) if not 0xD800 <= n < 0xE000]
    characters += [chr(drawn.randrange(0xE000, 0x110000)) for _ in range(500)]
    odd = ['"', "\\", "\x7f", "\r\n", "\0", "\x1b", "'", "#", "\ufeff", "\u2028"]
    mixed = ["".join(drawn.choices(odd + characters, k=20)) for _ in range(500)]
    prompts = (*odd, "".join(characters), *mixed)
    recipe = replace(
        FinetuneRecipe(), validation=ValidationSettings(prompts=prompts), model=mixed[0] + "x"
    )
    (tmp_path / "recipe.toml").write_bytes(recipe_toml(recipe).encode())
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_numbers_and_texts_of_options_are_checked_too():
    recipe = str(RECIPES[-1].with_name("tiny_lora.toml"))
    for options, words in (
        (["--optimizer.learning-rate", "nan"], "optimizer.learning_rate must be a finite number"),
        (["--objective.std", "inf"], "objective.std must be a finite number"),
        (["--validation.prompts", "\udcff"], "validation.prompts is not UTF-8"),
        (["--data.source", "\udcff"], "data.source is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=words):
            command.train([recipe, *options, "--print-config"])


def test_an_empty_folder_is_not_the_current_one(tmp_path):
    recipe = str(RECIPES[-1].with_name("tiny_lora.toml"))
    for arguments in (["--folder", ""], ["--folder="]):
        with pytest.raises(ValueError, match="--folder must be a path, got ''"):
            command.train([recipe, *arguments, "--print-config"])
    (tmp_path / "a.toml").write_text('folder = ""\n')
    with pytest.raises(ConfigError, match="folder must be a path, got ''"):
        read_recipe(tmp_path / "a.toml")


def test_a_recipe_for_strangers_says_nothing_of_this_machine():
    recipe = replace(
        FinetuneRecipe(),
        folder=Path("/home/ann/secret/run"),
        model="/mnt/models/FLUX.1-dev",
        data=DataSettings(source="~/my pictures", cache="/tmp/cache", masks="../masks"),
        validation=ValidationSettings(
            prompts=("/imagine a cat",), references=("/home/ann/before/1.png",)
        ),
    )
    shared = without_places(recipe)
    assert (shared.folder, shared.model) == (Path("run"), "FLUX.1-dev")
    assert (shared.data.source, shared.data.cache, shared.data.masks) == (
        "my pictures",
        "cache",
        "masks",
    )
    assert shared.validation.references == ("1.png",)
    assert shared.validation.prompts == recipe.validation.prompts
    published = replace(recipe, model="black-forest-labs/FLUX.1-dev")
    assert without_places(published).model == published.model
    assert deciding_values(shared) == deciding_values(recipe)


@pytest.mark.parametrize("record", [True, False])
def test_a_lora_file_keeps_the_recipe_or_nothing_of_it(tmp_path, monkeypatch, record):
    from fluxjax.train import export

    written = {}
    monkeypatch.setattr(
        export, "write_lora", lambda path, trees, lora, metadata, **_: written.update(metadata)
    )
    monkeypatch.setattr(export, "_has_more_inputs", lambda source, config: False)
    recipe = FinetuneRecipe(folder=tmp_path, record=record)
    assert deciding_values(recipe) == deciding_values(FinetuneRecipe())
    export.export(recipe, TINY, {}, {"scales": {}})
    assert set(written) == ({"recipe"} if record else set())


def test_the_limit_of_silence_is_said(monkeypatch, capsys):
    """JAX's own words, when it ends the processes, name neither the limit nor how to set it."""
    for name, value in (("process_count", 2), ("process_index", 0)):
        monkeypatch.setattr(f"jax.{name}", lambda value=value: value)
    monkeypatch.setattr("fluxjax.parallel.hosts.agree", lambda values: None)
    monkeypatch.setattr("fluxjax.sample.cache.enable_cache", lambda: None)
    recipe = TinyRecipe()
    monkeypatch.setattr(TinyRecipe, "train", lambda self: "done")
    command._train(recipe, 45.0)
    said = capsys.readouterr().err
    assert "2 processes: one that gives no sign of life for 45 s" in said and "--silence" in said


def test_options_change_the_recipe(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text('steps = 7\n[data]\nsource = "a\\"b"\n')
    overrides = ["--optimizer.name", "lion", "--validation.prompts", "x", "y", "--no-tensorboard"]
    command.train([str(tmp_path / "recipe.toml"), *overrides, "--print-config"])
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    recipe = read_recipe(tmp_path / "printed.toml")
    assert recipe.steps == 7 and recipe.data.source == 'a"b'
    assert recipe.optimizer.name == "lion" and recipe.validation.prompts == ("x", "y")
    with pytest.raises(ConfigError, match="name a recipe first"):
        command.train(["--steps", "3"])
    with pytest.raises(ConfigError, match="nothing to precompute"):
        command.precompute([str(RECIPES[-1].with_name("tiny.toml"))])


def test_a_resume_asks_for_what_decides_about_the_weights():
    recipe = FinetuneRecipe()
    same = replace(recipe, folder=Path("y"), mesh="fsdp=2", steps=2 * recipe.steps, log_every=5)
    assert deciding_values(same) == deciding_values(recipe)
    cosine = replace(recipe, optimizer=replace(recipe.optimizer, schedule="cosine"))
    for other in (
        replace(recipe, seed=1),
        replace(recipe, lora=replace(recipe.lora, rank=8)),
        cosine,
    ):
        assert deciding_values(other) != deciding_values(recipe)
    assert deciding_values(replace(cosine, steps=7)) != deciding_values(cosine)
    slower = replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=1e-5), seed=3)
    assert differences(deciding_values(recipe), deciding_values(slower)) == [
        "optimizer.learning_rate (null and 1e-05)",
        "seed (0 and 3)",
    ]


def test_defaults_follow_the_method():
    assert FinetuneRecipe().decay == 0.0
    assert FinetuneRecipe(method="full").decay == 0.999
    assert FinetuneRecipe(ema_decay=0.5).decay == 0.5


def test_export_overwrites_nothing(tmp_path, monkeypatch):
    """An empty name is that of the current folder, which became a LoRA with all that was in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text('model = "tiny"')
    with pytest.raises(ValueError, match="--out must be a path, got ''"):
        command.export([".", "--out", ""])
    for out, error in ((".", "exists"), ("recipe.toml", "exists"), ("lora.png", "ends in .safet")):
        with pytest.raises((OSError, ConfigError), match=error):
            command.export([".", "--out", out])
    assert [*tmp_path.iterdir()] == [tmp_path / "recipe.toml"]
