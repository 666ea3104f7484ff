"""/tokenize, /detokenize, /tokenizer_info: the model's tokenizer, for clients that count."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from maestrale.serve.answers import ignored_header, read_body
from maestrale.serve.context import Context
from maestrale.serve.problems import bad_request
from maestrale.serve.protocol import DetokenizeRequest, TokenizeRequest
from maestrale.text.tokenizer import Tokenizer


async def tokenize(context: Context, request: Request) -> Response:
    body = await read_body(request, TokenizeRequest)
    context.require_model(body.model)
    tokenizer = context.llm.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("expected either prompt or messages", "prompt")
    if body.messages is not None:
        ids = await context.in_worker(tokenizer.encode_chat, body.messages)
    elif body.add_special_tokens is False and (named := _named(tokenizer, body.prompt or "")) is not None:
        ids = [named]
    else:
        ids = await context.in_worker(tokenizer.encode, body.prompt or "", body.add_special_tokens is not False)
    answer = {"tokens": ids, "count": len(ids), "max_model_len": context.llm.max_len}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.piece(token).decode(errors="replace") for token in ids]
    # Millions of ids, written as JSON here, would hold up every other client.
    return await context.in_worker(partial(JSONResponse, answer, headers=ignored_header(body)))


def _named(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the one token whose name is the whole text, as lm-eval asks for it. Such a name within a text, or in
    anything that is generated from, is text like any other."""
    ids = (tokenizer.bos_id, tokenizer.eos_id)
    return next((token for token in ids if tokenizer.piece(token).decode() == text), None)


async def detokenize(context: Context, request: Request) -> Response:
    body = await read_body(request, DetokenizeRequest)
    context.require_model(body.model)
    text = await context.in_worker(context.llm.tokenizer.decode, body.tokens)
    return JSONResponse({"prompt": text}, headers=ignored_header(body))


async def tokenizer_info(context: Context, request: Request) -> Response:
    tokenizer = context.llm.tokenizer
    return JSONResponse(
        {
            "tokenizer_class": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "bos_token": tokenizer.piece(tokenizer.bos_id).decode(),
            "bos_token_id": tokenizer.bos_id,
            "eos_token": tokenizer.piece(tokenizer.eos_id).decode(),
            "eos_token_id": tokenizer.eos_id,
            "pad_token": None,
            "chat_template": None,
            "model_max_length": context.llm.max_len,
        }
    )
