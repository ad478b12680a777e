"""Writes docs/api.md from the docstrings: python docs/make_api.py"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API

Made from the docstrings by `python docs/make_api.py`; a test demands that it is up to date.
"""
PUBLIC = {
    "Drawing": [
        "fluxjax:load_pipeline",
        "fluxjax:Pipeline",
        "fluxjax.sample.settings:Settings",
        "fluxjax.sample.preview:Preview",
        "fluxjax.sample.preview:LinearMap",
        "fluxjax.sample.pictures:to_bytes",
        "fluxjax.picture_sheet:picture_sheet",
    ],
    "Models by name": ["fluxjax.hub:find", "fluxjax.hub:tiny_folder"],
    "Converting": [
        "fluxjax.convert.convert:plan",
        "fluxjax.convert.convert:run",
        "fluxjax.convert.convert:Conversion",
        "fluxjax.checkpoint.lora.reader:read_adapters",
        "fluxjax.checkpoint.lora.reader:read_lora",
        "fluxjax.checkpoint.lora.merge:merge",
    ],
    "Training": ["fluxjax.train.recipe:read_recipe", "fluxjax.train.finetune:finetune"],
    "Configurations": [
        "fluxjax.config:PipelineConfig",
        "fluxjax.config:FluxPipelineConfig",
        "fluxjax.config:FluxConfig",
        "fluxjax.config:AutoencoderConfig",
        "fluxjax.config:T5Config",
        "fluxjax.config:CLIPTextConfig",
        "fluxjax.config:SchedulerConfig",
        "fluxjax.config:ConfigError",
    ],
}


def page() -> str:
    parts = [HEAD]
    for heading, names in PUBLIC.items():
        parts.append(f"## {heading}\n")
        for name in names:
            module, _, attribute = name.partition(":")
            parts.extend(_entry(f"{module}.{attribute}", getattr(import_module(module), attribute)))
    return "\n".join(parts).rstrip() + "\n"


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield f"### `{name}`\n"
    if dataclasses.is_dataclass(thing) and isinstance(thing, type):
        yield _text(thing)
        yield from _fields(thing)
    elif not (isinstance(thing, type) and issubclass(thing, Exception)):
        yield _signature(name.rpartition(".")[2], thing)
        yield _text(thing)
    else:
        yield _text(thing)
    if not isinstance(thing, type):
        return
    for method, function in _methods(thing).items():
        public = method == "__call__" or not method.startswith("_")
        if public and inspect.isfunction(function) and function.__doc__:
            shown = f"{thing.__name__[0].lower()}{thing.__name__[1:]}"
            yield _signature(shown if method == "__call__" else f"{shown}.{method}", function)
            yield _text(function)


def _methods(thing: type) -> dict[str, Any]:
    """Its own, and those of its bases that are not shown by themselves."""
    shown = {name.replace(":", ".") for names in PUBLIC.values() for name in names}
    ours = [cls for cls in thing.__mro__ if cls.__module__.startswith("fluxjax.")]
    found: dict[str, Any] = {}
    for cls in ours:
        package = cls.__module__.split(".")
        places = {".".join([*package[:end], cls.__name__]) for end in range(1, len(package) + 1)}
        if cls is thing or not places & shown:
            found = {**found, **{k: v for k, v in vars(cls).items() if k not in found}}
    return found


def _signature(name: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    shown = [p for p in signature.parameters.values() if p.name != "self"]
    lines, starred = [], False
    for parameter in shown:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        lines.append(_parameter(parameter))
    returns = signature.return_annotation
    arrow = "" if returns is inspect.Signature.empty else f" -> {str(returns).strip(chr(39))}"
    one = f"{name}({', '.join(lines)}){arrow}"
    if len(one) > 96:
        inner = "".join(f"    {line},\n" for line in lines)
        one = f"{name}(\n{inner}){arrow}"
    return f"```python\n{one}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    """Annotations are strings, and stand there without quotes."""
    plain = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))
    if parameter.annotation is not parameter.empty:
        plain += f": {str(parameter.annotation).strip(chr(39))}"
    default = parameter.default
    return plain if default is parameter.empty else f"{plain} = {default!r}"


def _text(thing: Any) -> str:
    """The docstring; the indented list below `Args:` becomes a list."""
    lines = []
    for line in inspect.cleandoc(thing.__doc__ or "").splitlines():
        stripped = line.strip()
        if line.startswith("  ") and not line.startswith("    ") and ": " in stripped:
            argument, _, words = stripped.partition(": ")
            line = f"- `{argument}`: {words}"
        lines.append(line)
    return "\n".join(lines).replace("Args:\n", "Arguments:\n\n") + "\n"


def _fields(thing: type) -> Iterator[str]:
    """Fields with their types, defaults and the strings below them."""
    said = _attribute_texts(thing)
    for field in dataclasses.fields(thing):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        words = said.get(field.name, "")
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        yield f"- `{field.name}: {kind}{default}`{': ' if words else ''}{words}"
    yield ""


def _attribute_texts(thing: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for one, after in zip(tree.body, tree.body[1:], strict=False):
        named = isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            texts[one.target.id] = " ".join(str(after.value.value).split())
    return texts


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
