"""Options of every command: tyro reads them; what is wrong with them is said in one sentence."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from fluxjax.sample.settings import brief

_REGISTRY = ConstructorRegistry()
_PLAIN: dict[type, tuple[str, str]] = {
    int: ("an integer", "INT"),
    float: ("a number", "FLOAT"),
    Path: ("a path", "PATH"),
}
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")


def parse_options(options: Any, arguments: Sequence[str], prog: str, **settings: Any) -> Any:
    """An instance of `options` as `arguments` of the command `prog` say; `settings` are tyro.cli's.

    Raises ValueError for an argument that is none of theirs. --help is printed and ends the
    process.
    """
    read = partial(tyro.cli, options, prog=prog, registry=_REGISTRY, **settings)
    with _told(partial(_refuse, prog=prog, read=read)):
        return read(args=list(arguments))


def _told(refuse: Callable[[Any], None]) -> AbstractContextManager[None]:
    """Mistakes go to `refuse` where this tyro can tell them, else into a box that it prints."""
    try:
        from tyro._errors import on_parse_error  # pyright: ignore[reportPrivateImportUsage]
    except ImportError:
        return nullcontext()
    return on_parse_error(refuse)


def _refuse(event: Any, *, prog: str, read: Callable[..., Any]) -> None:
    """Raises ValueError for a mistake of a kind that is known here; tyro prints the others."""
    try:
        words = _words(event, prog, read)
    except AttributeError:  # another tyro's event
        return
    if words is not None:
        raise ValueError(words)


def _words(event: Any, prog: str, read: Callable[..., Any]) -> str | None:
    match type(event).__name__:
        case "InstantiationFailure":  # of an argument, or of what checks them together
            where = f"{_name(event.argument)} " if event.argument else ""
            return f"{where}{event.message}"
        case "InvalidChoice":
            choices = ", ".join(sorted({*event.choices} - {"None"}))
            return f"{_name(event.argument)} is one of {choices}; got {event.value!r}"
        case "BadValue" if event.reason == "too_few_values":
            return f"{_name(event.argument)} needs a value"
        case "MissingArgs":
            names = " and ".join(_name(one.arg) for one in event.missing_arguments)
            return f"{prog} needs {names}; {prog} --help says what they are"
        case "MissingSubcommand":
            verbs = ", ".join(event.subcommand_spec.parser_from_name)
            return f"{prog} needs one of {verbs}; {prog} --help says what they do"
        case "UnrecognizedArgs":
            return _unknown(event.tokens, prog, read)
        case _:
            return None


def _name(argument: Any) -> str:
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return max(argument.lowered.name_or_flags, key=len)


def _unknown(tokens: Sequence[str], prog: str, read: Callable[..., Any]) -> str:
    named = next((token for token in tokens if token.startswith("-")), None)
    if named is None:
        return f"{tokens[0]!r} is one argument too many; {prog} --help shows what it takes"
    helped = io.StringIO()
    with contextlib.redirect_stdout(helped), contextlib.suppress(SystemExit):
        read(args=["--help"])
    near = get_close_matches(named, sorted(set(_OPTION.findall(helped.getvalue()))), 1)
    meant = f"did you mean {near[0]}?" if near else f"{prog} --help lists those that there are"
    return f"there is no option {named}; {meant}"


@_REGISTRY.primitive_rule
def _plain(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kind = next((one for one in _PLAIN if info.type in (one, one | None)), None)
    if kind is None:
        return None
    words, metavar = _PLAIN[kind]

    def parsed(texts: list[str]) -> Any:
        with contextlib.suppress(ValueError):
            if texts[0]:
                return kind(texts[0])
        raise ValueError(f"must be {words}, got {brief(texts[0])}")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parsed,
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda value: [str(value)],
    )
