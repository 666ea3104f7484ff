"""Around all routes: who may ask, how much, how long, and an answer in one form whatever goes wrong.

Plain ASGI: what wraps the body in an object of its own hides from the routes that the client has gone.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maestrale.errors import MaestraleError
from maestrale.serve.answers import ClientGone
from maestrale.serve.metrics import Metrics
from maestrale.serve.problems import ApiError, as_api_error
from maestrale.serve.settings import Settings

log = logging.getLogger("maestrale.serve")
access = logging.getLogger("maestrale.access")

_HOST = re.compile(r"(?:\[([^]]*)\]|([^][:@]+))(?::\d{0,5})?")  # an IPv6 address, or a name; a port
OPEN = (b"/health", b"/ready")  # what an orchestrator asks, without a key, by an address; they tell nothing else


class Front:
    """The outermost: a request id, one line in the log, and any exception as an error body."""

    def __init__(self, app: ASGIApp, metrics: Metrics, route_of: Callable[[Scope], str]):
        self.app, self.metrics, self.route_of = app, metrics, route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id, began, status = f"req_{secrets.token_hex(12)}", time.monotonic(), 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        scope["app"] = self  # so that the router raises where it would answer in plain text
        try:
            await self.app(scope, receive, tagged)
        except (ClientGone, asyncio.CancelledError) as error:
            status = status or 499
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:  # the last place where a fault can still become an answer
            problem = as_api_error(error)
            if problem.status == 500:
                known = isinstance(error, MaestraleError | ApiError)  # the message says it all
                log.error("request %s failed: %s", request_id, problem, exc_info=None if known else error)
            if status:
                raise  # an answer has begun: all that is left is to break the connection
            await problem.response()(scope, receive, tagged)
        finally:
            self.metrics.answers.labels(self.route_of(scope), status).inc()
            seconds = time.monotonic() - began
            path = json.dumps(scope["path"])[:200]
            access.info("%s %s %d %.3f s %s", scope["method"], path, status, seconds, request_id)


class Guard:
    """Keys first, then the Host: who has no key learns nothing but that."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.hosts = app, settings.hosts
        self.keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        scope["tenant"] = ""
        if scope["raw_path"] not in OPEN:
            if self.keys:
                scope["tenant"] = self._tenant(headers)
            self._check_host([value for name, value in headers if name == b"host"])
        await self.app(scope, receive, send)

    def _tenant(self, headers: list[tuple[bytes, bytes]]) -> str:
        """Which of the keys the request bears."""
        given = b"".join(value for name, value in headers if name == b"authorization")
        scheme, _, value = given.partition(b" ")
        if scheme.lower() == b"basic":  # a browser's way: any name, the key as password
            try:
                value = base64.b64decode(value.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                value = b""
        elif scheme.lower() != b"bearer":
            value = b""
        value = value.strip()
        found = [i for i, key in enumerate(self.keys) if hmac.compare_digest(key, value)]  # all of them, always
        if not found:
            hint = "send  Authorization: Bearer KEY" if not given else "this key is not known"
            raise ApiError(401, f"no access: {hint}", code="invalid_api_key")
        return str(found[0])

    def _check_host(self, hosts: list[bytes]) -> None:
        if not self.hosts:
            return
        named = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
        if named is None or (named[1] or named[2]) not in self.hosts:
            raise ApiError(403, "Host: this name is not served here; add it with --allowed-host", code="unknown_host")


class Limits:
    """Bounds on a request's body, in bytes and seconds."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.max_body, self.body_timeout = app, settings.max_body, settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or len(announced) > 18 or int(announced) > self.max_body:
            raise self._too_large()
        deadline = time.monotonic() + self.body_timeout
        size, complete = 0, False

        async def bounded_receive() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self.body_timeout:g} s") from None
            if message["type"] == "http.request":
                size += len(message["body"])
                complete = not message["more_body"]
                if size > self.max_body:
                    raise self._too_large()
            return message

        await self.app(scope, bounded_receive, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body} bytes", code="request_too_large")
