"""`maestrale serve`: an OpenAI-compatible server."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from maestrale.cli import options as opt
from maestrale.errors import UsageError

_SERVER, _LIMITS = "Server", "Limits"


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """The file's values become the defaults of the options, so a flag and the environment go before it."""
    if path is None:
        return None
    try:
        values = tomllib.loads(opt.read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: no TOML: {error}") from None
    known = {str(parameter.name) for parameter in context.command.params} - {"config", "help", "debug"}
    values = {name.replace("-", "_"): value for name, value in values.items()}
    if unknown := values.keys() - known:
        raise UsageError(f"{path}: no such option: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    context.default_map = values
    return path


def serve(
    path: opt.Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", rich_help_panel=_SERVER)] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            help="The model's name in requests; else its folder's.", show_default=False, rich_help_panel=_SERVER
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="A file with an API key a line.", show_default=False, rich_help_panel=_SERVER),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="An API key; better in a file or as MAESTRALE_API_KEY.", show_default=False, rich_help_panel=_SERVER
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that clients may call us by.", show_default=False, rich_help_panel=_SERVER),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose web pages may call.", show_default=False, rich_help_panel=_SERVER),
    ] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log a JSON object a line.", rich_help_panel=_SERVER)
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file with any of these options.",
            show_default=False,
            is_eager=True,
            callback=_read_config,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Requests that may wait; more are told to try later.", rich_help_panel=_LIMITS)
    ] = 256,
    max_sequences: Annotated[int, typer.Option(help="Sequences that run at once.", rich_help_panel=_LIMITS)] = 64,
    max_batch_tokens: opt.MaxBatchTokens = None,
    max_len: opt.MaxLen = None,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds until a request's last token.", rich_help_panel=_LIMITS)
    ] = 600.0,
    drain: Annotated[
        float, typer.Option(help="Seconds for open requests to end after SIGTERM.", rich_help_panel=_LIMITS)
    ] = 30.0,
    header_timeout: Annotated[
        float, typer.Option(help="Seconds for a request's head to arrive.", rich_help_panel=_LIMITS)
    ] = 10.0,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds for a request's body to arrive.", rich_help_panel=_LIMITS)
    ] = 30.0,
    write_timeout: Annotated[
        float, typer.Option(help="Seconds a client may leave an answer unread.", rich_help_panel=_LIMITS)
    ] = 60.0,
    ping: Annotated[
        float, typer.Option(help="Seconds of silence after which a stream says that it lives.", rich_help_panel=_LIMITS)
    ] = 10.0,
    stream_interval: Annotated[
        float,
        typer.Option(
            help="Least seconds between two events of a stream; 0: one for each step.", rich_help_panel=_LIMITS
        ),
    ] = 0.02,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.", rich_help_panel=_LIMITS)] = 16 << 20,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER: a LoRA adapter that requests may ask for as a model; may be given again.",
            show_default=False,
            rich_help_panel=opt.MODEL,
        ),
    ] = None,
    dtype: opt.Dtype = "auto",
    weights: opt.Weights = "auto",
    device: opt.Device = "auto",
    backend: opt.Backend = "auto",
    threads: opt.Threads = None,
    num_pipeline_ranks: opt.PipelineRanks = None,
    tensor_parallel: opt.TensorParallel = None,
    expert_parallel: opt.ExpertParallel = 1,
    distributed_timeout: opt.DistributedTimeout = 120.0,
    ignore_unexpected: opt.IgnoreUnexpected = False,
) -> None:
    """Serve a model to OpenAI's, Mistral's and other clients.

    Every option may also be given as MAESTRALE_PORT and the like in the environment, or as a line of a TOML file
    (--config). A flag goes before the environment, the environment before the file.
    """
    try:
        from maestrale.serve.run import serve as run
        from maestrale.serve.settings import Settings
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed: run  pip install 'maestrale[serve]'") from None

    keys = [*(api_key or []), *(_keys(api_key_file) if api_key_file else [])]
    adapters = dict(map(_adapter, adapter or []))
    settings = Settings(
        name=name or _name(path),
        adapters=tuple(adapters),
        host=host,
        port=port,
        api_keys=tuple(keys),
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        max_queue=max_queue,
        request_timeout=request_timeout,
        drain=drain,
        header_timeout=header_timeout,
        body_timeout=body_timeout,
        write_timeout=write_timeout,
        ping=ping,
        stream_interval=stream_interval,
        max_body=max_body,
        log_json=log_json,
    )
    code = run(
        settings,
        lambda: opt.open_llm(
            path,
            dtype=dtype,
            weights=weights,
            device=device,
            backend=backend,
            threads=threads,
            num_pipeline_ranks=num_pipeline_ranks,
            tensor_parallel=tensor_parallel,
            expert_parallel=expert_parallel,
            distributed_timeout=distributed_timeout,
            adapters=adapters,
            max_len=max_len,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            ignore_unexpected=ignore_unexpected,
        ),
    )
    if code:
        raise typer.Exit(code)


def _name(path: Path | None) -> str:
    return "stories" if path is None else path.resolve().name


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
