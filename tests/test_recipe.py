"""Recipes: what is refused and how, overrides, and what they decide about."""

from dataclasses import replace
from pathlib import Path

import pytest

from fluxjax.config import ConfigError
from fluxjax.train import command
from fluxjax.train.embedded.tiny import TinyRecipe
from fluxjax.train.recipe import FinetuneRecipe, read_recipe, recipe_hash, recipe_toml

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
        ("task = 'finetun'", "task must be finetune or embedded, got 'finetun'; did you mean"),
        ("[lora]\nrank = 0", r"\[lora\]: the LoRA's rank must be at least 1"),
        ("steps = 0", "steps must be at least 1"),
        ("batch = 6\naccumulate = 4", "batch 6 cannot be computed in accumulate 4"),
        ("[objective]\ncaption_dropout = 1.5", "caption_dropout must be in"),
        ("[optimizer]\nb2 = 1.0", "b2 must be in"),
        ("steps = ", "is not TOML"),
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
    assert isinstance(recipe, TinyRecipe if path.stem == "tiny" else FinetuneRecipe)
    (tmp_path / "again.toml").write_text(recipe_toml(recipe))
    assert read_recipe(tmp_path / "again.toml") == recipe


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
    assert recipe_hash(same) == recipe_hash(recipe)
    cosine = replace(recipe, optimizer=replace(recipe.optimizer, schedule="cosine"))
    for other in (
        replace(recipe, seed=1),
        replace(recipe, lora=replace(recipe.lora, rank=8)),
        cosine,
    ):
        assert recipe_hash(other) != recipe_hash(recipe)
    assert recipe_hash(replace(cosine, steps=7)) != recipe_hash(cosine)


def test_defaults_follow_the_method():
    assert FinetuneRecipe().decay == 0.0
    assert FinetuneRecipe(method="full").decay == 0.999
    assert FinetuneRecipe(ema_decay=0.5).decay == 0.5
