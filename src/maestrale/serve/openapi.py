"""/openapi.json: the routes as OpenAPI 3.1 describes them, from the models that read their bodies."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import maestrale
from maestrale.serve import protocol
from maestrale.serve.context import Context

_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (protocol.ChatRequest, "The assistant's answer to a chat."),
    "/v1/completions": (protocol.CompletionRequest, "Continuations of one prompt or many."),
    "/v1/fim/completions": (protocol.FimRequest, "What stands between a prompt and a suffix."),
    "/v1/embeddings": (protocol.EmbeddingsRequest, "The mean of each text's last hidden states."),
    "/tokenize": (protocol.TokenizeRequest, "Token ids of a text or a chat."),
    "/detokenize": (protocol.DetokenizeRequest, "The text of token ids."),
}
_QUESTIONS = {
    "/v1/models": "What is served.",
    "/tokenizer_info": "The tokenizer and its special tokens.",
    "/health": "Whether the process works.",
    "/ready": "Whether new requests are welcome.",
    "/version": "Maestrale's version.",
    "/metrics": "Counters in Prometheus' text form.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "A field is wrong; `param` names it.",
    "401": "No key, or one that is not known.",
    "403": "A Host that is not served.",
    "404": "No such model.",
    "405": "Another method is expected.",
    "408": "It took too long.",
    "413": "The body is too large.",
    "415": "The body is no application/json.",
    "429": "The queue is full.",
    "431": "The head is too large.",
    "500": "A fault of the server's own.",
    "503": "The server is shutting down.",
}


async def openapi(context: Context, request: Request) -> Response:
    return JSONResponse(describe())


def describe() -> dict[str, Any]:
    """The whole description."""
    bodies = [model for model, _ in _BODIES.values()]
    references, definitions = models_json_schema(
        [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for path, (model, summary) in _BODIES.items():
        content = {"application/json": {"schema": references[model, "validation"]}}
        paths[path] = {
            "post": _operation(summary, streams=path.endswith("/completions"))
            | {"requestBody": {"required": True, "content": content}}
        }
    for path, summary in _QUESTIONS.items():
        paths[path] = {"get": _operation(summary, "text/plain" if path == "/metrics" else "application/json")}
    named = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{id}"] = {"get": _operation("One model's card.") | {"parameters": [named]}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Maestrale", "version": maestrale.__version__},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"] | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(summary: str, kind: str = "application/json", streams: bool = False) -> dict[str, Any]:
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    done: dict[str, Any] = {kind: {}}
    if streams:
        done["text/event-stream"] = {}
    return {
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": done}}
        | {status: {"description": text, "content": problem} for status, text in _STATUSES.items()},
    }
