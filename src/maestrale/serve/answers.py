"""Between HTTP and the routes: a body read strictly, an answer that ends with its client, a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from maestrale.serve.problems import ApiError, as_api_error, bad_request

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")

IGNORED = "x-ignored-fields"
_SHOWN = 80  # characters of a wrong value in an error message


async def read_body(request: Request, model: type[B]) -> B:
    """The body as `model`. ApiError 415 for another content type, 400 for what is no such JSON object; ClientGone where
    the client leaves before its end."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type = {kind[:_SHOWN]!r}: expected application/json")
    try:
        content = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise _wrong_body(error) from None


def _wrong_body(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "json_invalid":
        return bad_request(f"the body is no valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}", None)
    if param is None:
        return bad_request("the body is no JSON object", None)
    value = json.dumps(first["input"], default=str) if first["type"] != "missing" else ""
    got = f"; got {value[:_SHOWN]}{'…' * (len(value) > _SHOWN)}" if value else ""
    return bad_request(f"{param}: {first['msg']}{got}", param)


def ignored_header(body: BaseModel) -> dict[str, str]:
    """The header that lists the fields which we do not know; {} where there is none."""
    if not body.model_extra:
        return {}
    return {IGNORED: json.dumps(sorted(body.model_extra))[1:-1][:1000]}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled, and ClientGone raised, when the client goes away. The body is read before."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)  # what they hold is free when we leave


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(data: dict[str, Any]) -> bytes:
    return f"data: {_json(data)}\n\n".encode()


PING, DONE = b": ping\n\n", b"data: [DONE]\n\n"


class EventStream(Response):
    """Server-sent events: `chunks` of bytes, then [DONE]; an error in mid-stream is an event before it."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], headers: dict[str, str]):
        self.chunks, self.status_code = chunks, 200
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode("latin-1")) for name, value in headers.items()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self.chunks) as chunks:
            try:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except ApiError as error:
                chunk = event(as_api_error(error).body())
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": DONE})
