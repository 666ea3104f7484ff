"""The command line: `maestrale VERB`, one file a verb. A verb is imported when it is called, and nothing heavy before
it needs it."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, TextIO

import click

import maestrale
from maestrale.cli.declare import SETTINGS, Command, make_command
from maestrale.errors import SIGINT_EXIT, SIGTERM_EXIT, DiskError, MaestraleError, MemoryLimitError, one_line

VERBS = {  # where the function of each is
    "demo": "demo:demo",
    "generate": "generate:generate",
    "interactive": "interactive:interactive",
    "chat": "chat:chat",
    "serve": "serve:serve",
    "inspect": "inspect:inspect",
    "eval": "evaluate:evaluate",
    "convert": "convert:convert",
    "quantize": "quantize:quantize",
    "data": "data:data",
    "merge": "merge:merge",
    "train": "train:train",
    "finetune": "finetune:finetune",
    "plot": "plot:plot",
    "classify": "embed:classify",
    "embed": "embed:embed",
    "bench": "bench:bench",
}
_ABOUT = """Run and train Mistral and Mixtral models.

Exit codes: 0 done, 2 wrong usage, 3 bad model or data, 4 too little memory, 5 disk, 6 a rank lost, 130 Ctrl-C."""


def main() -> None:
    """Reads sys.argv, runs the verb, and leaves with its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 (the same)
    if isinstance(sys.stdout, io.TextIOWrapper):
        if sys.stdout is sys.__stdout__:
            sys.stdout = _named(sys.stdout)
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 is no reason to end
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _terminate)
    code: Any
    try:
        code = _Maestrale().main(sys.argv[1:] or ["--help"], prog_name="maestrale", standalone_mode=False)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "maestrale"
        _complain(f"{' '.join(error.format_message().split())} (see {path} --help)")
        code = error.exit_code
    except click.Abort:
        code = SIGINT_EXIT
    except (MaestraleError, OSError) as error:  # of an option's own check, or of a help screen that cannot be written
        if isinstance(error, OSError):
            _discard_unwritten(sys.stdout)
        _complain(_told(error))
        code = _exit_code(error)
    finally:
        _discard_unwritten(sys.stderr)  # a log that nobody reads any more
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on there is nothing left to tidy
    sys.exit(code)


def find_verb(name: str) -> Callable[..., None]:
    module, _, function = VERBS[name].partition(":")
    return getattr(import_module(f"maestrale.cli.{module}"), function)


class _Maestrale(click.Group):
    """The verbs under one name."""

    def __init__(self) -> None:
        flag: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False}
        version = click.Option(["--version"], **flag, callback=_version, help="Print the version and leave.")
        super().__init__(
            "maestrale",
            params=[_debug_option(), version],
            context_settings=SETTINGS,
            subcommand_metavar="VERB ...",
            help=_ABOUT,
        )

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> Command | None:
        if name not in VERBS:
            return None
        settings = {"auto_envvar_prefix": "MAESTRALE"} if name == "serve" else {}  # MAESTRALE_PORT is --port
        command = make_command(name, find_verb(name), _guard, **settings)
        command.params.append(_debug_option())
        return command


def _debug_option() -> click.Option:
    def note(context: click.Context, _: click.Parameter, wanted: bool) -> None:
        root = context.find_root()
        root.obj = root.obj or wanted

    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, callback=note, help="Show the traceback of an error."
    )


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        print(f"maestrale {maestrale.__version__}", flush=True)
        context.exit()


def _guard(verb: Callable[[], None]) -> None:
    """Runs a verb: a mistake is one line and an exit code, Ctrl-C is 130, a closed pipe is silence."""
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # until here: __main__.py's
        verb()
        sys.stdout.flush()  # here, where an error can still be told
    except KeyboardInterrupt:
        raise click.exceptions.Exit(SIGINT_EXIT) from None
    except BrokenPipeError:
        _discard_unwritten(sys.stdout)
        raise click.exceptions.Exit(0) from None
    except (MaestraleError, MemoryError, OSError) as error:
        if isinstance(error, OSError):
            _discard_unwritten(sys.stdout)
        if click.get_current_context().find_root().obj:
            import traceback

            traceback.print_exc()
        else:
            _complain(_told(error))
        raise click.exceptions.Exit(_exit_code(error)) from None


def _exit_code(error: BaseException) -> int:
    if isinstance(error, MaestraleError):
        return error.exit_code
    return MemoryLimitError.exit_code if isinstance(error, MemoryError) else DiskError.exit_code


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or "out of memory"


def _complain(message: str) -> None:
    with suppress(OSError):  # nobody listens: the exit code still tells
        print(f"maestrale: {one_line(message)}", file=sys.stderr)


class _Stdout(io.FileIO):
    """Standard output, whose errors name it as those of an opened file do."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise


def _named(stdout: io.TextIOWrapper) -> io.TextIOWrapper:
    """Python's standard output once more, over a `_Stdout`."""
    raw, at_once = _Stdout(stdout.fileno(), "wb", closefd=False), stdout.write_through  # at once: python -u
    buffer = raw if at_once else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stdout.encoding, line_buffering=stdout.line_buffering, write_through=at_once)


def _discard_unwritten(stream: TextIO) -> None:
    """Where a stream takes no more: what is left in its buffer would fail again when the interpreter ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


def _terminate(number: int, frame: object) -> None:
    sys.exit(SIGTERM_EXIT)
