"""The command line: `maestrale VERB`, one file a verb. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

import maestrale
from maestrale.cli.bench import bench
from maestrale.cli.convert import convert
from maestrale.cli.demo import demo
from maestrale.cli.evaluate import evaluate
from maestrale.cli.generate import generate
from maestrale.cli.inspect import inspect
from maestrale.cli.interactive import interactive
from maestrale.cli.train import train
from maestrale.errors import SIGINT_EXIT, SIGTERM_EXIT, MaestraleError

VERBS = {
    "demo": demo,
    "generate": generate,
    "interactive": interactive,
    "inspect": inspect,
    "eval": evaluate,
    "convert": convert,
    "train": train,
    "bench": bench,
}


def main() -> None:
    """Entry point of `maestrale` and `python -m maestrale`."""
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _terminate)
    build_app()()


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="maestrale",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        # --max_tokens is --max-tokens
        context_settings={"token_normalize_func": lambda word: word.replace("_", "-"), "help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(_top)
    for name, function in VERBS.items():
        app.command(name)(_guarded(function))
    return app


def _top(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=lambda v: _version(v))
    ] = False,
) -> None:
    """Run and train Mistral and Mixtral models.

    Exit codes: 0 done, 2 wrong usage, 3 bad model or data, 4 too little memory, 5 disk, 6 distributed, 130 Ctrl-C.
    """
    context.obj = debug


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"maestrale {maestrale.__version__}")
        raise typer.Exit


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A user's mistake is one line and an exit code, Ctrl-C is 130, a closed pipe is silence."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        import click

        try:
            return function(*args, **kwargs)
        except MaestraleError as error:
            if click.get_current_context(silent=True) and click.get_current_context().find_root().obj:
                raise
            print(f"maestrale: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(SIGINT_EXIT) from None
        except BrokenPipeError:
            # Nobody reads any more. The interpreter would complain once more when it flushes at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return guarded


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"maestrale: warning: {message}", file=sys.stderr)


def _terminate(number: int, frame: object) -> None:
    sys.exit(SIGTERM_EXIT)
