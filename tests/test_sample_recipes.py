"""Every recipe in sample/ runs on the embedded model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "sample"
RECIPES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".sh"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache") / "compiled"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs(recipe, tmp_path, cache):
    # The recipes say `python`: the one that runs this test.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "FLUXJAX_CACHE": str(cache), "XLA_FLAGS": ""}
    command = [sys.executable if recipe.endswith(".py") else "sh", str(FOLDER / recipe)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    pictures = [path.read_bytes() for path in sorted(tmp_path.rglob("*.png"))]
    assert pictures
    if recipe == "repeat.sh":
        first, other, same = pictures
        assert first == same and first != other


def test_readme_names_every_recipe_and_where_the_code_is():
    text = (FOLDER / "README.md").read_text()
    assert "fluxjax/sample" in text.splitlines()[0]
    assert all(recipe in text for recipe in RECIPES)
