"""What is written is true: the API page, the README's commands, the notebook."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "sample/README.md", "train/README.md", "convert/README.md")


def test_the_api_page_is_that_of_the_docstrings():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text("utf-8"), "run python docs/make_api.py"


def commands(page: str) -> list[list[str]]:
    """[verb, argument, ...] of each line of shell in a page."""
    found = []
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = [] if "[--" in line else shlex.split(line, comments=True)  # no synopses
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words[:1] == ["fluxjax"]:
                found.append(words[1:])
            elif words[:2] == ["python", "-m"] and words[2].startswith("fluxjax."):
                found.append([words[2].removeprefix("fluxjax."), *words[3:]])
    return found


def parse(verb: str, arguments: list[str]) -> None:
    from fluxjax.command_options import parse_options
    from fluxjax.convert.options import Options as Convert
    from fluxjax.diff.commands import Command
    from fluxjax.plan.options import Options as Plan
    from fluxjax.sample.options import Options as Sample
    from fluxjax.train.command import read_options
    from fluxjax.train.embedded.evaluate_settings import EvaluateSettings

    if verb == "diff":
        parse_options(Command, arguments, verb)
    elif verb == "train" and arguments[0] == "evaluate":
        parse_options(EvaluateSettings, arguments[1:], verb)
    elif verb == "train":
        rest = arguments[arguments[0] == "precompute" :]
        if rest and (ROOT / rest[0]).is_file():
            read_options([str(ROOT / rest[0]), *rest[1:]])
    else:
        parse_options({"sample": Sample, "convert": Convert, "plan": Plan}[verb], arguments, verb)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_understood(page):
    found = [words for words in commands(page) if "--help" not in words]
    assert found or page == "convert/README.md"
    for verb, *arguments in found:
        try:
            parse(verb, arguments)
        except ValueError as error:
            pytest.fail(f"{page}: {verb} {shlex.join(arguments)}\n{error}")


def test_the_pages_that_are_linked_are_there():
    for page in (*PAGES, "CHANGELOG.md", "docs/measured.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text("utf-8")):
            if "://" not in link:
                assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_the_readme_names_both_ways_to_run_the_tests():
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"pip install -e '\.\[test\]' && (pytest.*)\n", text)
    assert found and f'{found[1]} -m "not slow"' in text
    assert f"\n{found[1]} " in (ROOT / ".ci" / "run").read_text(), "CI runs another command"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads((ROOT / "sample" / "first_pictures.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    program = tmp_path / "notebook.py"
    program.write_text("\n".join(code) + "\nassert len(row) == 2 and len(seen) == 4\n")
    environment = {**os.environ, "XLA_FLAGS": ""}
    ended = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr


def test_every_field_of_a_configuration_is_documented():
    """Below the field, in its class's docstring, or in a class that it inherits it from."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "fluxjax/config").glob("*.py")]
    classes = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}

    def fields(found: ast.ClassDef) -> dict[str, bool]:
        """Whether each field has a docstring."""
        said = ast.get_docstring(found) or ""
        own = {
            node.target.id: isinstance(after, ast.Expr) or f"`{node.target.id}`" in said
            for node, after in zip(found.body, [*found.body[1:], ast.Pass()], strict=True)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            if "ClassVar" not in ast.unparse(node.annotation)
        }
        for base in map(ast.unparse, found.bases):
            for name, done in fields(classes[base]).items() if base in classes else ():
                own[name] = own.get(name, False) or done
        return own

    missing = {
        name: [f for f, done in fields(c).items() if not done] for name, c in classes.items()
    }
    assert not {name: left for name, left in missing.items() if left}
