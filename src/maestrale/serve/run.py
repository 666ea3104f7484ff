"""From settings to a running server, and down again: the port first, then the model, then requests."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import uvicorn

from maestrale.errors import SIGINT_EXIT, MaestraleError, UsageError
from maestrale.llm import LLM
from maestrale.memory import peak_memory
from maestrale.parallel.launcher import world
from maestrale.serve import heap
from maestrale.serve.app import make_app
from maestrale.serve.context import Context
from maestrale.serve.logs import set_up
from maestrale.serve.metrics import Metrics
from maestrale.serve.problems import ApiError
from maestrale.serve.service import Service
from maestrale.serve.settings import Settings
from maestrale.serve.wire import protocol

log = logging.getLogger("maestrale.serve")

_LAST_WORDS = 5  # seconds for error events to reach their clients after the drain's deadline


def serve(settings: Settings, open_model: Callable[[], LLM]) -> int:
    """Serves until a signal; gives the exit code. UsageError where the port is taken, before the model is opened.

    Where torchrun or mpirun started several processes, rank 0 serves; the others compute, and do not return.
    """
    heap.prepare()
    if world()[0]:
        open_model()
    with _listen(settings) as listener:
        llm = open_model()
        set_up(settings.log_json)
        return asyncio.run(_Server(settings, llm, listener).run())


def _listen(settings: Settings) -> socket.socket:
    """A socket that listens at once, so that a second server on the port knows it. Who connects waits till we serve."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
    except (OSError, ValueError) as error:  # ValueError: it cannot even be spelled as a name of the network
        reason = getattr(error, "strerror", None) or "no name or address"
        raise UsageError(f"host {settings.host[:80]!r}: {reason}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        other = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise UsageError(f"cannot listen on {settings.host}:{settings.port}: {reason}; try another {other}") from None
    return listener


class _Server:
    def __init__(self, settings: Settings, llm: LLM, listener: socket.socket):
        self.settings, self.llm, self.listener = settings, llm, listener
        self.signals: list[int] = []
        self.wake = asyncio.Event()

    async def run(self) -> int:
        settings, metrics = self.settings, Metrics()
        service = Service(
            self.llm,
            metrics,
            max_queue=settings.max_queue,
            max_unread=settings.max_unread,
            timeout=settings.request_timeout,
            stream_interval=settings.stream_interval,
            on_death=self.wake.set,
        )
        context = Context(self.llm, service, settings, metrics)
        _watch(context)
        config = uvicorn.Config(
            make_app(context),
            http=protocol(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_LAST_WORDS,
        )
        server = _Quiet(config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        service.start()
        await context.in_worker(_warm_up, self.llm)
        heap.settle()
        serving, tending = asyncio.create_task(server.serve(sockets=[self.listener])), asyncio.create_task(heap.tend())
        log.info("%s", self._greeting())
        await asyncio.wait((serving, asyncio.create_task(self.wake.wait())), return_when=asyncio.FIRST_COMPLETED)
        await self._drain(service)
        server.should_exit = True
        await serving
        tending.cancel()
        service.stop()
        context.close()
        if service.death is not None:
            return getattr(service.death, "exit_code", 1)
        return SIGINT_EXIT if signal.SIGINT in self.signals else 0

    def _signalled(self, number: int) -> None:
        if self.signals:
            os._exit(128 + number)  # asked twice: now
        self.signals.append(number)
        self.wake.set()

    async def _drain(self, service: Service) -> None:
        """Open requests go on until the deadline, then end with an error; new ones are turned away meanwhile."""
        service.draining = True
        log.info("shutting down: %d requests are open, %g s at most", service.open_jobs, self.settings.drain)
        deadline = time.monotonic() + self.settings.drain
        while service.open_jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        service.fail_all(ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5))

    def _greeting(self) -> str:
        host, port = self.listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        memory = peak_memory() / 2**20
        keys = "" if self.settings.api_keys else ", no API key"
        return (
            f"serving {self.settings.name} on {address}{keys} ({self.llm.description}; {memory:,.0f} MiB at most; "
            f"longest context {self.llm.max_len:,} tokens)"
        )


class _Quiet(uvicorn.Server):
    """Signals are ours."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _warm_up(llm: LLM) -> None:
    """The first chat loads the templates: half a second that no client needs to wait for."""
    with suppress(MaestraleError):  # a model without a chat form
        llm.tokenizer.encode_chat([{"role": "user", "content": "."}])


def _watch(context: Context) -> None:
    now, service = context.llm.counters, context.service
    context.metrics.watch(
        gauges=[
            ("maestrale_queued_requests", "Requests that have not begun.", lambda: service.queued),
            ("maestrale_open_requests", "Requests that have not ended.", lambda: service.open_jobs),
            ("maestrale_engine_waiting", "Prompts that wait in the engine.", lambda: now().waiting),
            ("maestrale_engine_running", "Prompts that are worked on.", lambda: now().running),
            ("maestrale_cache_pages", "Pages of the cache.", lambda: sum(p.total for p in now().pools)),
            (
                "maestrale_cache_pages_free",
                "Pages that hold nothing needed.",
                lambda: sum(p.free + p.cached for p in now().pools),
            ),
        ],
        counters=[
            ("maestrale_prefix_tokens_asked", "Tokens of prompts begun.", lambda: now().prefix_asked),
            ("maestrale_prefix_tokens_found", "Those that lay in the cache already.", lambda: now().prefix_found),
            ("maestrale_preemptions", "Prompts that gave up their pages for others.", lambda: now().preemptions),
            ("maestrale_drafted_tokens", "Tokens that speculation tried.", lambda: now().drafted),
            ("maestrale_accepted_tokens", "Those of them that were right.", lambda: now().accepted),
            ("maestrale_failed_steps", "Steps that the backend broke off.", lambda: now().failed_steps),
        ],
    )
