"""/v1/embeddings: a text as the mean of its last hidden states. These models were not trained for it: say so."""

from __future__ import annotations

import asyncio
import base64
import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maestrale.errors import RequestError
from maestrale.serve.answers import ignored_header, read_body, while_connected
from maestrale.serve.context import Context
from maestrale.serve.problems import ApiError, bad_request
from maestrale.serve.protocol import EmbeddingsRequest

POOLING = "mean of the last hidden states"


async def embeddings(context: Context, request: Request) -> Response:
    body = await read_body(request, EmbeddingsRequest)
    return await while_connected(request.receive, _embed(context, body))


async def _embed(context: Context, body: EmbeddingsRequest) -> Response:
    model, dim, texts = context.require_model(body.model), context.llm.config.dim, body.texts()
    if context.models[model] is not None:
        raise bad_request(f"model: an adapter gives no embeddings: expected {context.settings.name!r}", "model")
    if body.dimensions not in (None, dim):
        raise bad_request(f"dimensions = {body.dimensions}: this model's are {dim}", "dimensions")
    try:
        encoded = await context.in_worker(
            lambda: [context.llm.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
        )
    except RequestError as error:
        raise bad_request(str(error), "input") from None
    seconds = context.settings.request_timeout
    try:
        async with asyncio.timeout(seconds):
            vectors = await context.service.chore(context.llm.embed(encoded))
    except TimeoutError:
        raise ApiError(408, f"not done within {seconds:g} s: the request was cancelled") from None
    written = [_base64(v) if body.encoding_format == "base64" else v.tolist() for v in vectors]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(written)]
    count = sum(map(len, encoded))
    counts: dict[str, Any] = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}
    head = {"id": f"embd-{secrets.token_hex(12)}", "object": "list", "model": model, "pooling": POOLING}
    return JSONResponse(head | {"data": data, "usage": counts}, headers=ignored_header(body))


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
