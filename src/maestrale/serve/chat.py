"""/v1/chat/completions: messages in, the assistant's answer out."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from maestrale.serve.answers import read_body, while_connected
from maestrale.serve.context import Context
from maestrale.serve.job import Work
from maestrale.serve.protocol import ChatRequest
from maestrale.serve.replies import answer


async def chat(context: Context, request: Request) -> Response:
    body = await read_body(request, ChatRequest)
    return await while_connected(request.receive, _chat(context, body, request.scope["tenant"]))


async def _chat(context: Context, body: ChatRequest, tenant: str) -> Response:
    adapter = context.models[context.require_model(body.model)]
    params = body.chat_params()
    ids = await context.in_worker(context.llm.tokenizer.encode_chat, body.messages)
    return await answer(context, body, Work(ids, params, True, adapter, tenant), "messages")
