"""The command line: `maestrale VERB`, one file a verb. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from inspect import Parameter, cleandoc, signature
from typing import Annotated, Any

import typer

import maestrale
from maestrale.cli.bench import bench
from maestrale.cli.chat import chat
from maestrale.cli.convert import convert
from maestrale.cli.data import data
from maestrale.cli.demo import demo
from maestrale.cli.embed import classify, embed
from maestrale.cli.evaluate import evaluate
from maestrale.cli.finetune import finetune
from maestrale.cli.generate import generate
from maestrale.cli.inspect import inspect
from maestrale.cli.interactive import interactive
from maestrale.cli.merge import merge
from maestrale.cli.quantize import quantize
from maestrale.cli.serve import serve
from maestrale.cli.train import train
from maestrale.errors import SIGINT_EXIT, SIGTERM_EXIT, DiskError, MaestraleError, MemoryLimitError

VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "generate": generate,
    "interactive": interactive,
    "chat": chat,
    "serve": serve,
    "inspect": inspect,
    "eval": evaluate,
    "convert": convert,
    "quantize": quantize,
    "data": data,
    "merge": merge,
    "train": train,
    "finetune": finetune,
    "classify": classify,
    "embed": embed,
    "bench": bench,
}
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of `maestrale` and `python -m maestrale`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 is no reason to end
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _terminate)
    command = typer.main.get_command(build_app())
    try:
        code = command.main(sys.argv[1:] or ["--help"], prog_name="maestrale", standalone_mode=False)
    except Exception as error:
        # A usage error is click's class, and there are two clicks: the package, and the copy inside later typers.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "maestrale"
        _complain(f"{error.format_message()} (see {path} --help)")
        code = error.exit_code  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on there is nothing left to tidy
    sys.exit(code)


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="maestrale",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={
            "token_normalize_func": lambda word: word.replace("_", "-"),  # --max_tokens is --max-tokens
            "help_option_names": ["-h", "--help"],
        },
    )
    app.callback()(_top)
    for name, function in VERBS.items():
        settings = {"auto_envvar_prefix": "MAESTRALE"} if function is serve else {}  # MAESTRALE_PORT is --port
        app.command(name, help=_paragraphs(function), context_settings=settings)(_guarded(function))
    return app


def _paragraphs(verb: Callable[..., None]) -> str:
    """A verb's docstring, each paragraph on one line: the help screen breaks lines to its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(verb.__doc__ or "").split("\n\n"))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"maestrale {maestrale.__version__}")
        raise typer.Exit


def _top(
    context: typer.Context,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Run and train Mistral and Mixtral models.

    Exit codes: 0 done, 2 wrong usage, 3 bad model or data, 4 too little memory, 5 disk, 130 Ctrl-C.
    """
    context.obj = debug


def _guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with `--debug`: a mistake is one line and an exit code, Ctrl-C is 130, a closed pipe is silence."""

    @functools.wraps(verb)
    def guarded(context: typer.Context, debug: bool, **options: Any) -> None:
        try:
            verb(**options)
            sys.stdout.flush()  # here, where an error can still be told
        except KeyboardInterrupt:
            raise typer.Exit(SIGINT_EXIT) from None
        except BrokenPipeError:
            _discard_output()
            raise typer.Exit(0) from None
        except (MaestraleError, MemoryError, OSError) as error:
            if isinstance(error, OSError):
                _discard_output()
            if debug or context.obj:
                traceback.print_exc()
            else:
                _complain(str(error) or "out of memory")
            raise typer.Exit(_exit_code(error)) from None

    of_verb = signature(verb, eval_str=True)
    added = {"context": typer.Context, "debug": Debug}
    extra = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False if name == "debug" else Parameter.empty, annotation=kind)
        for name, kind in added.items()
    ]
    guarded.__signature__ = of_verb.replace(parameters=[*of_verb.parameters.values(), *extra])  # type: ignore[attr-defined]
    return guarded


def _exit_code(error: BaseException) -> int:
    if isinstance(error, MaestraleError):
        return error.exit_code
    return MemoryLimitError.exit_code if isinstance(error, MemoryError) else DiskError.exit_code


def _complain(message: str) -> None:
    print(f"maestrale: {message}", file=sys.stderr)


def _discard_output() -> None:
    """Where standard output takes no more: what is left in its buffer would fail again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


def _terminate(number: int, frame: object) -> None:
    sys.exit(SIGTERM_EXIT)
