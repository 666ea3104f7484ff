"""/v1/fim/completions: what stands between a prompt and a suffix, for models with tokens for it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from maestrale.serve.answers import read_body, while_connected
from maestrale.serve.context import Context
from maestrale.serve.job import Work
from maestrale.serve.protocol import FimRequest
from maestrale.serve.replies import answer


async def fill_in(context: Context, request: Request) -> Response:
    body = await read_body(request, FimRequest)
    return await while_connected(request.receive, _fill_in(context, body, request.scope["tenant"]))


async def _fill_in(context: Context, body: FimRequest, tenant: str) -> Response:
    adapter = context.models[context.require_model(body.model)]
    params = body.params(None)
    ids = await context.in_worker(context.llm.tokenizer.encode_fim, body.prompt, body.suffix or "")
    return await answer(context, body, Work(ids, params, False, adapter, tenant), "prompt")
