"""From a verb's signature to its command: what its parameters are annotated with becomes options and arguments.

A parameter is Annotated[type, Option(...)] or Annotated[type, Argument(...)]; type is bool, int, float, str, Path, a
list of these (the option may be given again) or one of them or None. A parameter whose type is a dataclass stands for
all of its fields, annotated likewise, and the verb gets an instance: so verbs share groups of options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import click

SETTINGS: dict[str, Any] = {
    "token_normalize_func": lambda word: word.replace("_", "-"),  # --max_tokens is --max-tokens
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
_TYPES = {int: click.INT, float: click.FLOAT, str: click.STRING, Path: click.Path(path_type=Path), bool: click.BOOL}


class Option:
    """names: as typed; of the parameter's name where there are none. group: its heading on the help screen. callback:
    called with (context, parameter, value), gives the value; early: before the other options are read."""

    def __init__(
        self,
        *names: str,
        help: str,
        group: str = "Options",
        metavar: str | None = None,
        early: bool = False,
        callback: Callable[[click.Context, click.Parameter, Any], Any] | None = None,
    ):
        self.names, self.help, self.group, self.metavar = names, help, group, metavar
        self.early, self.callback = early, callback

    def parameter(self, name: str, kind: Any, default: Any) -> click.Parameter:
        """What click reads it as. A flag that is on unless it is told otherwise gets a --no-name."""
        kind, several = _plain(kind)
        word = "--" + name.replace("_", "-")
        names = self.names or ((f"{word}/--no-{word[2:]}",) if kind is bool and default else (word,))
        made = _GroupedOption(
            [name, *names],
            type=None if kind is bool else _TYPES[kind],
            is_flag=kind is bool,
            multiple=several,
            show_default=default not in (MISSING, None, False),
            **({"required": True} if default is MISSING else {"default": default}),
            help=self.help,
            metavar=self.metavar,
            is_eager=self.early,
            callback=self.callback,
        )
        made.group = self.group
        return made


class Argument:
    """What stands on the command line without a name."""

    def __init__(self, help: str, metavar: str | None = None):
        self.help, self.metavar = help, metavar

    def parameter(self, name: str, kind: Any, default: Any) -> click.Parameter:
        kind, several = _plain(kind)
        optional, count = default is not MISSING, -1 if several else 1
        made = _HelpedArgument([name], type=_TYPES[kind], required=not optional, nargs=count, metavar=self.metavar)
        made.text = self.help
        return made


class _GroupedOption(click.Option):
    group: str


class _HelpedArgument(click.Argument):
    text: str


class Command(click.Command):
    """A click command whose help screen lists arguments, then options in their groups."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.UsageError as error:  # of an option without its value click does not say whose it is
            error.ctx = error.ctx or context
            raise

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(context):
            if isinstance(parameter, _HelpedArgument):
                entry = (parameter.make_metavar(context), parameter.text)
                groups["Arguments"].append(entry)
            elif (record := parameter.get_help_record(context)) is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for group, records in groups.items():
            if not records:
                continue
            with formatter.section(group):
                formatter.write_dl(records, col_max=28)


@dataclass(frozen=True)
class _Bundle:
    """A parameter of a verb. kind: the dataclass that its options make; None where it is an option itself."""

    name: str
    kind: type | None
    parts: tuple[tuple[str, Any, Any], ...]  # name, annotation, default

    def take(self, values: dict[str, Any]) -> Any:
        found = {name: values[name] for name, _, _ in self.parts}
        return found[self.name] if self.kind is None else self.kind(**found)


def make_command(name: str, verb: Callable[..., None], run: Callable[..., None], **settings: Any) -> Command:
    """The command that calls `run` with a function of no arguments: the verb, given what was typed."""
    bundles = list(_bundles(verb))

    def called(**typed: Any) -> None:
        # click gives a tuple for what may be given again, an empty one for what was not given
        values = {name: (list(value) or None) if isinstance(value, tuple) else value for name, value in typed.items()}
        run(lambda: verb(**{bundle.name: bundle.take(values) for bundle in bundles}))

    parameters = [
        next(mark for mark in annotation.__metadata__ if isinstance(mark, (Option, Argument))).parameter(
            part, annotation.__origin__, default
        )
        for bundle in bundles
        for part, annotation, default in bundle.parts
    ]
    return Command(name, SETTINGS | settings, called, parameters, help=_paragraphs(verb))


def _bundles(verb: Callable[..., None]) -> Iterator[_Bundle]:
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in signature(verb).parameters.items():
        kind = hints[name]
        if not (isinstance(kind, type) and is_dataclass(kind)):
            default = MISSING if parameter.default is Parameter.empty else parameter.default
            yield _Bundle(name, None, ((name, kind, default),))
            continue
        of_fields = get_type_hints(kind, include_extras=True)
        parts = tuple((field.name, of_fields[field.name], field.default) for field in fields(kind))
        yield _Bundle(name, kind, parts)


def _plain(kind: Any) -> tuple[Any, bool]:
    """The type of one value, and whether there may be several: `list[Path] | None` → Path, True."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not type(None))
    return (get_args(kind)[0], True) if get_origin(kind) is list else (kind, False)


def _paragraphs(verb: Callable[..., None]) -> str:
    """A verb's docstring, each paragraph on one line: the help screen breaks lines to its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(verb.__doc__ or "").split("\n\n"))
