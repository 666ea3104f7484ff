"""uvicorn's HTTP/1.1 with bounds: a head's size, the time it may take to arrive, and that an answer may lie unread."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from maestrale.serve.problems import ApiError
from maestrale.serve.settings import Settings

_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class _Bounded(HttpToolsProtocol):
    settings: Settings  # of the class that `protocol` makes

    _head = 0  # bytes of the head that is being read
    _reading_head = False
    _deadline: asyncio.TimerHandle | None = None
    _problem: ApiError | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._head_is_there()
        self._is_read()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._deadline is None:
            self._await_head()
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._reading_head = 0, True

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._reading_head = False
        self._head_is_there()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reading_head and self._deadline is None:  # it began to arrive while the answer was on its way
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._problem or ApiError(400, "this is no HTTP/1.1 request"))

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > self.settings.max_header:
            self._problem = ApiError(431, f"the request's head is larger than {self.settings.max_header} bytes")
            raise httptools.HttpParserError("head too large")  # uvicorn answers with send_400_response

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(self.settings.header_timeout, self._too_slow)

    def _head_is_there(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _too_slow(self) -> None:
        self._refuse(ApiError(408, f"the request's head did not arrive within {self.settings.header_timeout:g} s"))

    def _refuse(self, problem: ApiError) -> None:
        self._head_is_there()
        body = json.dumps(problem.body()).encode()
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\nx-should-retry: false\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%s" % (problem.status, _PHRASES[problem.status], len(body), body)
        )
        self.transport.close()


def protocol(settings: Settings) -> type[asyncio.Protocol]:
    """The protocol class with these settings, as uvicorn takes it: uvicorn makes the instances."""
    return type("Bounded", (_Bounded,), {"settings": settings})
