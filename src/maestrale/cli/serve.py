"""`maestrale serve`: an OpenAI-compatible server."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from maestrale.cli import options as opt
from maestrale.cli.declare import Option
from maestrale.errors import UsageError, first_line, shown
from maestrale.serve.settings import Settings

_SERVER, _LIMITS = "Server", "Limits"
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {  # click's types, as TOML has them
    "integer": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "boolean": ((bool,), "true or false"),
}


@dataclass(frozen=True)
class _Limits:
    """Fields of `Settings`, under their names."""

    max_queue: Annotated[int, Option(help="Requests that may wait; more are told to try later.", group=_LIMITS)] = (
        Settings.max_queue
    )
    request_timeout: Annotated[float, Option(help="Seconds until a request's last token.", group=_LIMITS)] = (
        Settings.request_timeout
    )
    drain: Annotated[float, Option(help="Seconds for open requests to end after SIGTERM.", group=_LIMITS)] = (
        Settings.drain
    )
    header_timeout: Annotated[float, Option(help="Seconds for a request's head to arrive.", group=_LIMITS)] = (
        Settings.header_timeout
    )
    body_timeout: Annotated[float, Option(help="Seconds for a request's body to arrive.", group=_LIMITS)] = (
        Settings.body_timeout
    )
    write_timeout: Annotated[float, Option(help="Seconds a client may leave an answer unread.", group=_LIMITS)] = (
        Settings.write_timeout
    )
    ping: Annotated[
        float, Option(help="Seconds of silence after which a stream says that it lives.", group=_LIMITS)
    ] = Settings.ping
    stream_interval: Annotated[
        float,
        Option(help="Least seconds between two events of a stream, of one of many five times that.", group=_LIMITS),
    ] = Settings.stream_interval
    max_body: Annotated[int, Option(help="Bytes of a request's body.", group=_LIMITS)] = Settings.max_body


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """The file's values become the defaults of the options, so a flag and the environment go before it."""
    if path is None:
        return None
    try:
        values = tomllib.loads(opt.read_text(path))
    except (ValueError, RecursionError) as error:  # among them a number of too many digits
        raise UsageError(f"{path}: no TOML: {first_line(error)}") from None
    known = {str(p.name): p for p in context.command.params if p.name not in ("config", "help", "debug")}
    values = {name.replace("-", "_"): value for name, value in values.items()}
    if unknown := values.keys() - known:
        raise UsageError(f"{path}: no such option: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    for name, value in values.items():
        kinds, words = _KINDS.get(known[name].type.name, ((str,), "a text"))
        several = known[name].multiple
        each = value if several and isinstance(value, list) else [value]
        if (several and not isinstance(value, list)) or not all(type(one) in kinds for one in each):
            shape = f"a list, each {words}" if several else words
            raise UsageError(f"{path}: {name} = {shown(value)}: expected {shape}")
        if any(isinstance(one, str) and "\0" in one for one in each):
            raise UsageError(f"{path}: {name} = {shown(value)}: holds a character of code 0, which no option takes")
    context.default_map = values
    return path


def serve(
    path: opt.Model = None,
    host: Annotated[str, Option(help="Address to listen on.", group=_SERVER)] = Settings.host,
    port: Annotated[int, Option(help="Port; 0 takes a free one.", group=_SERVER)] = Settings.port,
    name: Annotated[
        str | None,
        Option(help="The model's name in requests; else its folder's.", group=_SERVER),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        Option(help="A file with an API key a line.", group=_SERVER),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        Option(help="An API key; better in a file or as MAESTRALE_API_KEY.", group=_SERVER),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        Option(help="A name that clients may call us by.", group=_SERVER),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        Option(help="An origin whose web pages may call.", group=_SERVER),
    ] = None,
    log_json: Annotated[bool, Option("--log-json", help="Log a JSON object a line.", group=_SERVER)] = False,
    config: Annotated[
        Path | None,
        Option(
            help="A TOML file with any of these options.",
            early=True,
            callback=_read_config,
            group=_SERVER,
        ),
    ] = None,
    max_sequences: Annotated[int, Option(help="Sequences that run at once.", group=_LIMITS)] = 64,
    adapter: Annotated[
        list[str] | None,
        Option(
            help="NAME=FOLDER: a LoRA adapter that requests may ask for as a model; may be given again.",
            group=opt.MODEL,
        ),
    ] = None,
    *,
    limits: _Limits,
    model: opt.Writing,
) -> None:
    """Serve a model to OpenAI's, Mistral's and other clients.

    Every option may also be given as MAESTRALE_PORT and the like in the environment, or as a line of a TOML file
    (--config). A flag goes before the environment, the environment before the file.
    """
    try:
        from maestrale.serve.run import serve as run
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed: run  pip install 'maestrale[serve]'") from None

    keys = [*(api_key or []), *(_keys(api_key_file) if api_key_file else [])]
    adapters = dict(map(_adapter, adapter or []))
    talker = opt.talker(path)
    settings = Settings(
        name=name or talker.resolve().name,
        adapters=tuple(adapters),
        host=host,
        port=port,
        api_keys=tuple(keys),
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        log_json=log_json,
        **vars(limits),
    )
    if code := run(settings, lambda: model.open(talker, adapters=adapters, max_sequences=max_sequences)):
        raise click.exceptions.Exit(code)


def _adapter(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise UsageError(f"adapter {text!r}: expected NAME=FOLDER")
    return name, folder


def _keys(path: Path) -> list[str]:
    lines: list[Any] = [line.strip() for line in opt.read_text(path).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{path}: no API key in it: expected one a line")
    return keys
