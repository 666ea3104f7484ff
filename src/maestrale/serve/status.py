"""/health, /ready, /version, /metrics: what operators and their tools ask."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import maestrale
from maestrale.serve.context import Context
from maestrale.serve.problems import ApiError


async def health(context: Context, request: Request) -> Response:
    """200 while the process can do its work at all; a supervisor restarts it otherwise."""
    if not context.service.alive:
        raise ApiError(503, "the engine has stopped", code="engine_stopped")
    return JSONResponse({"status": "ok"})


async def ready(context: Context, request: Request) -> Response:
    """200 while new requests are welcome; a proxy sends them elsewhere otherwise."""
    if context.service.draining or not context.service.alive:
        raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
    return JSONResponse({"status": "ready"})


async def version(context: Context, request: Request) -> Response:
    return JSONResponse({"version": maestrale.__version__})


async def metrics(context: Context, request: Request) -> Response:
    return Response(context.metrics.text(), media_type="text/plain; version=0.0.4")
