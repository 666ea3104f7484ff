"""/v1/models: the card of what is served."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maestrale.serve import view
from maestrale.serve.context import Context


async def models(context: Context, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(context, name) for name in context.models]})


async def model(context: Context, request: Request) -> Response:
    return JSONResponse(_card(context, context.require_model(request.path_params["id"])))


def _card(context: Context, name: str) -> dict[str, Any]:
    base, tokenizer = context.settings.name, context.llm.tokenizer
    capabilities = {
        "completion_chat": tokenizer.has_chat,
        "completion_fim": tokenizer.has_fim,
        "function_calling": tokenizer.has_tools,
        "fine_tuning": False,
        "vision": False,
        "classification": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "maestrale",
        "type": "base",
        "root": base,
        "parent": None if name == base else base,
        "name": name,
        "capabilities": capabilities,
        "max_model_len": context.llm.max_len,
        "max_context_length": context.llm.max_len,
        "aliases": [],
        "deprecation": None,
    } | view.card(context)
