"""/v1/chat/completions: messages in, the assistant's answer out."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from maestrale.serve.answers import read_body, while_connected
from maestrale.serve.context import Context
from maestrale.serve.job import Work
from maestrale.serve.protocol import ChatRequest
from maestrale.serve.replies import answer
from maestrale.serve.tools import prepare


async def chat(context: Context, request: Request) -> Response:
    body = await read_body(request, ChatRequest)
    return await while_connected(request.receive, _chat(context, body, request.scope["tenant"]))


async def _chat(context: Context, body: ChatRequest, tenant: str) -> Response:
    adapter = context.models[context.require_model(body.model)]
    ids, params = await context.in_worker(prepare, context.llm.tokenizer, body)
    work = Work(ids, params, True, adapter, tenant)
    return await answer(context, body, work, "messages", calls=bool(body.tools))
